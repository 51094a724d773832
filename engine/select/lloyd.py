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

from engine.arrays import Bools, Ints
from engine.blocks import Block, Ranked, among, fixed_point_scale, fixed_point_sums, merge_smallest, smallest, vector_scale
from engine.canonical import canonical_sqdist
from engine.nearest import Centres, nearest_sqdist
from engine.select.bounds import NO_GAPS, Bounded, Motion, count_gaps, plan
from engine.select.nearby import Approximation, assign_near, neighbors_of
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


@dataclass(frozen=True)
class Since:
    """What the blocks know since a step before: how centres moved, exactly; or which are near each, and which moved (k,)."""

    motion: Motion | None = None
    near: tuple[Ints, Bools] | None = None


AFRESH = Since()
"""Nothing is known, or of other centres."""


def assign(block: Block, centres: Centres, since: Since) -> Ints:
    """Give each row its nearest centre, (r,), of those near its own one where approximate, and keep it in the block."""
    if since.near is not None and "cluster" in block.state:
        return assign_near(block, centres, *since.near)
    side = Bounded(block, centres)
    found = side.fresh() if since.motion is None or "lower" not in block.state else side.after(since.motion)
    block.state["cluster"] = found
    return found


def _first(block: Block, centres: Centres, scale: float, longest: float) -> Delta:
    """Give each row its first centre, which D^2 seeding may have found already; return all clusters' sums."""
    if block.state.pop("seeded", 0) != len(centres.column):
        assign(block, centres, AFRESH)
    new = block.state["cluster"]
    touched, place = np.unique(new, return_inverse=True)
    sums = fixed_point_sums(block.x, np.arange(len(new), dtype=np.int64), place, len(touched), scale)
    return Delta(touched, sums, np.bincount(place), len(new), count_gaps(block, longest))


def _next(block: Block, centres: Centres, scale: float, longest: float, since: Since) -> Delta:
    """Give each row its nearest centre; return what the moves add to and take from the clusters."""
    old = block.state["cluster"]
    new = assign(block, centres, since)
    rows = np.flatnonzero(new != old)
    touched, place = np.unique(np.concatenate([new[rows], old[rows]]), return_inverse=True)
    came, went = place[: len(rows)], place[len(rows) :]
    sums = fixed_point_sums(block.x, rows, came, len(touched), scale, went)
    counts = np.bincount(came, minlength=len(touched)) - np.bincount(went, minlength=len(touched))
    gaps = NO_GAPS if since.near else count_gaps(block, longest)
    return Delta(touched, sums, counts, len(rows), gaps)


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
    ok = block.eligible & ~among(block.rows, taken)
    _, sqdist = nearest_sqdist(block.x, torch.tensor(centres), block.norms)
    return smallest(-sqdist[ok], block.rows[ok], m)


def _farthest_from_own(block: Block, centres: Centres, m: int) -> Ranked:
    """Return `_farthest` for the centres that the block's rows were assigned to last."""
    every = np.arange(len(block.rows), dtype=np.int64)
    own = centres.column[block.state["cluster"]]
    sqdist = canonical_sqdist(block.x, every, centres.c.to(block.x.device), own)
    return smallest(-sqdist[block.eligible], block.rows[block.eligible], m)


def farthest_rows(shards: Shards, centres: Matrix, taken: Ints, m: int) -> Ranked:
    """Return the m eligible rows farthest from their nearest centre, over the whole pool."""
    ranked: Ranked = shards.map(_farthest, centres, np.sort(taken), m, combine=partial(merge_smallest, m))
    return ranked


@dataclass(frozen=True)
class LloydStep:
    """A Lloyd step, numbered from 1: rows that changed cluster, the centres after it (k, d).

    `inertia` is that of the clusters as they are, around their new means. A last assignment goes on from the blocks with
    `since`.
    """

    number: int
    moved: int
    inertia: float
    centres: Matrix
    since: Since


def _sum_of_squares(block: Block, scale: float) -> int:
    return int(np.rint(block.norms * block.norms * scale).astype(np.int64).sum())


class _Clusters:
    """The driver's side: every cluster's sum (k, d) and count (k,), and the pool's sum of squares."""

    def __init__(self, shards: Shards, k: int, largest: float) -> None:
        self.shards, self.scale = shards, vector_scale(shards.n, largest)
        self.longest = largest * float(np.sqrt(shards.d))
        square_scale = fixed_point_scale(shards.n, self.longest * self.longest)
        self.squares = sum(shards.map(_sum_of_squares, square_scale)) / square_scale
        self.sums, self.counts = np.zeros((k, shards.d), dtype=np.int64), np.zeros(k, dtype=np.int64)

    def change(self, delta: Delta, centres: Matrix) -> tuple[Matrix, float]:
        """Apply what a step changed; return the new centres and the inertia of the clusters around their means."""
        self.sums[delta.touched] += delta.sums
        self.counts[delta.touched] += delta.counts
        full, empty = self.counts > 0, np.flatnonzero(self.counts == 0)
        means = self.sums[full] / self.scale / self.counts[full, None]
        after = centres.copy()
        after[full] = means.astype(np.float32)
        if len(empty):
            given = Centres.of(torch.tensor(centres)), len(empty)
            negated, rows = self.shards.map(_farthest_from_own, *given, combine=partial(merge_smallest, len(empty)))
            rows = rows[negated < 0]
            after[empty[: len(rows)]] = self.shards.take(rows).numpy()
        return after, max(0.0, self.squares - float((self.counts[full] * (means * means).sum(axis=1)).sum()))


def lloyd(
    shards: Shards, centres: Matrix, iterations: int, largest: float, approximation: Approximation | None = None
) -> Iterator[LloydStep]:
    """Yield Lloyd steps; ends once an exact step moves nothing.

    `largest` is max |x| over the pool. An empty cluster starts again at the eligible row farthest from its own
    centre. With an approximation the first step and every `exact_every`-th after it are exact.
    """
    clusters = _Clusters(shards, len(centres), largest)
    since, near = AFRESH, None
    for step in range(1, iterations + 1):
        exact = approximation is None or near is None or (step - 1) % approximation.exact_every == 0
        given = (Centres.of(torch.tensor(centres)), clusters.scale, clusters.longest)
        delta: Delta
        if step == 1:
            delta = shards.map(_first, *given, combine=_add)
        else:
            delta = shards.map(_next, *given, AFRESH if approximation and exact else since, combine=_add)
        if delta.moved == 0 and exact:
            return
        before, (centres, inertia) = centres, clusters.change(delta, centres)
        if approximation is None:
            motion = plan(torch.from_numpy(before), torch.from_numpy(centres), delta.gaps, clusters.longest)
            since = Since(motion=motion)
        else:
            if exact or not delta.moved:
                near = neighbors_of(torch.tensor(centres), approximation.neighbors) if delta.moved else None
            since = AFRESH if near is None else Since(near=(near, (before != centres).any(axis=1)))
        yield LloydStep(step, delta.moved, inertia, centres, since)
