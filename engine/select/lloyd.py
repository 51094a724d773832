"""Lloyd steps on the whole pool: exact, in integers, and cheaper as centres settle.

Nearest centres are canonical and cluster sums are fixed point, so centres are the same bits whatever the shards. Only
rows that change cluster move sums, so a cluster whose members stay keeps its centre to the last bit. A row keeps a
lower bound on its distance to every centre but its own; it is compared again with the centres that moved far, and with
all of them only where the bound no longer separates its own centre from the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Bools, Floats, Ints
from engine.blocks import Block, Ranked, fixed_point_scale, fixed_point_sums, merge_smallest, smallest
from engine.canonical import canonical_sqdist
from engine.nearest import distance_to_others, nearest, nearest_and_bound, nearest_sqdist
from engine.shards import Shards

Matrix = npt.NDArray[np.float32]

BOUNDED_FROM = 256
"""Centres from which bounds are kept: below, one product with all of them costs less than the bounds do."""
MOSTLY_STILL = 0.6
FASTEST = 0.25
SLACK = 1 + 1e-9
"""Widens every bound by far more than float64 rounds."""


def largest_entry(block: Block) -> float:
    """Return max |x| over the block, 0 where it has no rows."""
    return float(block.x.abs().max()) if block.x.numel() else 0.0


@dataclass(frozen=True)
class Delta:
    """What one Lloyd step changes in the clusters it touches (t,): fixed-point sums (t, d) and counts (t,), int64."""

    touched: Ints
    sums: npt.NDArray[np.int64]
    counts: Ints
    moved: int


@dataclass(frozen=True)
class Motion:
    """How far centres moved: those beyond `rest` by name, the others at most `rest`."""

    fast: Ints
    rest: float


def _motion(before: Matrix, after: Matrix) -> Motion | None:
    """Return which centres each row must be compared with again; None where bounds are not worth keeping."""
    k = len(before)
    if k < BOUNDED_FROM:
        return None
    every = np.arange(k, dtype=np.int64)
    moves = SLACK * np.sqrt(canonical_sqdist(torch.from_numpy(before), every, torch.from_numpy(after), every))
    changed = np.flatnonzero(moves > 0)
    if len(changed) <= MOSTLY_STILL * k:
        return Motion(changed, 0.0)
    order = np.argsort(-moves, kind="stable")
    m = int(FASTEST * k)
    return Motion(np.sort(order[:m]), float(moves[order[m]]))


def _settled(block: Block, centres: torch.Tensor, motion: Motion) -> tuple[Bools, Floats]:
    """Return which rows surely keep their centre, and a bound on each one's distance to the other centres."""
    own, x = block.state["cluster"], block.x
    rows = np.arange(len(own), dtype=np.int64)
    mine = SLACK * np.sqrt(canonical_sqdist(x, rows, centres, own))
    bound = block.state["others"] - motion.rest
    keeps = mine < bound
    rows = np.flatnonzero(keeps)
    if len(motion.fast) and len(rows):
        fast = centres[torch.from_numpy(motion.fast)]
        place = np.searchsorted(motion.fast, own[rows])
        place[place == len(motion.fast)] = 0
        place = np.where(motion.fast[place] == own[rows], place, -1)
        part = x if len(rows) == len(own) else x[torch.from_numpy(rows)]
        bound[rows] = np.minimum(bound[rows], distance_to_others(part, fast, block.norms[rows], place))
        keeps = mine < bound
    return keeps, bound


def _bounded(block: Block, centres: torch.Tensor, motion: Motion | None) -> Ints:
    """Return every row's nearest centre, and leave in the block a bound on its distance to the others."""
    if motion is None or "others" not in block.state:
        every, block.state["others"] = nearest_and_bound(block.x, centres, block.norms)
        return every
    keeps, bound = _settled(block, centres, motion)
    again = np.flatnonzero(~keeps)
    index: Ints = block.state["cluster"].copy()
    if len(again):
        index[again], bound[again] = nearest_and_bound(block.x[torch.from_numpy(again)], centres, block.norms[again])
    block.state["others"] = bound
    return index


