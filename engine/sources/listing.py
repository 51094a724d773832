"""The listing of a pool: an Arrow IPC file of record batches of exactly LISTING_ROWS rows, written and read in a stream.

A listing of 100 million rows is never in one process's memory: the writer holds less than a batch of it and spools the
rest to a local temporary file; a reader touches only the batches that it is asked for.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import os
import tempfile
import weakref
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from engine.arrays import Ints
from engine.places import Place, masked_column

if os.name == "posix":
    import fcntl

LISTING_ROWS = 8192
PREFIX = "coresift-listing-"
"""How the names of temporary listings begin."""
SLICE_ROWS = 256
"""Rows that are Python objects at a time."""
WIDTHS = {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}


class Listing:
    """A finished listing: `num_rows`, `digest` (sha256 of its schema and values, as hex), and `read`."""

    def __init__(self, place: Place, num_rows: int, digest: str) -> None:
        self.place, self.num_rows, self.digest = place, num_rows, digest
        self._last: tuple[int, pa.RecordBatch] | None = None

    @cached_property
    def _file(self) -> pa.ipc.RecordBatchFileReader:
        local = isinstance(self.place.fs, pafs.LocalFileSystem)
        return pa.ipc.open_file(pa.memory_map(self.place.path) if local else self.place.fs.open_input_file(self.place.path))

    @property
    def schema(self) -> pa.Schema:
        """The columns of the listing; what they mean is the source's own."""
        return self._file.schema

    def _batch(self, index: int) -> pa.RecordBatch:
        """Return one batch; the last one read is kept, for readers that go on from where they were."""
        last = self._last
        if last is None or last[0] != index:
            last = self._last = (index, self._file.get_batch(index))
        return last[1]

    def read(self, start: int, stop: int) -> pa.Table:
        """Return rows [start, stop) of the listing, reading only the batches that hold them."""
        stop = min(stop, self.num_rows)
        batches = []
        for index in range(start // LISTING_ROWS, -(-stop // LISTING_ROWS) if start < stop else 0):
            first = index * LISTING_ROWS
            low, high = max(start - first, 0), min(stop - first, LISTING_ROWS)
            batches.append(self._batch(index).slice(low, high - low))
        return pa.Table.from_batches(batches, self.schema)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the whole listing, a batch at a time."""
        for start in range(0, self.num_rows, LISTING_ROWS):
            yield self.read(start, start + LISTING_ROWS)


class ListingWriter:
    """Spools tables and record batches of any size to a temporary file, re-cut to LISTING_ROWS, with a running digest.

    `masks` are columns of URIs: the digest does not depend on the keys in them.
    """

    def __init__(self, schema: pa.Schema, masks: tuple[str, ...] = ()) -> None:
        self.schema, self.num_rows, self.masks = schema.remove_metadata(), 0, masks
        self._path, self._lock = _new_file()
        self._remove = weakref.finalize(self, _drop, self._path, self._lock)
        self._file = pa.ipc.new_file(self._path, self.schema)
        self._hash = hashlib.sha256(str(self.schema).encode())
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0

    def add(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Append rows; their columns must be those of the schema, in order."""
        batches = rows.to_batches() if isinstance(rows, pa.Table) else [rows]
        for batch in batches:
            batch = batch.cast(self.schema)
            self.num_rows += len(batch)
            self._waiting.append(batch)
            self._num_waiting += len(batch)
            if self._num_waiting >= LISTING_ROWS:
                self._write(self._num_waiting - self._num_waiting % LISTING_ROWS)

    def _write(self, count: int) -> None:
        """Write the first `count` waiting rows, in batches."""
        table = pa.Table.from_batches(self._waiting, self.schema)
        for start in range(0, count, LISTING_ROWS):
            batch = table.slice(start, min(LISTING_ROWS, count - start)).combine_chunks().to_batches()[0]
            for name, column in zip(self.schema.names, batch.columns, strict=True):
                _feed(self._hash, masked_column(column) if name in self.masks else column)
            self._file.write_batch(batch)
        left = table.slice(count)
        self._waiting = left.combine_chunks().to_batches() if len(left) else []
        self._num_waiting = len(left)

    def finish(self) -> Listing:
        """Return the listing; its temporary file lives as long as it does."""
        if self._num_waiting:
            self._write(self._num_waiting)
        self._file.close()
        listing = Listing(Place(self._path), self.num_rows, self._hash.hexdigest())
        self._remove.detach()
        weakref.finalize(listing, _drop, self._path, self._lock)
        return listing


def _new_file() -> tuple[str, int]:
    """Return a new temporary file, and a descriptor of it: its lock ends with the process, however that ends."""
    _sweep(tempfile.gettempdir())
    while True:
        handle, path = tempfile.mkstemp(prefix=PREFIX, suffix=".arrow")
        if os.name == "posix":
            with contextlib.suppress(OSError):  # a file system without locks: nobody else gets one there either
                fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else a sweep came between
            return path, handle
        os.close(handle)


@functools.cache
def _sweep(folder: str) -> None:
    """Remove the listings that killed runs left in a folder, once a process.

    They are those that nobody has a lock on: a process's number may be another's by now, or of another container.
    """
    if os.name != "posix":
        return
    with os.scandir(folder) as entries:
        left = [entry.path for entry in entries if entry.name.startswith(PREFIX) and entry.is_file(follow_symlinks=False)]
    for path in left:
        with contextlib.suppress(OSError):  # of a run that goes on, of another user, or gone by now
            handle = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(handle)


def _drop(path: str, handle: int) -> None:
    if os.path.exists(path):
        os.unlink(path)
    os.close(handle)


def _feed(found: Any, column: pa.Array) -> None:
    """Add a column's values to a hash, and nothing else: not what lies under its nulls, nor how they are laid out."""
    kind = column.type
    if column.null_count:
        found.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    found.update(len(column).to_bytes(8, "little"))
    if pa.types.is_struct(kind):
        for child in column.flatten():
            _feed(found, child)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _feed(found, pc.list_value_length(column))
        _feed(found, column.flatten())
    elif pa.types.is_boolean(kind):
        found.update(np.packbits(column.fill_null(False).to_numpy(zero_copy_only=False)).tobytes())
    elif pa.types.is_primitive(kind):
        found.update(column.drop_null().view(WIDTHS[kind.bit_width]).to_numpy().tobytes())
    else:
        text = column.drop_null()
        if not (pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)):
            text = text.cast(pa.large_binary() if pa.types.is_binary(kind) else pa.large_string())
        _feed(found, pc.binary_length(text))
        offsets = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1] if len(text) else [0, 0]
        if offsets[-1] > offsets[0]:
            found.update(memoryview(text.buffers()[2])[offsets[0] : offsets[-1]])


