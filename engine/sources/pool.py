"""What a pool and a sample are, whatever their source."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs
from PIL import Image

from engine.folders import Place
from engine.schema import InputError


@dataclass(frozen=True)
class Sample:
    """One listed image: the bytes of its file (or decoded pixels), or the `error` that kept it from being read."""

    row: int
    id: str
    uri: str
    label: int | None
    data: bytes | Image.Image
    error: str | None = None


@dataclass(frozen=True)
class Pool:
    """A listed pool. `listing` has one row for each file or row group; what its columns mean is the source's own."""

    uri: str
    kind: str
    num_rows: int
    digest: str
    class_names: tuple[str, ...] | None
    listing: pa.Table
    detail: dict[str, str]


@dataclass(frozen=True)
class Columns:
    """The columns a user named for a Parquet pool; None means the usual ones."""

    image: str | None = None
    label: str | None = None


def list_files(place: Place) -> list[pafs.FileInfo]:
    """Return every file below a folder; raises InputError where a name cannot be read as text."""
    try:
        infos = place.fs.get_file_info(pafs.FileSelector(place.path, recursive=True))
        return [info for info in infos if info.type == pafs.FileType.File and info.path]
    except UnicodeDecodeError as error:
        name = error.object.decode("utf-8", "backslashreplace")
        raise InputError(f"pool {place.uri!r} holds a file whose name is not UTF-8, {name!r}: rename it") from error


def stamp(place: Place) -> tuple[int, int]:
    """Return a file's size and modification time: what tells a rewritten file from the one read before."""
    info = place.fs.get_file_info(place.path)
    return info.size, info.mtime_ns


def sample_from_file(row: int, name: str, file: Place, label: int | None) -> Sample:
    """Read one file; a file that is gone or cannot be read is a sample with an error, not a crash."""
    try:
        return Sample(row, name, file.uri, label, file.read())
    except (OSError, pa.ArrowInvalid) as error:
        return Sample(row, name, file.uri, label, b"", f"cannot be read: {str(error).splitlines()[0]}")
