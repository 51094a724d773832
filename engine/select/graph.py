"""The k-nearest-neighbour graph of the pool by cosine similarity: exact, a few thousand rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from engine.arrays import Floats, Ints
from engine.blocks import Block
from engine.canonical import canonical_norms, normalize
from engine.nearest import Lists, merge_lists, top_similar
from engine.select.lloyd import Matrix
from engine.shards import Shards

QUERY_ROWS = 4096
"""Rows whose neighbours are sought at once: their vectors go to every block, their lists come to the driver."""


def _lists(block: Block, queries: Matrix, m: int) -> Lists:
    """Return for each query (q, d) the block's m rows of largest cosine similarity, in order."""
    x = normalize(block.x, block.norms)
    return top_similar(x, block.rows, x.new_tensor(queries), m, canonical_norms(x))


def neighbor_lists(shards: Shards, rows: Ints, k: int) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Yield (rows (q,), neighbours (q, k), similarities (q, k)) for all the rows asked, QUERY_ROWS at a time.

    The neighbours of a row are the k other rows of the pool of largest cosine similarity, in order; equal ones go to the
    smaller row. Similarities are canonical dot products of the vectors divided by their norms, float64; a vector of
    zeros has 0 with all. Where the pool has fewer than k other rows, lists end in -1 with -infinity.

    n^2 d multiplications in all, as tiles; about k / 4,000 of the pairs are measured canonically.
    """
    for start in range(0, len(rows), QUERY_ROWS):
        part = rows[start : start + QUERY_ROWS]
        queries = normalize(shards.take(part)).numpy()
        values, found = shards.map(_lists, queries, k + 1, combine=merge_lists)
        own = found == part[:, None]
        own[~own.any(axis=1), k] = True
        yield part, found[~own].reshape(len(part), k), values[~own].reshape(len(part), k)
