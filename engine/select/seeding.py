"""D^2 seeding (k-means++, Arthur & Vassilvitskii 2007) in a few round trips, with the exact distribution.

D only shrinks as centres are added, so a stale D^2 is an upper bound: candidates are drawn independently from the
stale distribution and accepted with probability (current D^2) / (stale D^2). The accepted sequence is distributed
exactly as draws made one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block, Ranked, among, merge_smallest, smallest
from engine.canonical import canonical_sqdist, pairwise_sqdist
from engine.draws import random_keys, random_uniform
from engine.nearest import SLACK, Centres, nearer
from engine.shards import Shards

CANDIDATES = 1024
"""Vectors drawn in a round."""
Draw = Callable[[Block, Ints, Floats], tuple[Ints, Ints, Floats]]
"""(block, owner, targets) -> slots, what the vectors are known by, stale squared distances of the draws that fell there."""
BLOCK_DRAW, ACCEPT_DRAW, FIRST_DRAW = 1, 2, 3


def _first_key(block: Block, seed: int, step: tuple[int, ...], m: int, taken: Ints) -> Ranked:
    rows = block.rows[~among(block.rows, taken)]
    return smallest(random_keys(seed, step, rows), rows, m)


def random_rows(shards: Shards, seed: int, step: tuple[int, ...], m: int, taken: Ints) -> Ints:
    """Return the first m rows of a seeded permutation of all rows but `taken`, eligible or not."""
    merged = shards.map(_first_key, seed, (*step, FIRST_DRAW), m, np.sort(taken), combine=partial(merge_smallest, m))
    return np.asarray(merged[1], dtype=np.int64)


def _mass(block: Block, centres: Centres, before: int) -> float:
    """Lower D^2 by new centres, the first of them number `before`; return the block's mass.

    Keeps in the block what a first Lloyd step needs: each row's nearest centre so far, and bounds on its distance to
    that one and to the others.
    """
    rows, state = len(block.rows), block.state
    if before == 0:
        state["d2"], state["cluster"], state["lower"] = np.full(rows, np.inf), np.zeros(rows, np.int64), np.full(rows, np.inf)
    if rows == 0:
        state["upper"], state["seeded"] = np.empty(0), before + len(centres.column)
        return 0.0
    new = nearer(block.x, centres, block.norms, state["d2"])
    least, passed = new.least, np.sqrt(state["d2"][new.rows]) / SLACK
    least[new.rows] = np.minimum(passed, new.others[new.rows])
    np.minimum(state["lower"], least, out=state["lower"])
    state["cluster"][new.rows], state["d2"][new.rows] = before + new.index, new.sqdist
    state["upper"], state["seeded"] = SLACK * np.sqrt(state["d2"]), before + len(centres.column)
    state["cumulative"] = np.cumsum(state["d2"])
    return float(state["cumulative"][-1])


def places_drawn(block: Block, owner: Ints, targets: Floats) -> tuple[Ints, Ints]:
    """Return (slots, places in the block) of the draws that fell in this block, by its cumulative mass."""
    slots = np.flatnonzero(owner == block.index)
    if len(slots) == 0:
        return slots, slots
    cumulative = block.state["cumulative"]
    at = np.searchsorted(cumulative, targets[slots], side="right")
    return slots, np.minimum(at, np.searchsorted(cumulative, cumulative[-1], side="left"))


def _draw(block: Block, owner: Ints, targets: Floats) -> tuple[Ints, Ints, Floats]:
    """Return (slots, rows, stale D^2) of the draws that fell in this block."""
    slots, at = places_drawn(block, owner, targets)
    return slots, block.rows[at], block.state["d2"][at]


def _join(a: tuple[Ints, Ints, Floats], b: tuple[Ints, Ints, Floats]) -> tuple[Ints, Ints, Floats]:
    """Combine the draws that fell in two places."""
    if not len(a[0]) or not len(b[0]):
        return a if len(a[0]) else b
    return np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]), np.concatenate([a[2], b[2]])


def drawn(shards: Shards, masses: Floats, draw: Draw, m: int, seed: int, step: tuple[int, ...]) -> tuple[Ints, Floats] | None:
    """Draw m vectors by their share of the mass, each of them independently; None where there is no mass.

    `masses` are the blocks', which keep their cumulative ones. Returns what `draw` says the vectors are known by, and their
    stale squared distances.
    """
    ends = np.cumsum(masses)
    if ends[-1] == 0:
        return None
    targets = random_uniform(seed, step, np.arange(m, dtype=np.int64)) * ends[-1]
    owner = np.minimum(np.searchsorted(ends, targets, side="right"), np.flatnonzero(masses)[-1])
    within = np.maximum(targets - (ends - masses)[owner], 0.0)
    codes, stale = np.empty(m, dtype=np.int64), np.empty(m)
    mine, found, sqdist = shards.map(draw, owner, within, combine=_join)
    codes[mine], stale[mine] = found, sqdist
    return codes, stale


class Walk:
    """The driver's walk through one round's candidates, in order: which are accepted, by what exact distance.

    `pairwise` (m, m) holds squared distances among them, within `error`; `canonical(i, others)` gives the exact ones.
    """

    def __init__(self, pairwise: Floats, error: float, canonical: Callable[[int, Ints], Floats], stale: Floats) -> None:
        self.pairwise, self.error, self.canonical, self.stale = pairwise, error, canonical, stale
        self.current = stale.copy()
        self.accepted: list[int] = []

    def settled(self, slot: int) -> float:
        """Return a candidate's canonical squared distance to what was taken before and is accepted now."""
        others = np.array(self.accepted, dtype=np.int64)
        near = others[self.pairwise[slot, others] <= self.current[slot] + 2 * self.error]
        return min(float(self.stale[slot]), float(self.canonical(slot, near).min(initial=np.inf)))

    def passes(self, slot: int, u: float) -> bool:
        """Return whether the candidate is accepted with u of [0, 1): with probability current / stale, decided exactly."""
        threshold = u * self.stale[slot]
        current = self.current[slot]
        if abs(threshold - current) <= 2 * self.error:
            current = self.settled(slot)
        return bool(threshold < current)

    def accept(self, slot: int) -> None:
        """Accept the candidate: it lowers the others' distances."""
        self.accepted.append(slot)
        np.minimum(self.current, self.pairwise[slot], out=self.current)


