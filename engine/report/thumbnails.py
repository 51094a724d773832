"""Small images for a page, out of the pool; what can't be read is a grey tile with the reason."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from engine.arrays import Ints
from engine.decode import BadImageError, decode
from engine.page import number
from engine.places import Place
from engine.schema import InputError, Progress, first_line
from engine.sources import Pool, Sample, columns_of, load_pool, open_pool, read_rows
from engine.sources.listing import extents
from engine.store import FeatureStore
from engine.verbs import ReportOptions

LARGE_PX, SMALL_PX = 112, 56
"""Longest side of a thumbnail: of picks and of what stands beside them, and of the map's other images."""
QUALITY = {LARGE_PX: 72, SMALL_PX: 55}
SLICE_ROWS = 48
"""Rows that a thread reads at a time."""
THREADS = 8
TRIES = 8
"""Rows of a container that fail in a row before the rest of a slice is given up."""
MAP_EXTENTS = 256
"""Extents of containers (row groups, shards) that are read for the map, at most: each is read whole."""


@dataclass(frozen=True)
class Thumbnails:
    """Base64 WebP images by pool row; the reasons of rows whose image can't be read, and of those that were `skipped`."""

    images: dict[int, str]
    reasons: dict[int, str]
    skipped: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tile:
    """An image as a page shows it: what it is called, what is known of it, and the image or the reason why there is none."""

    row: int
    title: str
    facts: list[tuple[str, str]]
    image: str | None
    reason: str | None


@dataclass(frozen=True)
class Images:
    """Where the images of a store are: a pool, or the reason why there is none. `named` if the user said where it is."""

    pool: Pool | None
    why_not: str = ""
    named: bool = False
    max_pixels: int = 0


def open_images(options: ReportOptions, store: FeatureStore) -> Images:
    """Return the pool that a store was made from: the one that is given, else as the store has it listed.

    Raises InputError where a pool that is given can't be opened, or has another number of rows.
    """
    if options.pool is not None:
        pool = open_pool(options.pool, columns_of(options))
        if pool.num_rows != store.num_rows:
            raise InputError(
                f"--pool {options.pool} has {pool.num_rows:,} rows, and {store.place.uri} was made of {store.num_rows:,}: "
                "give the pool that was embedded"
            )
        return Images(pool, named=True, max_pixels=options.max_pixels)
    if not store.place.at("pool.json").exists():
        return Images(None, "the features don't say where their images are: give --pool")
    return Images(load_pool(store.place.at("pool.arrow")), max_pixels=options.max_pixels)


def thumbnail(image: Image.Image, side_px: int) -> str:
    """Return an image, no larger than it is and at most `side_px` on its longer side, as base64 of a WebP file."""
    small, sink = image.copy(), io.BytesIO()
    small.thumbnail((side_px, side_px), Image.Resampling.BICUBIC)
    small.save(sink, format="WEBP", quality=QUALITY[side_px], method=4)
    return base64.b64encode(sink.getvalue()).decode()


def _one(sample: Sample, side_px: int, max_pixels: int) -> str:
    """Return a sample's thumbnail; raises BadImageError with the reason."""
    if sample.error is not None:
        raise BadImageError(sample.error)
    image = sample.data if isinstance(sample.data, Image.Image) else decode(sample.data, max_pixels, side_px)[0]
    return thumbnail(image.convert("RGB"), side_px)


def _slice(found: Images, rows: Ints, names: Sequence[str], side_px: int) -> Thumbnails:
    """Return the thumbnails of some ascending rows; goes on behind a row that the source can't give."""
    assert found.pool is not None
    images, reasons, at, failed, reason = dict[int, str](), dict[int, str](), 0, 0, ""
    while at < len(rows) and failed < TRIES:
        try:
            for sample in read_rows(found.pool, rows[at:]):
                row, name, at, failed = int(rows[at]), names[at], at + 1, 0
                if name not in (sample.id, str(row)):
                    if found.named:
                        raise InputError(
                            f"--pool has {sample.id!r} in row {row}, the features {name!r}: give what was embedded"
                        )
                    reasons[row] = f"the pool has {sample.id!r} here now"
                    continue
                try:
                    images[row] = _one(sample, side_px, found.max_pixels)
                except BadImageError as error:
                    reasons[row] = str(error)
            break
        except (OSError, InputError) as error:
            if found.named and isinstance(error, InputError):
                raise
            reason, failed = first_line(error), failed + 1
            reasons[int(rows[at])] = reason
            at += 1
    return Thumbnails(images, reasons | {int(row): reason for row in rows[at:] if int(row) not in images})


def read_thumbnails(found: Images, rows: Ints, store: FeatureStore, side_px: int, progress: Progress, stage: str) -> Thumbnails:
    """Return the thumbnails of some pool rows, read on threads. Raises InputError where a pool that was given is another."""
    rows = np.unique(rows)
    if found.pool is None:
        return Thumbnails({}, {int(row): found.why_not for row in rows})
    names = store.ids(rows)
    parts = [slice(start, start + SLICE_ROWS) for start in range(0, len(rows), SLICE_ROWS)]
    images, reasons = dict[int, str](), dict[int, str]()
    with ThreadPoolExecutor(THREADS) as threads:
        for part in threads.map(lambda part: _slice(found, rows[part], names[part], side_px), parts):
            images |= part.images
            reasons |= part.reasons
            progress(stage, len(images) + len(reasons), len(rows), "")
    return Thumbnails(images, reasons)


def cheap_rows(found: Images, rows: Ints) -> Ints:
    """Return those of some ascending rows that are read for the map: of containers, rows of MAP_EXTENTS extents at most."""
    if found.pool is None or "start" not in found.pool.listing.schema.names:
        return rows
    groups = [extent["start"] + places for extent, places in extents(found.pool.listing, rows)]
    step = max(1, -(-len(groups) // MAP_EXTENTS))
    return np.concatenate([rows[:0], *groups[::step]])


class Album:
    """Makes the tiles of a page: knows each shown row's image, id, label and size."""

    def __init__(self, store: FeatureStore, shown: Ints, thumbnails: Thumbnails) -> None:
        self._images, self._reasons = thumbnails.images, thumbnails.reasons | thumbnails.skipped
        rows = np.unique(shown)
        self._at = {int(row): place for place, row in enumerate(rows)}
        self._ids = store.ids(rows)
        self._labels = store.labels[np.searchsorted(store.rows, rows)].tolist()
        self._classes = store.class_names or []

    def label(self, row: int) -> str | None:
        """Return the name of a row's class; None where it has none."""
        code = self._labels[self._at[row]]
        return None if code < 0 else self._classes[code] if code < len(self._classes) else str(code)

    def id(self, row: int) -> str:
        """Return a row's id."""
        return self._ids[self._at[row]]

    def facts(self, row: int, more: Sequence[tuple[str, Any]] = ()) -> list[tuple[str, str]]:
        """Return what is known of a row, as texts."""
        told = [("id", self.id(row)), ("label", self.label(row)), ("row", f"{row:,}"), *more]
        return [(name, number(v, 4) if isinstance(v, float) else str(v)) for name, v in told if v is not None]

    def tile(self, row: int, title: str, more: Sequence[tuple[str, Any]] = ()) -> Tile:
        """Return the tile of a row."""
        image = self._images.get(row)
        reason = None if image is not None else self._reasons.get(row, "no image was read")
        return Tile(row, title, self.facts(row, more), image, reason)


def source_of(store: FeatureStore, options: ReportOptions) -> str:
    """Return what the pool is called."""
    return Place(options.pool).uri if options.pool else str((store.manifest.get("pool") or {}).get("uri", store.place.uri))
