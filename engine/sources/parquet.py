"""Parquet and Arrow files that hold the images: a struct of bytes and path (the Hugging Face convention), or plain bytes.

Labels are codes or names; `objects` become boxes; other columns pass through.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs as pafs

from engine.arrays import Ints
from engine.folders import digest_of
from engine.places import Place
from engine.sources.listing import ListingWriter, extents
from engine.sources.pool import Columns, Pool, Sample, stamp
from engine.sources.rows import columns_read, ids_of, samples, survey
from engine.sources.tables import TABLES, batches, extent_rows, read_extent, same_schema, stream_row_group
from engine.sources.walk import files_ending

USES = frozenset(("image", "label", "id", "metadata"))
EXTENTS = pa.schema([("file", pa.string()), ("group", pa.int64()), ("start", pa.int64()), ("count", pa.int64())])
"""`group` is the number of a row group, or of a record batch, in its file."""

HELD_BYTES = 1 << 28
"""A row group of more bytes is never in memory as a whole."""


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the row groups of the files, sorted by path; find their image, label and id columns."""
    found = files_ending(place, TABLES)
    files = [place.at(name) if name else place for name, _, _ in found]
    schema = same_schema(files)
    writer = ListingWriter(EXTENTS)
    start = 0
    for (name, _, _), file in zip(found, files, strict=True):
        counts = extent_rows(file)
        *starts, start = itertools.accumulate(counts, initial=start)
        writer.add(pa.table([[name] * len(counts), list(range(len(counts))), starts, counts], schema=EXTENTS))

    told = survey(functools.partial(_read_all, files), start, schema, columns, place.uri)
    digest = digest_of([found, told.detail, str(told.schema), told.class_names])
    return Pool(place.address, "parquet", start, digest, told.class_names, told.detail, writer.finish(), told.schema)


def _read_all(files: list[Place], names: list[str]) -> Iterator[pa.RecordBatch]:
    for file in files:
        yield from batches(file, names)


def ids(pool: Pool) -> Iterator[pa.Array]:
    """Yield the ids of all rows, in batches."""
    place, names = Place(pool.address), dict.fromkeys(n for t in pool.listing.tables() for n in t["file"].to_pylist())
    files = [place.at(*name.split("/")) if name else place for name in names]
    return ids_of(pool, functools.partial(_read_all, files))


@functools.lru_cache(maxsize=1)
def _extent(uri: str, stamped: tuple[int, int], group: int, columns: tuple[str, ...]) -> pa.Table | None:
    return read_extent(Place(uri), group, list(columns), HELD_BYTES)


def read(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of ascending pool rows; the last row group is kept, as the next rows are likely in it."""
    place = Place(pool.address)
    base = place if place.kind() == pafs.FileType.Directory else place.folder
    names = tuple(columns_read(pool))
    for extent, at in extents(pool.listing, rows):
        file = place.at(*extent["file"].split("/")) if extent["file"] else place
        group, low, high = extent["group"], int(at[0]), int(at[-1]) + 1
        whole = _extent(file.address, stamp(file), group, names)
        found = stream_row_group(file, group, list(names), low, high) if whole is None else [(0, whole)]
        for first, piece in found:
            mine = at[(at >= first) & (at < first + len(piece))] + extent["start"]
            yield from samples(pool, piece, extent["start"] + first, mine, file.uri, base)