def _sqdist(x: torch.Tensor, slot: int, others: Ints) -> Floats:
    return canonical_sqdist(x, np.full(len(others), slot, dtype=np.int64), x, others)


def d2_seeds(shards: Shards, k: int, seed: int, step: tuple[int, ...]) -> tuple[Ints, int]:
    """Return k rows drawn by D^2 sampling over all rows (the first uniformly), and the number of rounds.

    A pure function of (seed, step). The blocks are left with each row's nearest seed, for a first
    Lloyd step. When fewer than k distinct vectors exist, the rest are drawn uniformly.
    """
    picks = random_rows(shards, seed, step, 1, np.empty(0, dtype=np.int64))
    new, rounds = shards.take(picks), 0
    while True:
        masses = np.array(shards.map(_mass, Centres.of(new), len(picks) - len(new)))
        if len(picks) == k:
            return picks, rounds
        candidates = drawn(shards, masses, _draw, CANDIDATES, seed, (*step, BLOCK_DRAW, rounds))
        if candidates is None:
            return np.concatenate([picks, random_rows(shards, seed, step, k - len(picks), picks)]), rounds
        rows, stale = candidates
        x = shards.take(rows)
        walk = Walk(*pairwise_sqdist(x), partial(_sqdist, x), stale)
        for slot, u in enumerate(random_uniform(seed, (*step, ACCEPT_DRAW, rounds), np.arange(CANDIDATES, dtype=np.int64))):
            if len(picks) + len(walk.accepted) == k:
                break
            if walk.passes(slot, float(u)):
                walk.accept(slot)
        new = x[torch.tensor(walk.accepted, dtype=torch.long)]
        picks = np.concatenate([picks, rows[walk.accepted]])
        rounds += 1
