"""The nearest unlabelled images of some picks: what a label may also speak for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.arrays import Floats, Ints
from engine.blocks import Block
from engine.canonical import rows_at
from engine.nearest import Lists, merge_lists, top_similar
from engine.shards import Shards, prepare


def _lists(block: Block, queries: npt.NDArray[np.float32], m: int) -> Lists:
    """Return for each query (q, d) the block's m eligible rows of largest similarity, as `top_similar` does."""
    at = np.flatnonzero(block.eligible)
    return top_similar(rows_at(block.x, at), block.rows[at], block.x.new_tensor(queries), m, block.norms[at])


def nearest_unlabelled(shards: Shards, rows: Ints, labelled: Ints, m: int) -> tuple[Ints, Floats]:
    """Return the m nearest unlabelled pool rows of each of some rows (q,), (q, m) nearest first, and their L2 distances.

    Vectors are normalised, one an image. Where fewer are left, lists end in -1 with infinity.
    """
    prepare(shards, labelled)
    similarity, found = shards.map(_lists, shards.take(rows).numpy(), m, combine=merge_lists)
    return found, np.sqrt(np.maximum(0.0, 2 - 2 * similarity))
