"""Pools of images: the SOURCES table, one module a kind.

`open_pool` lists a pool once, on the driver, in a stream; `read` gives the samples of a range of its rows, on any worker.
A pool row is a position in the listing, which is in a fixed order, so the same pool has the same rows everywhere.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from engine.arrays import Ints
from engine.folders import to_json
from engine.places import Place
from engine.schema import InputError
from engine.sources import cifar, coco, folder, hub, lists, parquet, svhn, tar, voc
from engine.sources.listing import Listing
from engine.sources.pool import IMAGE_SUFFIXES, Columns, Pool, Sample, columns_of
from engine.sources.roles import find_roles
from engine.sources.tables import TABLES, schema_of, suffix_of
from engine.sources.walk import ending, entries_of

SOURCES: dict[str, ModuleType] = {
    "folder": folder,
    "parquet": parquet,
    "list": lists,
    "datasets": hub,
    "coco": coco,
    "voc": voc,
    "tar": tar,
    "cifar": cifar,
    "svhn": svhn,
}
"""Each has USES, the fields of Columns that mean something to it; list_pool(place, columns) -> Pool; and
read(pool, rows) -> samples of ascending rows, which reads no more than what holds them: a container's extent once; ids(pool)
-> the ids of all rows, which reads no images."""

FILE_KINDS = {".csv": "list", ".tsv": "list", ".txt": "list", ".json": "coco", ".tar": "tar", ".mat": "svhn"}
FACTS = ("uri", "base", "kind", "num_rows", "digest", "class_names", "detail")


def _table_kind(place: Place, file: Place, columns: Columns) -> str:
    """Return whether tables hold images or a list of them."""
    return "list" if find_roles(schema_of(file), columns, place.uri).paths else "parquet"


def _folder_kind(place: Place, columns: Columns) -> str:
    """Return the kind of a folder: what its layout is known as, else that of the first directory with data in it.

    There tables go before shards, and shards before images.
    """
    for kind, is_one in (("datasets", hub.is_saved), ("voc", voc.is_voc), ("cifar", cifar.files_of)):
        if is_one(place):
            return kind
    waiting = [""]
    while waiting:
        below = waiting.pop()
        names = entries_of(place, below)["path"]
        tables = names.filter(pc.match_substring_regex(names, ending(TABLES)))
        if len(tables):
            return _table_kind(place, place.at(*f"{below}{tables[0]}".split("/")), columns)
        if not below and pc.any(pc.ends_with(names, ".tar")).as_py():
            return "tar"
        if pc.any(pc.match_substring_regex(names, ending(IMAGE_SUFFIXES))).as_py():
            return "folder"
        waiting += [f"{below}{name}" for name in reversed(names.filter(pc.ends_with(names, "/")).to_pylist())]
    return "folder"


def _detect(place: Place, columns: Columns) -> str:
    if hub.is_hub_name(place.address):
        return "datasets"
    if suffix_of(place.path) == ".tar" and tar.RANGE.search(place.name):
        return "tar"
    kind = place.kind()
    if kind == pafs.FileType.NotFound:
        raise InputError(f"pool {place.uri!r} does not exist: give a folder of images, or a file that lists or holds them")
    if kind == pafs.FileType.Directory:
        return _folder_kind(place, columns)
    if cifar.files_of(place):
        return "cifar"
    suffix = suffix_of(place.path)
    if suffix in TABLES:
        return _table_kind(place, place, columns)
    if suffix in FILE_KINDS:
        return FILE_KINDS[suffix]
    allowed = ", ".join(sorted((*TABLES, *FILE_KINDS)))
    raise InputError(f"pool {place.uri!r} is a file that is neither a CIFAR batch nor one of {allowed}")


def open_pool(uri: str, columns: Columns | None = None) -> Pool:
    """List a pool: find out its kind, its rows in their fixed order, and its digest.

    Raises InputError when it is missing, empty, of no known kind, or something was given that its kind has no use for.
    """
    columns = columns or Columns()
    place = Place(uri) if hub.is_hub_name(uri) else Place(Place(uri).absolute)
    kind = _detect(place, columns)
    source = SOURCES[kind]
    for name, flag in columns.given.items():
        if name not in source.USES:
            raise InputError(
                f"{flag} {getattr(columns, name)!r} means nothing for {uri!r}, a pool of kind {kind}: leave it out"
            )
    pool: Pool = source.list_pool(place, columns)
    if pool.num_rows == 0:
        raise InputError(f"pool {uri!r} is empty: there is no {', '.join(sorted(IMAGE_SUFFIXES))} file in it, nor a row")
    return pool


def read(pool: Pool, start: int, stop: int) -> Iterator[Sample]:
    """Yield the samples of pool rows [start, stop), in order."""
    return read_rows(pool, np.arange(start, min(stop, pool.num_rows), dtype=np.int64))


def read_rows(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of some pool rows, (n,) int64 ascending, reading no more than what holds them."""
    samples: Iterator[Sample] = SOURCES[pool.kind].read(pool, rows)
    return samples


def unread(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of some rows of a folder of images, (n,) int64 ascending, without their files' bytes."""
    return folder.unread(pool, rows)


def ids_of(pool: Pool) -> Iterator[pa.Array]:
    """Yield the ids of a whole pool in the order of its rows, as batches of strings; no image is read."""
    batches: Iterator[pa.Array] = SOURCES[pool.kind].ids(pool)
    return batches


def _facts_place(place: Place) -> Place:
    return place.folder.at(place.name.removesuffix(".arrow") + ".json")


def save_pool(pool: Pool, place: Place) -> None:
    """Write a pool where every worker can read it: its listing at `place`, a file NAME.arrow, its facts in NAME.json.

    The facts are written last, and without keys. Nothing of the listing passes through this process but a buffer.
    """
    place.write_from(pool.listing.place.path)
    facts = {name: getattr(pool, name) for name in FACTS}
    schema = base64.b64encode(pool.schema.serialize()).decode()
    listing = {"num_rows": pool.listing.num_rows, "digest": pool.listing.digest}
    _facts_place(place).write(to_json({**facts, "schema": schema, "listing": listing}))


def load_pool(place: Place) -> Pool:
    """Open what `save_pool` wrote; the listing is read when it is asked for. Its addresses lack their keys."""
    facts = json.loads(_facts_place(place).read())
    listing = Listing(place, **facts.pop("listing"))
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(facts.pop("schema"))))
    names = facts.pop("class_names")
    return Pool(address=facts.pop("uri"), listing=listing, schema=schema, class_names=tuple(names) if names else None, **facts)


__all__ = [
    "SOURCES",
    "Columns",
    "Pool",
    "Sample",
    "columns_of",
    "ids_of",
    "load_pool",
    "open_pool",
    "read",
    "read_rows",
    "save_pool",
    "unread",
]