EXTENT = pa.schema([("start", pa.int64()), ("count", pa.int64())])
"""What every row of a listing of extents says: its first pool row, and how many it has."""


def row_names(first: int, count: int) -> pa.Array:
    """Return the ids of `count` rows that nothing else names."""
    return pa.array(np.arange(first, first + count)).cast(pa.string())


def take(table: pa.Table, at: Ints) -> pa.Table:
    """Return some rows of a table, by ascending place; neighbours are a view."""
    if len(at) and at[-1] - at[0] + 1 == len(at):
        return table.slice(int(at[0]), len(at))
    return table.take(pa.array(at))


def pieces(listing: Listing, rows: Ints) -> Iterator[tuple[Ints, pa.Table]]:
    """Yield (pool rows, their rows of the listing), small enough to be Python objects, of a listing with a row an image.

    `rows` ascend; only the batches that hold them are read.
    """
    batches = rows // LISTING_ROWS
    for index in np.unique(batches).tolist():
        mine, batch = rows[batches == index], listing.read(index * LISTING_ROWS, (index + 1) * LISTING_ROWS)
        for start in range(0, len(mine), SLICE_ROWS):
            some = mine[start : start + SLICE_ROWS]
            yield some, take(batch, some - index * LISTING_ROWS)


def extents(listing: Listing, rows: Ints) -> Iterator[tuple[dict[str, Any], Ints]]:
    """Yield (extent, places in it) for the extents of a container that hold ascending pool rows, each extent once.

    `extent` is a row of the listing, which has `start` and `count`.
    """
    at, index = 0, 0
    while at < len(rows):
        starts = range(listing.num_rows)
        index = bisect.bisect_right(starts, rows[at], index, key=lambda i: listing.read(i, i + 1)["start"][0].as_py()) - 1
        extent = listing.read(index, index + 1).to_pylist()[0]
        stop = int(np.searchsorted(rows, extent["start"] + extent["count"]))
        yield extent, rows[at:stop] - extent["start"]
        at = stop
