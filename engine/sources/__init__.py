"""Pools of images: the SOURCES table, one module a kind.

`open_pool` lists a pool once, on the driver; `read` gives the samples of a range of its rows, on any worker. A pool
row is a position in the listing, which is sorted, so the same pool has the same rows everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType

import pyarrow as pa
import pyarrow.fs as pafs

from engine.folders import Place
from engine.schema import InputError
from engine.sources import cifar, folder, parquet
from engine.sources.pool import Columns, Pool, Sample
from engine.store import part_bytes

SOURCES: dict[str, ModuleType] = {"folder": folder, "parquet": parquet, "cifar": cifar}
"""Each has list_pool(place, columns) -> Pool and read(pool, start, stop) -> samples."""


def _detect(place: Place) -> str:
    kind = place.kind()
    if kind == pafs.FileType.NotFound:
        raise InputError(f"pool {place.uri!r} does not exist: give an image folder, a Parquet file or folder, or CIFAR's files")
    if place.path.endswith(".parquet") and kind == pafs.FileType.File:
        return "parquet"
    if cifar.files_of(place):
        return "cifar"
    if kind == pafs.FileType.File:
        raise InputError(f"pool {place.uri!r} is a file that is neither .parquet nor a CIFAR batch")
    return "parquet" if parquet.files_of(place) else "folder"


def open_pool(uri: str, columns: Columns | None = None) -> Pool:
    """List a pool: find out its kind, its rows in their fixed order, and its digest.

    Raises InputError when it is missing, empty, or of no known kind.
    """
    place = Place(Place(uri).absolute)
    pool: Pool = SOURCES[_detect(place)].list_pool(place, columns or Columns())
    if pool.num_rows == 0:
        raise InputError(f"pool {uri!r} is empty: no file in it ends in {', '.join(sorted(folder.IMAGE_SUFFIXES))} or .parquet")
    return pool


def read(pool: Pool, start: int, stop: int) -> Iterator[Sample]:
    """Yield the samples of pool rows [start, stop), in order."""
    samples: Iterator[Sample] = SOURCES[pool.kind].read(pool, start, stop)
    return samples


def save_pool(pool: Pool, place: Place) -> None:
    """Write a listing to a file that every worker can read."""
    facts = {name: getattr(pool, name) for name in ("uri", "kind", "num_rows", "digest", "class_names", "detail")}
    place.write(part_bytes(pool.listing.replace_schema_metadata({"pool": json.dumps(facts)})))


def load_pool(place: Place) -> Pool:
    """Read what `save_pool` wrote."""
    listing = pa.ipc.open_file(pa.py_buffer(place.read())).read_all()
    facts = json.loads(listing.schema.metadata[b"pool"])
    names = facts.pop("class_names")
    return Pool(listing=listing, class_names=tuple(names) if names else None, **facts)


__all__ = ["SOURCES", "Columns", "Pool", "Sample", "load_pool", "open_pool", "read", "save_pool"]
