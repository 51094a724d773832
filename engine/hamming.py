"""Pairs of 64-bit hashes that differ in few bits, without comparing all with all.

Multi-index hashing (Norouzi et al., CVPR 2012): a hash is cut into four bands of 16 bits. Two hashes that differ in r bits
differ in at most r // 4 bits of some band, so looking up every value that near a band's own finds all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from engine.arrays import Ints

Hashes = npt.NDArray[np.uint64]
Words = npt.NDArray[np.uint16]

MOST_BITS = 15
"""The largest radius: beyond it a band has so many neighbours that looking them up takes longer than comparing all."""
BANDS = 4
BAND_BITS = 16
CANDIDATES = 1 << 21
"""Pairs that are compared at a time, unless a single query has more."""
QUERIES = 1024
"""Queries that are looked up at a time."""


def bits_apart(a: Hashes, b: Hashes) -> Ints:
    """Return in how many bits the hashes of each pair differ."""
    return np.asarray(np.bitwise_count(a ^ b), dtype=np.int64)


def near_values(bits: int) -> Words:
    """Return the 16-bit words with at most so many bits set."""
    words = np.arange(1 << BAND_BITS).astype(np.uint16)
    return words[np.bitwise_count(words) <= bits]


def bands_of(hashes: Hashes) -> Words:
    """Return the four bands of each hash, (n, 4): every fourth bit each, as neighbouring frequencies go together."""
    bits = np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
    words = np.packbits(bits.reshape(-1, BAND_BITS, BANDS).transpose(0, 2, 1), axis=2)
    return np.ascontiguousarray(words).view(np.uint16)[:, :, 0]


class HashTable:
    """Hashes (n,) to be searched within `radius` bits, 0 <= radius <= MOST_BITS."""

    def __init__(self, hashes: Hashes, radius: int) -> None:
        self.hashes, self.radius = hashes, radius
        self.flips = near_values(radius // BANDS)
        self.lists = []
        for band in bands_of(hashes).T:
            counts = np.bincount(band, minlength=1 << BAND_BITS)
            self.lists.append((np.argsort(band, kind="stable"), np.concatenate([[0], np.cumsum(counts)])))

    def near(self, queries: Hashes) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Yield (places in `queries`, places in the table, bits apart) of all pairs within the radius, each once.

        Pieces come in the order of the queries, sorted by both places; all pairs of a query are in one piece.
        """
        for first in range(0, len(queries), QUERIES):
            some = queries[first : first + QUERIES]
            found = [self._looked_up(some, band) for band in range(BANDS)]
            total = np.cumsum(sum(counts.sum(axis=1) for _, counts in found))
            start = 0
            while start < len(some):
                room = (total[start - 1] if start else 0) + CANDIDATES
                stop = max(start + 1, int(np.searchsorted(total, room, side="right")))
                i, j, bits = self._compared(some, [(a[start:stop], c[start:stop]) for a, c in found], start)
                yield i + first, j, bits
                start = stop

    def _looked_up(self, queries: Hashes, band: int) -> tuple[Ints, Ints]:
        """Return where in a band's list the candidates of each query and flip begin, and how many they are, (q, flips)."""
        wanted = bands_of(queries)[:, band, None] ^ self.flips
        starts = self.lists[band][1]
        return starts[wanted], starts[wanted.astype(np.int64) + 1] - starts[wanted]

    def _compared(self, queries: Hashes, found: list[tuple[Ints, Ints]], first: int) -> tuple[Ints, Ints, Ints]:
        """Return the pairs within the radius among the candidates of the queries from `first` on."""
        keys = []
        for (order, _), (begins, counts) in zip(self.lists, found, strict=True):
            per_query = counts.sum(axis=1)
            flat, ends = counts.reshape(-1), np.cumsum(counts.reshape(-1))
            at = np.arange(ends[-1]) + np.repeat(begins.reshape(-1) - (ends - flat), flat)
            i, j = np.repeat(np.arange(len(counts)) + first, per_query), order[at]
            near = np.bitwise_count(queries[i] ^ self.hashes[j]) <= self.radius
            keys.append(i[near] * len(self.hashes) + j[near])
        i, j = np.divmod(np.unique(np.concatenate(keys)), max(1, len(self.hashes)))
        return i, j, bits_apart(queries[i], self.hashes[j])
