"""Ids must be unique over the whole pool: found out with 8 bytes a row.

Every id becomes a 64-bit hash, a batch at a time; equal hashes make their ids suspects, and only suspects are compared
as strings, in a second pass. Two different ids of 100 million share a hash about once in thirty pools, which costs that
pass and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.schema import InputError

Read = Callable[[], Iterable[pa.Array | pa.ChunkedArray]]
"""Reads the ids of a pool from its first row on, in batches; called once or twice."""

SUSPECTS = 65_536
"""Sorted hashes that are compared at a time."""
CHUNK_ROWS = 8192


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


def _survey(read: Read, num_rows: int) -> tuple[npt.NDArray[np.uint64], int | None]:
    """Return the hashes of all ids, and the first row without one; what comes after that row is not read."""
    found = np.empty(num_rows, np.uint64)
    for row, ids in _chunks(read):
        if ids.null_count:
            return found, row + ids.is_null().to_pylist().index(True)
        found[row : row + len(ids)] = hashes(ids)
    return found, None


def _suspects(found: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield the hashes that occur more than once, sorted, some at a time; sorts `found` in place."""
    found.sort()
    for start in range(0, len(found), SUSPECTS):
        some = found[start : start + SUSPECTS + 1]
        repeated = np.unique(some[1:][some[1:] == some[:-1]])
        if len(repeated):
            yield repeated


def _repeated(found: npt.NDArray[np.uint64], read: Read) -> tuple[str, int, int] | None:
    """Return (id, row, row) of an id that occurs twice, or None. Sorts `found`, the hashes of what is read, in place."""
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
    found, missing = _survey(read, num_rows)
    if missing is not None:
        raise InputError(f"{uri}: row {missing} has no id")
    repeated = _repeated(found, read)
    if repeated is not None:
        name, row, again = repeated
        raise InputError(f"{uri}: ids must differ, and {name!r} is the id of rows {row} and {again}")


def names_rows(read: Read, num_rows: int) -> bool:
    """Return whether what is read could be the ids of a pool: all there, and all different."""
    found, missing = _survey(read, num_rows)
    return missing is None and _repeated(found, read) is None
