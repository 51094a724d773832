"""What a pool and a sample are, whatever their source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from PIL import Image

from engine.masks import masked
from engine.places import Place
from engine.schema import InputError, first_line
from engine.sources.listing import Listing
from engine.verbs import PoolOptions

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
)
NO_COLUMNS = pa.schema([])

UNREADABLE = "cannot be read: "
"""How the `error` of a sample begins whose file the filesystem did not give."""
NO_SUCH_FILE = f"{UNREADABLE}there is no such file"


@dataclass(frozen=True)
class Sample:
    """One listed image: the bytes of its file (or decoded pixels), or the `error` that kept it from being read.

    `extra` holds the values of the pool's further columns, by name, ready for `pa.array([...], type)`.
    """

    row: int
    id: str
    uri: str
    label: int | None
    data: bytes | Image.Image
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pool:
    """A listed pool.

    `listing` has one row for each image, or for each extent of a container (a row group, a batch of a file); what its
    columns mean is the source's own, as is `detail`, which is ready for JSON. `schema` names and types the columns that
    pass through: metadata, and `boxes`. `address` is where it is, `base` below which place the images that it names are:
    with any keys, so neither is written; workers get them from the driver (`addresses`).
    """

    address: str = field(repr=False)
    kind: str
    num_rows: int
    digest: str
    class_names: tuple[str, ...] | None
    detail: dict[str, Any]
    listing: Listing
    schema: pa.Schema = NO_COLUMNS
    base: str = field(default="", repr=False)

    @property
    def uri(self) -> str:
        """Its name for people and files, without keys."""
        return masked(self.address)

    @property
    def addresses(self) -> tuple[str, str]:
        """Its address and its base."""
        return self.address, self.base

    @property
    def left_out(self) -> dict[str, Any]:
        """What of the pool does not pass through, counted or with the reason: columns, boxes, samples without an image."""
        kinds = ("columns_left_out", "boxes_left_out", "without_image")
        found = {kind: self.detail.get(kind) for kind in kinds}
        return {kind: what for kind, what in found.items() if (any(what.values()) if isinstance(what, dict) else what)}


@dataclass(frozen=True)
class Columns:
    """How the user told a source to read a pool; None, or nothing, means the usual.

    The columns of images, labels and ids; the columns of metadata to keep; the folder of the images that a list names;
    the split of a data set.
    """

    image: str | None = None
    label: str | None = None
    id: str | None = None
    metadata: tuple[str, ...] = ()
    images: str | None = None
    split: str | None = None

    @property
    def given(self) -> dict[str, str]:
        """The option's flag of everything that was given, by the name of the field."""
        flags = {"image": "--image-column", "label": "--label-column", "id": "--id-column", "metadata": "--metadata-column"}
        flags |= {"images": "--images", "split": "--split"}
        return {name: flag for name, flag in flags.items() if getattr(self, name)}


def columns_of(options: PoolOptions) -> Columns:
    """Return what a verb's options say of its pool."""
    return Columns(
        image=options.image_column,
        label=options.label_column,
        id=options.id_column,
        metadata=options.metadata_column,
        images=options.images,
        split=options.split,
    )


def stamp(place: Place) -> tuple[int, int]:
    """Return a file's size and modification time: what tells a rewritten file from the one read before.

    Both are 0 where the filesystem doesn't say.
    """
    info = place.fs.get_file_info(place.path)
    return info.size or 0, info.mtime_ns or 0


def check_inside(path: str, what: str) -> None:
    """Raise InputError where a path read from a file of a pool is absolute or climbs out of its folder."""
    depth = 0
    for part in path.replace("\\", "/").split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            raise InputError(f"{what} names {path!r}, which climbs out of its folder: images must lie inside")
    if path.startswith(("/", "\\")) or "://" in path:
        raise InputError(f"{what} names {path!r}, which is not below its folder: images must lie inside")


class Images:
    """Finds images by their path: below a folder, or wherever an absolute path or a URI says.

    It keeps one open filesystem for each bucket or host, as an object store's client is slow to make.
    """

    def __init__(self, base: Place) -> None:
        self.base = base
        self._roots: dict[str, Place] = {}

    def place(self, path: str) -> Place:
        """Return where a path is; a relative one is a file's name, whatever characters it holds."""
        if "://" in path:
            scheme, _, rest = path.partition("://")
            host, slash, name = rest.partition("/")
            if scheme not in ("s3", "gs") or "?" in name or "%" in name or not slash:
                return Place(path)
            if host not in self._roots:
                self._roots[host] = Place(f"{scheme}://{host}")
            return self._roots[host].at(*name.split("/"))
        return Place(path) if path.startswith("/") else self.base.at(*path.split("/"))


def sample_from_file(row: int, name: str, file: Place, label: int | None, extra: dict[str, Any] | None = None) -> Sample:
    """Read one file; a file that is gone or cannot be read is a sample with an error, not a crash."""
    return sample_of(row, name, file.uri, label, file.read, extra)


def sample_of(
    row: int, name: str, uri: str, label: int | None, read: Callable[[], bytes], extra: dict[str, Any] | None = None
) -> Sample:
    """Return the sample whose image `read` gives; what it can't give is a sample with an error."""
    data, error = b"", None
    try:
        data = read()
    except FileNotFoundError:
        error = NO_SUCH_FILE
    except (OSError, pa.ArrowInvalid) as caught:
        error = f"{UNREADABLE}{first_line(caught)}"
    return Sample(row, name, uri, label, data, error, extra or {})
