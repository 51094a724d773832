"""`coreset`: k-center greedy (Sener & Savarese 2018; Gonzalez 1985), in batches with a certificate.

Distances to what is picked only ever shrink. So the rows of largest current distance are brought to the driver as
candidates, and `bound` is the largest distance not among them: as long as the best candidate beats it, the picks
made among the candidates alone are exactly those of one-at-a-time greedy over the whole pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch

from engine.arrays import Bools, Floats, Ints
from engine.blocks import Block, Ranked, merge_smallest, smallest
from engine.canonical import canonical_sqdist, pairwise_sqdist
from engine.nearest import Centres, nearer_bounds
from engine.schema import Opt
from engine.select.picking import draw
from engine.shards import Request, Shards, Step, close

LABELED_CHUNK = 4096
"""Rows by which distances are lowered at once where there are many already."""


@dataclass(frozen=True)
class Options:
    """Options of `coreset`."""

    candidates: Annotated[
        int, Opt("Rows brought to the driver a round; changes the time, never the picks.", min=1, max=65536, result=False)
    ] = 1024


class _Minimum:
    """One block's running minimum: bounds on each row's squared distance to what is picked, exact where they are equal.

    Most rows never come to be candidates, so a distance is measured canonically only once it is asked for, or where the
    product can't tell a new centre from the nearest one before: that is column `column` of the centres of round `round`.
    """

    def __init__(self, block: Block) -> None:
        rows = len(block.rows)
        self.open, self.free = block.eligible.copy(), block.offered.copy()
        self.upper, self.lower = np.full(rows, np.inf), np.full(rows, np.inf)
        self.round, self.column = np.zeros(rows, dtype=np.int32), np.zeros(rows, dtype=np.int32)
        self.centres: list[torch.Tensor] = []

    def _measure(self, x: torch.Tensor, rows: Ints) -> None:
        """Make the distances of some rows exact."""
        for number in np.unique(self.round[rows]):
            some = rows[self.round[rows] == number]
            exact = canonical_sqdist(x, some, self.centres[number], self.column[some].astype(np.int64))
            self.upper[some] = self.lower[some] = exact

    def add(self, block: Block, centres: Centres) -> None:
        """Lower the minimum by new centres."""
        self.centres.append(centres.c.to(block.x.device))
        rows, column, lower, upper = nearer_bounds(block.x, centres, block.norms, self.upper)
        closer = upper < self.lower[rows]
        open_question = ~closer & (lower <= self.upper[rows])
        unsure = rows[open_question]
        self._measure(block.x, unsure[self.lower[unsure] < self.upper[unsure]])
        exact = canonical_sqdist(block.x, unsure, self.centres[-1], column[open_question])
        lower[open_question] = upper[open_question] = exact
        closer[open_question] = exact < self.upper[unsure]
        rows = rows[closer]
        self.upper[rows], self.lower[rows] = upper[closer], lower[closer]
        self.round[rows], self.column[rows] = len(self.centres) - 1, column[closer]

    def largest(self, block: Block, among: Bools, m: int) -> Ranked:
        """Return the m rows of largest distance (negated), exactly, the smaller of equally far ones first."""
        at = np.flatnonzero(among)
        while True:
            keys, first = smallest(-self.upper[at], at, m)
            vague = first[self.lower[first] < self.upper[first]]
            if len(vague) == 0:
                return keys, block.rows[first]
            self._measure(block.x, vague)


def _farthest_first(block: Block, centres: Centres, taken: Ints, m: int) -> Ranked:
    """Lower the running minimum by new centres; return the m+1 open rows of largest distance (negated) first."""
    if "minimum" not in block.state:
        block.state["minimum"] = _Minimum(block)
    minimum: _Minimum = block.state["minimum"]
    if len(centres.column) and len(block.rows):
        minimum.add(block, centres)
    minimum.free &= ~np.isin(block.rows, taken)
    minimum.open &= minimum.free & block.eligible
    return minimum.largest(block, minimum.open, m + 1)


def _farthest(block: Block) -> float:
    """Return the largest squared distance of a row that was offered at first, 0 where there is none."""
    minimum: _Minimum = block.state["minimum"]
    negated, _ = minimum.largest(block, minimum.free, 1)
    return -float(negated[0]) if len(negated) else 0.0


class _Candidates:
    """The driver's candidates: approximate distances to decide quickly, canonical ones where that is not enough."""

    def __init__(self, x: torch.Tensor, rows: Ints, sqdist: Floats) -> None:
        self.x, self.rows, self.sqdist = x, rows, sqdist
        self.pairwise, self.error = pairwise_sqdist(x)
        self.current = sqdist.copy()
        self.picked: list[int] = []
        self.gone: list[int] = []

    def _canonical(self, candidate: int) -> float:
        """Return the exact distance of a candidate to everything picked, from the picks that can matter."""
        value = float(self.sqdist[candidate])
        if self.picked:
            picked = np.array(self.picked, dtype=np.int64)
            approximate = self.pairwise[candidate, picked]
            close = picked[approximate <= approximate.min() + 2 * self.error]
            exact = canonical_sqdist(self.x, np.full(len(close), candidate, dtype=np.int64), self.x, close)
            value = min(value, float(exact.min()))
        return value

    def best(self, bound: tuple[float, int]) -> int:
        """Return the farthest open candidate, the smaller row of equal ones; -1 where `bound` (-distance, row) comes first."""
        contenders = np.flatnonzero(self.current >= self.current.max() - 2 * self.error)
        first = int(contenders[0])
        if len(contenders) == 1 and self.current[first] - 2 * self.error > -bound[0]:
            return first
        distance, row, index = min((-self._canonical(int(c)), int(self.rows[c]), int(c)) for c in contenders)
        return index if (distance, row) <= bound else -1

    def pick(self, candidate: int) -> None:
        self.picked.append(candidate)
        np.minimum(self.current, self.pairwise[candidate], out=self.current)
        self.drop(candidate)

    def drop(self, candidate: int) -> None:
        """Leave a candidate out from here on."""
        self.gone.append(candidate)
        self.current[self.gone] = -np.inf

    def gains(self) -> Floats:
        """Return each pick's exact squared distance to everything there before it, in pick order."""
        picked = np.array(self.picked, dtype=np.int64)
        gains = self.sqdist[picked]
        among = np.where(np.tri(len(picked), k=-1, dtype=np.bool_), self.pairwise[np.ix_(picked, picked)], np.inf)
        later, earlier = np.nonzero(among <= np.minimum(among.min(axis=1, initial=np.inf), gains)[:, None] + 2 * self.error)
        np.minimum.at(gains, later, canonical_sqdist(self.x, picked[later], self.x, picked[earlier]))
        return gains