def _assign(block: Block, centres: Matrix, scale: float, fresh: bool, motion: Motion | None) -> Delta:
    """Give each row its nearest centre; return what the moves add to and take from the clusters."""
    if fresh:
        block.state.pop("others", None)
    old = None if fresh else block.state["cluster"]
    here = torch.tensor(centres)
    new = _bounded(block, here, motion) if len(centres) >= BOUNDED_FROM else nearest(block.x, here, block.norms)
    block.state["cluster"] = new
    if old is None:
        touched, place = np.unique(new, return_inverse=True)
        rows = np.arange(len(new), dtype=np.int64)
        return Delta(touched, fixed_point_sums(block.x, rows, place, len(touched), scale), np.bincount(place), len(new))
    rows = np.flatnonzero(new != old)
    touched, place = np.unique(np.concatenate([new[rows], old[rows]]), return_inverse=True)
    came, went = place[: len(rows)], place[len(rows) :]
    t = len(touched)
    sums = fixed_point_sums(block.x, rows, came, t, scale) - fixed_point_sums(block.x, rows, went, t, scale)
    return Delta(touched, sums, np.bincount(came, minlength=t) - np.bincount(went, minlength=t), len(rows))


def _add(a: Delta, b: Delta) -> Delta:
    touched = np.union1d(a.touched, b.touched)
    sums = np.zeros((len(touched), a.sums.shape[1]), dtype=np.int64)
    counts = np.zeros(len(touched), dtype=np.int64)
    for part in (a, b):
        place = np.searchsorted(touched, part.touched)
        sums[place] += part.sums
        counts[place] += part.counts
    return Delta(touched, sums, counts, a.moved + b.moved)


def _farthest(block: Block, centres: Matrix, taken: Ints, m: int) -> Ranked:
    """Return the m eligible rows farthest from their nearest centre (negated squared distance), `taken` left out."""
    ok = block.eligible & ~np.isin(block.rows, taken)
    _, sqdist = nearest_sqdist(block.x, torch.tensor(centres), block.norms)
    return smallest(-sqdist[ok], block.rows[ok], m)


def farthest_rows(shards: Shards, centres: Matrix, taken: Ints, m: int) -> Ranked:
    """Return the m eligible rows farthest from their nearest centre, over the whole pool."""
    ranked: Ranked = shards.map(_farthest, centres, taken, m, combine=partial(merge_smallest, m))
    return ranked


def lloyd(shards: Shards, centres: Matrix, iterations: int, largest: float) -> Iterator[tuple[int, int, Matrix]]:
    """Yield (step, rows moved, centres after it), from 1, for each Lloyd step; ends once a step moves nothing.

    `largest` is max |x| over the pool. An empty cluster starts again at the eligible row farthest from its own
    centre.
    """
    scale = fixed_point_scale(shards.n, largest)
    sums, counts = np.zeros(centres.shape, dtype=np.int64), np.zeros(len(centres), dtype=np.int64)
    motion: Motion | None = None
    for step in range(1, iterations + 1):
        delta: Delta = shards.map(_assign, centres, scale, step == 1, motion, combine=_add)
        if delta.moved == 0:
            return
        sums[delta.touched] += delta.sums
        counts[delta.touched] += delta.counts
        full, empty = counts > 0, np.flatnonzero(counts == 0)
        after = centres.copy()
        after[full] = (sums[full] / scale / counts[full, None]).astype(np.float32)
        if len(empty):
            negated, rows = farthest_rows(shards, centres, np.empty(0, dtype=np.int64), len(empty))
            rows = rows[negated < 0]
            after[empty[: len(rows)]] = shards.take(rows).numpy()
        motion = _motion(centres, after)
        centres = after
        yield step, delta.moved, centres
