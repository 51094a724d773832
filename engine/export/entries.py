"""The images of an export, in pick order: where they are, what is known of them, and copies or links where those are made."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.arrays import Ints
from engine.decode import BadImageError, read_header
from engine.export.addresses import Addresses, shared
from engine.export.output import Names, safe_name
from engine.export.turn import turned_size
from engine.export.wanted import Wanted
from engine.places import Place
from engine.schema import InputError, Progress, RunError
from engine.sources import Pool, Sample, read_rows
from engine.sources.boxes import BOXES
from engine.sources.pool import IMAGE_SUFFIXES
from engine.sources.tables import suffix_of

HELD = ("tar", "cifar", "svhn")
"""Pools whose images are no files of their own; those of tables may be either."""
SUFFIX_OF = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tif"}
"""How files are called of formats whose name is not their ending."""
FEW, MANY = 32, 1024
"""Images read at a time: files each for itself, and rows of a container, which are small and read best together."""
NO_CLASS = "unlabelled"


@dataclass(frozen=True)
class Entry:
    """One image: `uri` is where the tool finds it, `file` its name below the export, '' where it has none.

    `boxes` as in a pool's `boxes` column. `size` is (width, height) in px as stored, `shown` as turned by `orientation`.
    """

    rank: int
    row: int
    id: str
    uri: str
    file: str
    label: int | None
    boxes: list[dict[str, Any]] | None
    size: tuple[int, int]
    orientation: int
    tag: str
    data: bytes = field(repr=False)

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height as a tool shows it."""
        return turned_size(self.size, self.orientation)


@dataclass
class Sink:
    """Puts images below `folder`/`below`, or in a folder a class: copies, or links to files on this machine.

    `uri` is where the folder will be. `entries` are (file, id, row) of all of them.
    """

    folder: Place
    uri: str
    below: str
    links: bool
    classes: dict[int | None, str] | None = None
    names: Names = field(default_factory=Names)
    entries: list[tuple[str, str, int]] = field(default_factory=list)

    def put(self, name: str, sample: Sample, data: bytes, suffix: str) -> str:
        """Write one image, or link to it; return its name below the folder."""
        below = self.below if self.classes is None else self.classes[sample.label]
        file = self.names.add(name, sample.row, suffix, below)
        place = self.folder.at(*file.split("/"))
        if self.links:
            os.makedirs(os.path.dirname(place.path), exist_ok=True)
            os.symlink(shared(sample.uri), place.path)
        else:
            place.write(data)
        self.entries.append((file, name, sample.row))
        return file


def class_folders(pool: Pool) -> dict[int | None, str]:
    """Return a folder for each class, and for None, named as they are as far as a file system allows."""
    names, found = Names(), dict[int | None, str]()
    for code, name in enumerate(pool.class_names or ()):
        found[code] = names.add(safe_name(name.replace("/", "_")), code, "")
    found[None] = names.add(NO_CLASS, len(found), "")
    return _Numbered(found)


class _Numbered(dict[int | None, str]):
    """Classes that nothing names are called by their numbers."""

    def __missing__(self, code: int | None) -> str:
        return str(code)


def is_held(pool: Pool, sample: Sample) -> bool:
    """Return whether an image is no file of its own."""
    return pool.kind in HELD or (pool.kind in ("parquet", "datasets") and sample.uri.endswith(f"#{sample.row}"))


def no_files(pool: Pool) -> InputError:
    """Return the error of images that can only be copied."""
    return InputError(
        f"images of pool {pool.uri!r} lie inside of its files ({pool.kind}), where no other tool finds them: pass --copy, "
        "which writes them as files of their own"
    )


def _file_of(sample: Sample) -> bytes:
    if isinstance(sample.data, bytes):
        return sample.data
    buffer = io.BytesIO()
    sample.data.save(buffer, format="PNG")
    return buffer.getvalue()


def _suffix(sample: Sample, form: str) -> str:
    """Return the ending of an image's file: that of its name, else its format's."""
    for name in (sample.id, sample.uri) if isinstance(sample.data, bytes) else ():
        if suffix_of(name) in IMAGE_SUFFIXES:
            return f".{name.rpartition('.')[2]}"
    return SUFFIX_OF.get(form, f".{form.lower()}")


def _in_order(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of some rows in the order given; a few at a time are in memory."""
    step = MANY if "start" in pool.listing.schema.names else FEW
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        found = {sample.row: sample for sample in read_rows(pool, np.sort(some))}
        for row in some.tolist():
            yield found.pop(row)


def _checked(sample: Sample, name: str, pool: Pool, by_row: bool) -> Sample:
    if sample.id != name and not by_row:
        raise InputError(
            f"row {sample.row} of pool {pool.uri!r} is {sample.id!r}, and the selection calls it {name!r}: give the pool that "
            "its features were embedded from"
        )
    return sample


def read_entries(
    wanted: Wanted, addresses: Addresses, sink: Sink | None, embeds: bool, max_pixels: int, progress: Progress
) -> Iterator[Entry]:
    """Yield all images in pick order, each read once, and put where `sink` says; `embeds`: the export holds their bytes.

    Raises InputError for one that is not called as the selection says, or lies inside of a container and is not copied;
    RunError for one that can't be read.
    """
    pool = wanted.pool
    assert pool is not None
    copies = embeds or (sink is not None and not sink.links)
    by_row, total = wanted.by_row, len(wanted.rows)
    for rank, (sample, name) in enumerate(zip(_in_order(pool, wanted.rows), wanted.ids, strict=True)):
        _checked(sample, name, pool, by_row)
        if is_held(pool, sample) and not copies:
            raise no_files(pool)
        if sink is not None and sink.links and "://" in shared(sample.uri):
            raise InputError(
                f"image {name!r} is at {shared(sample.uri)}, where nothing on this machine can link to: pass --copy"
            )
        try:
            if sample.error is not None:
                raise BadImageError(sample.error)
            data = _file_of(sample)
            size, orientation, form = read_header(data)
            if size[0] * size[1] > max_pixels:
                raise BadImageError(f"{size[0]} x {size[1]} pixels are above --max-pixels {max_pixels:,}")
        except BadImageError as error:
            raise RunError(
                f"image {name!r} (row {sample.row} of pool {pool.uri!r}) can't be handed over: {error}. Nothing was written: "
                "mend it, or leave it out of the selection"
            ) from error
        file = sink.put(name, sample, data, _suffix(sample, form)) if sink is not None else ""
        uri = addresses.of_image(f"{sink.uri}/{file}" if sink is not None and copies else sample.uri)
        drawn = sample.extra.get(BOXES.name)
        yield Entry(rank, sample.row, name, uri, file, sample.label, drawn, size, orientation, wanted.tags[rank], data)
        progress("export", rank + 1, total, "")