def _greedy(candidates: _Candidates, bound: tuple[float, int], request: Request, before: int) -> None:
    """Pick among the candidates while the best of those that are allowed beats `bound`; `before` picks were made before."""
    closed = 0
    while request.lacking(before + len(candidates.picked)) and len(candidates.picked) + closed < len(candidates.rows):
        index = candidates.best(bound)
        if index < 0:
            return
        if request.ledger.takes(int(candidates.rows[index])):
            candidates.pick(index)
        else:
            candidates.drop(index)
            closed += 1


def coreset(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Repeatedly pick the row farthest (L2) from everything picked or labelled; ties go to the smaller row.

    Starts from the labelled rows, or else from one seeded row. `gain` is a pick's distance to what was there
    before it (empty for the seeded row); the objective is the covering radius. Smaller budgets are prefixes.
    """
    picks: list[int] = request.resume.picks.tolist() if request.resume else []
    gains: list[float] = request.resume.gains.tolist() if request.resume else []
    nothing = np.empty(0, dtype=np.int64)
    if request.budget == 0:
        yield Step(0, 0, nothing, np.empty(0))
        return
    m = options.candidates
    find = partial(shards.map, _farthest_first, combine=partial(merge_smallest, m + 1))
    if not picks and not len(request.labeled):
        picks, gains = draw(shards, request, (), nothing, 1).tolist(), [np.nan]
    there = np.concatenate([request.labeled, np.array(picks, dtype=np.int64)])
    close(shards, request.ledger)
    for start in range(0, len(there), LABELED_CHUNK):
        chunk = there[start : start + LABELED_CHUNK]
        ranked = find(Centres.of(shards.take(chunk)), chunk, m)
    rounds = 1
    while True:
        negated, rows = ranked
        total = request.total(len(picks))
        radius = float(np.sqrt(max(shards.map(_farthest)) if request.ledger.bound else -negated[0] if len(rows) else 0.0))
        yield Step(len(picks), total, np.array(picks, dtype=np.int64), np.array(gains), f"{rounds} rounds", radius)
        if len(picks) == total:
            return
        bound = (float(negated[m]), int(rows[m])) if len(rows) > m else (np.inf, -1)
        candidates = _Candidates(shards.take(rows[:m]), rows[:m], -negated[:m])
        _greedy(candidates, bound, request, len(picks))
        new = rows[candidates.picked]
        picks += new.tolist()
        gains += np.sqrt(candidates.gains()).tolist()
        close(shards, request.ledger)
        ranked = find(Centres.of(candidates.x[torch.tensor(candidates.picked)]), new, m)
        rounds += 1
