"""Lloyd steps on the whole pool: exact, in integers, and cheaper as centres settle.

Nearest centres are canonical and cluster sums are fixed point, so centres are the same bits whatever the shards. Only
rows that change cluster move sums, so a cluster whose members stay keeps its centre to the last bit; `bounds` spares
rows the comparison with centres that cannot have come nearer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Ints
from engine.blocks import Block, Ranked, fixed_point_scale, fixed_point_sums, merge_smallest, smallest
from engine.nearest import Centres, nearest_sqdist
from engine.select.bounds import Bounded, Motion, plan
from engine.shards import Shards

Matrix = npt.NDArray[np.float32]


def largest_entry(block: Block) -> float:
    """Return max |x| over the block, 0 where it has no rows."""
    return float(block.x.abs().max()) if block.x.numel() else 0.0


@dataclass(frozen=True)
class Delta:
    """What one Lloyd step changes in the clusters it touches (t,): fixed-point sums (t, d) and counts (t,), int64.

    `moved` rows changed cluster; `gaps` counts rows by the gap between their bounds.
    """

    touched: Ints
    sums: npt.NDArray[np.int64]
    counts: Ints
    moved: int
    gaps: Ints


def assign(block: Block, centres: Centres, motion: Motion | None) -> Ints:
    """Give each row its nearest centre, (r,), and keep it in the block with its bounds.

    `motion` is how the centres moved since the block was last asked; None where it was not, or for other centres.
    """
    side = Bounded(block, centres)
    block.state["cluster"] = side.fresh() if motion is None or "lower" not in block.state else side.after(motion)
    found: Ints = block.state["cluster"]
    return found


def _first(block: Block, centres: Centres, scale: float, longest: float) -> Delta:
    """Give each row its first centre, which D^2 seeding may have found already; return all clusters' sums."""
    if block.state.pop("seeded", 0) != len(centres.column):
        assign(block, centres, None)
    new = block.state["cluster"]
    touched, place = np.unique(new, return_inverse=True)
    sums = fixed_point_sums(block.x, np.arange(len(new), dtype=np.int64), place, len(touched), scale)
    return Delta(touched, sums, np.bincount(place), len(new), Bounded(block, centres).gaps(longest))


def _next(block: Block, centres: Centres, scale: float, longest: float, motion: Motion | None) -> Delta:
    """Give each row its nearest centre; return what the moves add to and take from the clusters."""
    old = block.state["cluster"]
    new = assign(block, centres, motion)
    rows = np.flatnonzero(new != old)
    touched, place = np.unique(np.concatenate([new[rows], old[rows]]), return_inverse=True)
    came, went = place[: len(rows)], place[len(rows) :]
    sums = fixed_point_sums(block.x, rows, came, len(touched), scale, went)
    counts = np.bincount(came, minlength=len(touched)) - np.bincount(went, minlength=len(touched))
    return Delta(touched, sums, counts, len(rows), Bounded(block, centres).gaps(longest))


def _add(a: Delta, b: Delta) -> Delta:
    touched = np.union1d(a.touched, b.touched)
    sums = np.zeros((len(touched), a.sums.shape[1]), dtype=np.int64)
    counts = np.zeros(len(touched), dtype=np.int64)
    for part in (a, b):
        place = np.searchsorted(touched, part.touched)
        sums[place] += part.sums
        counts[place] += part.counts
    return Delta(touched, sums, counts, a.moved + b.moved, a.gaps + b.gaps)


def _farthest(block: Block, centres: Matrix, taken: Ints, m: int) -> Ranked:
    """Return the m eligible rows farthest from their nearest centre (negated squared distance), `taken` left out."""
    ok = block.eligible & ~np.isin(block.rows, taken)
    _, sqdist = nearest_sqdist(block.x, torch.tensor(centres), block.norms)
    return smallest(-sqdist[ok], block.rows[ok], m)


def farthest_rows(shards: Shards, centres: Matrix, taken: Ints, m: int) -> Ranked:
    """Return the m eligible rows farthest from their nearest centre, over the whole pool."""
    ranked: Ranked = shards.map(_farthest, centres, taken, m, combine=partial(merge_smallest, m))
    return ranked


@dataclass(frozen=True)
class LloydStep:
    """A Lloyd step, numbered from 1: rows that changed cluster, the centres after it (k, d), and how they moved.

    `inertia` is that of the clusters as they are, around their new means. A next step, or a last assignment, goes on
    from the blocks with `motion`.
    """

    number: int
    moved: int
    inertia: float
    centres: Matrix
    motion: Motion | None


def _sum_of_squares(block: Block, scale: float) -> int:
    return int(np.rint(block.norms * block.norms * scale).astype(np.int64).sum())


def lloyd(shards: Shards, centres: Matrix, iterations: int, largest: float) -> Iterator[LloydStep]:
    """Yield Lloyd steps; ends once a step moves nothing.

    `largest` is max |x| over the pool. An empty cluster starts again at the eligible row farthest from its own
    centre.
    """
    scale, longest = fixed_point_scale(shards.n, largest), largest * np.sqrt(shards.d)
    square_scale = fixed_point_scale(shards.n, longest * longest)
    squares = sum(shards.map(_sum_of_squares, square_scale)) / square_scale
    sums, counts = np.zeros(centres.shape, dtype=np.int64), np.zeros(len(centres), dtype=np.int64)
    motion: Motion | None = None
    for step in range(1, iterations + 1):
        ready = Centres.of(torch.tensor(centres))
        given = (ready, scale, longest)
        delta: Delta
        delta = shards.map(_first, *given, combine=_add) if step == 1 else shards.map(_next, *given, motion, combine=_add)
        if delta.moved == 0:
            return
        sums[delta.touched] += delta.sums
        counts[delta.touched] += delta.counts
        full, empty = counts > 0, np.flatnonzero(counts == 0)
        means = sums[full] / scale / counts[full, None]
        after = centres.copy()
        after[full] = means.astype(np.float32)
        if len(empty):
            negated, rows = farthest_rows(shards, centres, np.empty(0, dtype=np.int64), len(empty))
            rows = rows[negated < 0]
            after[empty[: len(rows)]] = shards.take(rows).numpy()
        motion = plan(torch.from_numpy(centres), torch.from_numpy(after), delta.gaps, longest)
        centres = after
        inertia = max(0.0, squares - float((counts[full] * (means * means).sum(axis=1)).sum()))
        yield LloydStep(step, delta.moved, inertia, centres, motion)
