"""Most similar vectors while the vectors move a little: a row need only be compared with those that came close.

Now and then a block compares every row with every vector, and keeps for each row a short list: the vectors whose product
with it is within `reach` of the best. Until then no other vector's product can rise by more than |x| times the longest
way that a vector has gone since. So as long as the best of a row's list stays above that, it is the best of all. Reach and
the length of lists decide nothing but the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block
from engine.canonical import canonical_dot, rows_at
from engine.nearest import SLACK, TILE_ELEMENTS, most_similar, most_similar_index, negative_dot, settle
from engine.products import listed_products, score_error, scores

FEWEST = 64
"""Vectors below which comparing with all of them takes no longer."""
LONGEST = 32
"""Vectors on a row's list, on average over a tile, beyond which the block halves its reach and does without lists."""
OPEN_SHARE = 0.15
"""Share of a block's rows, not settled by their lists, at which all of them are compared with every vector again."""


@dataclass(frozen=True)
class Shortlists:
    """A block's lists: row i's are the vectors `columns[starts[i]:starts[i + 1]]`, one at least.

    `vectors` (k, d) are those that made them; no other vector's product with row i was above `ceiling[i]`.
    """

    vectors: torch.Tensor
    starts: Ints
    columns: Ints
    ceiling: Floats


def _best_listed(
    x: torch.Tensor, vectors: torch.Tensor, starts: Ints, columns: Ints, values: npt.NDArray[np.float32], error: Floats
) -> tuple[Ints, Floats]:
    """Return the listed vector of largest product with each row, settled, and a lower bound on that product, (r,).

    `values` (p,) are the products of the pairs, off by `error` (r,) at most.
    """
    best = np.maximum.reduceat(values, starts[:-1]).astype(np.float64)
    floor = np.repeat((best - 2.0002 * error).astype(np.float32), np.diff(starts))
    at = np.flatnonzero(values >= np.nextafter(floor, np.float32(-np.inf)))
    row, column = np.searchsorted(starts, at, side="right") - 1, columns[at]
    first = np.flatnonzero(np.diff(row, prepend=-1))
    index = column[first]
    contested = np.diff(np.append(first, len(row))) > 1
    if contested.any():
        pairs = contested[row]
        index[contested] = settle(x, vectors, row[pairs], column[pairs], negative_dot)
    return index, best - 1.0001 * error


def _compare_with_all(block: Block, vectors: torch.Tensor, reach: float) -> Ints:
    """Return every row's most similar vector, (r,), and make the block's lists, if they are short enough."""
    x, k = block.x, len(vectors)
    error = score_error(x.shape[1], block.norms, float(SLACK * vectors.double().norm(dim=1).max()))
    depth = (reach * block.state.get("reach", 1.0) + 4 * error).astype(np.float32)
    step = min(len(x), max(64, TILE_ELEMENTS // k)) or 1
    tile, zero = x.new_empty((step, k)), x.new_zeros(k)
    counts, columns, values, ceiling = np.empty(len(x), dtype=np.int64), [], [], np.empty(len(x))
    for start in range(0, len(x), step):
        part = slice(start, min(start + step, len(x)))
        score = scores(zero, x[part], vectors, out=tile[: len(x) - start]).numpy()
        floor = score.min(axis=1) + depth[part]
        near = np.flatnonzero(score <= floor[:, None])
        if len(near) > LONGEST * len(floor):
            block.state.pop("shortlists", None)
            block.state["reach"] = 0.5 * block.state.get("reach", 1.0)
            return most_similar_index(x, vectors, block.norms)
        row, column = np.divmod(near, k)
        counts[part], ceiling[part] = np.bincount(row, minlength=len(floor)), error[part] - floor
        columns.append(column)
        values.append(-score.reshape(-1)[near])
    starts, listed = np.append(0, np.cumsum(counts)), np.concatenate(columns)
    block.state["shortlists"] = Shortlists(vectors.clone(), starts, listed, ceiling)
    return _best_listed(x, vectors, starts, listed, np.concatenate(values), error)[0]


def _compare_with_listed(block: Block, vectors: torch.Tensor, lists: Shortlists, reach: float) -> Ints:
    """Return every row's most similar vector, (r,), from its list where that settles it."""
    x = block.x
    error = score_error(x.shape[1], block.norms, float(SLACK * vectors.double().norm(dim=1).max()))
    way = SLACK * float((vectors.double() - lists.vectors.double()).norm(dim=1).max())
    values = listed_products(x, vectors, lists.starts, lists.columns)
    index, least = _best_listed(x, vectors, lists.starts, lists.columns, values, error)
    left = np.flatnonzero(least <= lists.ceiling + block.norms * way)
    if len(left) > OPEN_SHARE * len(x):
        return _compare_with_all(block, vectors, reach)
    index[left] = most_similar_index(rows_at(x, left), vectors, block.norms[left])
    return index


def follow(block: Block, vectors: torch.Tensor, reach: float) -> tuple[Ints, Floats]:
    """Return `most_similar` of a block's rows and the vectors (k, d), with lists from calls before; the same bits.

    `reach` should be a few times the way that a vector goes from one call to the next; 0 makes no lists. They are of use
    on a CPU alone.
    """
    if reach == 0 or len(vectors) < FEWEST or block.x.is_cuda or len(block.rows) == 0:
        return most_similar(block.x, vectors, block.norms)
    lists = block.state.get("shortlists")
    if lists is None or len(lists.vectors) != len(vectors):
        index = _compare_with_all(block, vectors, reach)
    else:
        index = _compare_with_listed(block, vectors, lists, reach)
    return index, canonical_dot(block.x, np.arange(len(index), dtype=np.int64), vectors, index)
