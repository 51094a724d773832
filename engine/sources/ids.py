"""Ids must be unique over the whole pool: found out with 8 bytes a row, in memory for small pools, else on disk.

Every id becomes a 64-bit hash, a batch at a time; equal hashes make their ids suspects, and only suspects are compared
as strings, in a second pass. Two different ids of 100 million share a hash about once in thirty pools, which costs that
pass and nothing else.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.schema import InputError

Read = Callable[[], Iterable[pa.Array | pa.ChunkedArray]]
"""Reads the ids of a pool from its first row on, in batches; called once or twice."""

SUSPECTS = 65_536
"""Sorted hashes that are compared at a time."""
CHUNK_ROWS = 8192
RUN_ROWS = 1 << 18
"""Hashes that are sorted in memory at a time: 2 MiB."""


def _keys(length: int) -> npt.NDArray[np.uint64]:
    """Return fixed odd 64-bit factors, one for each place in an id."""
    drawn = np.random.Generator(np.random.PCG64(2600)).integers(0, 1 << 64, length, dtype=np.uint64)
    return np.asarray(drawn | np.uint64(1))


def hashes(ids: pa.Array) -> npt.NDArray[np.uint64]:
    """Return (n,) uint64: the sum over an id's bytes of (byte + 1) times its place's factor, modulo 2^64.

    Multilinear hashing: two ids collide with a chance below 2^-56.
    """
    text = ids.cast(pa.large_string())
    buffers = text.buffers()
    offsets = np.frombuffer(buffers[1], np.int64)[text.offset : text.offset + len(text) + 1]
    low, high = int(offsets[0]), int(offsets[-1])
    if low == high:
        return np.zeros(len(text), np.uint64)
    values = np.frombuffer(buffers[2], np.uint8)[low:high]
    starts = offsets - low
    lengths = np.diff(starts)
    places = np.arange(len(values)) - np.repeat(starts[:-1], lengths)
    terms = _keys(int(lengths.max()))[places]
    terms *= values + np.uint64(1)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    return np.asarray(sums[starts[1:]] - sums[starts[:-1]])


def _chunks(read: Read) -> Iterator[tuple[int, pa.Array]]:
    """Yield (first row, ids) of pieces small enough that what is computed of them is small, too."""
    row = 0
    for batch in read():
        for chunk in batch.chunks if isinstance(batch, pa.ChunkedArray) else [batch]:
            for start in range(0, len(chunk), CHUNK_ROWS):
                piece = chunk.slice(start, CHUNK_ROWS)
                yield row, piece
                row += len(piece)


class _Hashes:
    """The hashes of `num_rows` ids, given in any order and read again sorted, a piece at a time.

    Up to RUN_ROWS stay in memory. More go to a temporary file without a name, which ends with the process: runs of
    RUN_ROWS, each sorted. A piece is what all runs hold of a range of hashes, the ranges so many that a piece has about
    RUN_ROWS: hashes of different ids spread evenly, and a run keeps no more than two of each.
    """

    def __init__(self, num_rows: int) -> None:
        runs = max(1, -(-num_rows // RUN_ROWS))
        bits = (runs - 1).bit_length()
        self._borders = np.arange(1, 1 << bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.empty(0, np.uint64)
        self._file: IO[bytes] | None = None
        self._runs: list[tuple[int, npt.NDArray[np.int64]]] = []
        self._held: list[npt.NDArray[np.uint64]] = []
        self._num_held = self._num_written = 0

    def __enter__(self) -> _Hashes:
        with contextlib.ExitStack() as stack:
            if len(self._borders):
                self._file = stack.enter_context(tempfile.TemporaryFile(prefix="coresift-ids-"))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, some: npt.NDArray[np.uint64]) -> None:
        """Take some hashes."""
        self._held.append(some)
        self._num_held += len(some)
        if self._file is not None and self._num_held >= RUN_ROWS:
            self._write()

    def _sorted(self) -> npt.NDArray[np.uint64]:
        """Return the hashes held, sorted, and hold none."""
        some = np.concatenate([np.empty(0, np.uint64), *self._held])
        self._held, self._num_held = [], 0
        some.sort()
        return some

    def _write(self) -> None:
        assert self._file is not None
        run = self._sorted()
        run = run[np.concatenate([np.ones(min(2, len(run)), bool), run[2:] != run[:-2]])]
        self._file.write(run.data)
        self._runs.append((self._num_written, np.searchsorted(run, self._borders).astype(np.int64)))
        self._num_written += len(run)

    def pieces(self) -> Iterator[npt.NDArray[np.uint64]]:
        """Yield all hashes, ascending, those that are equal in one piece; of some that are there often, not every one."""
        if self._file is None:
            yield self._sorted()
            return
        if self._held:
            self._write()
        ends = [start for start, _ in self._runs[1:]] + [self._num_written]
        for piece in range(len(self._borders) + 1):
            for (start, borders), end in zip(self._runs, ends, strict=True):
                low = start + (int(borders[piece - 1]) if piece else 0)
                high = start + int(borders[piece]) if piece < len(borders) else end
                self._file.seek(8 * low)
                self._held.append(np.frombuffer(self._file.read(8 * (high - low)), np.uint64))
            yield self._sorted()


def _survey(read: Read, found: _Hashes) -> int | None:
    """Give the hashes of all ids to `found`; return the first row without one: what comes after that row is not read."""
    for row, ids in _chunks(read):
        if ids.null_count:
            return row + int(ids.is_null().to_pylist().index(True))
        found.add(hashes(ids))
    return None


def _suspects(found: _Hashes) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield the hashes that occur more than once, sorted, some at a time."""
    for piece in found.pieces():
        for start in range(0, len(piece), SUSPECTS):
            some = piece[start : start + SUSPECTS + 1]
            repeated = np.unique(some[1:][some[1:] == some[:-1]])
            if len(repeated):
                yield repeated


def _repeated(found: _Hashes, read: Read) -> tuple[str, int, int] | None:
    """Return (id, row, row) of an id that occurs twice, or None; `found` has the hashes of what is read."""
    for suspects in _suspects(found):
        seen: dict[str, int] = {}
        for row, ids in _chunks(read):
            for at in np.flatnonzero(np.isin(hashes(ids), suspects)).tolist():
                name = str(ids[at].as_py())
                if name in seen:
                    return name, seen[name], row + at
                seen[name] = row + at
    return None


def check_unique(read: Read, num_rows: int, uri: str) -> None:
    """Raise InputError where an id is missing or occurs twice; it names the row, or the id and both rows."""
    with _Hashes(num_rows) as found:
        missing = _survey(read, found)
        repeated = _repeated(found, read) if missing is None else None
    if missing is not None:
        raise InputError(f"{uri}: row {missing} has no id")
    if repeated is not None:
        name, row, again = repeated
        raise InputError(f"{uri}: ids must differ, and {name!r} is the id of rows {row} and {again}")


def names_rows(read: Read, num_rows: int) -> bool:
    """Return whether what is read could be the ids of a pool: all there, and all different."""
    with _Hashes(num_rows) as found:
        return _survey(read, found) is None and _repeated(found, read) is None
