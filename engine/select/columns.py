"""Lazy greedy on sparse columns: picks that add most to the sum over rows of the best value that a pick has for each.

The blocks hold edges: pool row `to` is worth `value` to a row of the block. What a row would add to the sum only ever
shrinks (the sum is submodular), so what it was worth some picks ago is a bound on what it is worth now (Minoux 1978).
The candidates of largest bound come to the driver with their columns, the edges into them. There greedy goes on among
them alone, as long as the best beats every bound left behind: the picks of one-at-a-time greedy, in a few rounds. All
values are whole numbers, so sums are exact.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.arrays import Bools, Ints
from engine.blocks import Block, smallest
from engine.shards import Request, Shards

CANDIDATES, COLUMN_ENTRIES = 1024, 1 << 20
"""Rows brought to the driver in a round, and edges into them (or one column, if that has more)."""


@dataclass(frozen=True)
class Edges:
    """Edges of a block's rows, sorted by `to`: pool rows `to`, places in the block `owner`, whole numbers `value` > 0."""

    to: Ints
    owner: npt.NDArray[np.int32]
    value: Ints

    def into(self, rows: Ints) -> tuple[Ints, Ints]:
        """Return (which of `rows`, which edge) for every edge into one of them."""
        low, high = np.searchsorted(self.to, rows, "left"), np.searchsorted(self.to, rows, "right")
        which = np.repeat(np.arange(len(rows), dtype=np.int64), high - low)
        return which, np.arange(len(which), dtype=np.int64) + np.repeat(high - np.cumsum(high - low), high - low)


def add_edges(block: Block, to: Ints, owner: Ints, value: Ints) -> None:
    """Keep edges of this block; those of value 0 are left out."""
    real = value > 0
    block.state.setdefault("lists", []).append(Edges(to[real], owner[real].astype(np.int32), value[real]))


def settle(block: Block, covered: Ints) -> None:
    """Sort all edges kept by where they lead; `covered` (r,) is the best value that each row has already."""
    lists: list[Edges] = block.state.pop("lists", [])
    to = np.concatenate([edges.to for edges in lists]) if lists else np.empty(0, dtype=np.int64)
    order = np.argsort(to, kind="stable")
    owner = np.concatenate([edges.owner for edges in lists])[order] if lists else np.empty(0, dtype=np.int32)
    value = np.concatenate([edges.value for edges in lists])[order] if lists else to
    block.state["edges"], block.state["best"] = Edges(to[order], owner, value), covered


def _cover(block: Block, picks: Ints) -> None:
    edges: Edges = block.state["edges"]
    _, at = edges.into(picks)
    np.maximum.at(block.state["best"], edges.owner[at], edges.value[at])


def _worth(block: Block, picks: Ints) -> tuple[Ints, Ints, Ints, int]:
    """Cover by picks; return (rows, what each would add here, edges into each), and the sum of the best values here."""
    _cover(block, picks)
    edges, best = block.state["edges"], block.state["best"]
    rows, first = np.unique(edges.to, return_index=True)
    added = np.maximum(edges.value - best[edges.owner], 0)
    sums = np.add.reduceat(added, first) if len(first) else first
    return rows, sums, np.diff(np.append(first, len(edges.to))), int(best.sum())


Column = tuple[Ints, Ints, Ints, Ints]
"""(which candidate, pool row, the candidate's value for it, its best value already) for some edges."""


def _columns(block: Block, picks: Ints, candidates: Ints) -> Column:
    """Cover by new picks; return the edges into the candidates that can still add something."""
    _cover(block, picks)
    edges, best = block.state["edges"], block.state["best"]
    which, at = edges.into(candidates)
    owner = edges.owner[at]
    real = edges.value[at] > best[owner]
    return which[real], block.rows[owner[real]], edges.value[at[real]], best[owner[real]]


class _Batch:
    """Candidates and their columns on the driver."""

    def __init__(self, columns: list[Column], m: int) -> None:
        which, rows, value, best = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        order = np.argsort(which, kind="stable")
        distinct, self.at = np.unique(rows[order], return_inverse=True)
        self.value, self.best = value[order], np.zeros(len(distinct), dtype=np.int64)
        self.best[self.at] = best[order]
        self.ends = np.searchsorted(which[order], np.arange(m + 1))

    def _part(self, candidate: int) -> slice:
        return slice(self.ends[candidate], self.ends[candidate + 1])

    def gain(self, candidate: int) -> int:
        part = self._part(candidate)
        return int(np.maximum(self.value[part] - self.best[self.at[part]], 0).sum())

    def pick(self, candidate: int) -> None:
        part = self._part(candidate)
        self.best[self.at[part]] = np.maximum(self.best[self.at[part]], self.value[part])


def _greedy(
    batch: _Batch, rows: Ints, outside: tuple[int, int], request: Request, before: int
) -> tuple[list[tuple[int, int]], Ints]:
    """Pick among candidates while the best that is allowed beats `outside`, a (-bound, row); ties go to the smaller row.

    `before` picks were made before. Returns (candidate, gain) of each pick, and a bound for each candidate, -1 for picks and
    for what is not allowed.
    """
    bounds = np.array([batch.gain(c) for c in range(len(rows))], dtype=np.int64)
    heap = [(-int(bounds[c]), int(rows[c]), c) for c in range(len(rows))]
    heapq.heapify(heap)
    made: list[tuple[int, int]] = []
    while heap and request.lacking(before + len(made)):
        negative, row, candidate = heap[0]
        bounds[candidate] = exact = batch.gain(candidate)
        if exact != -negative:
            heapq.heapreplace(heap, (-exact, row, candidate))
            continue
        if exact == 0 or (negative, row) > outside:
            break
        heapq.heappop(heap)
        bounds[candidate] = -1
        if request.ledger.takes(row):
            batch.pick(candidate)
            made.append((candidate, exact))
    return made, bounds


class LazyGreedy:
    """The driver's side: candidate rows, ascending, and `bounds` on what each would add, -1 where it may not be picked.

    `picks` and `gains` are all that were made so far, here or before; `covered` is the sum attained.
    """

    def __init__(self, shards: Shards, request: Request, rows: Ints, eligible: Bools, picks: Ints, gains: Ints) -> None:
        self.shards, self.request, self.rows, self.eligible = shards, request, rows, eligible
        self.picks, self.gains = picks, gains
        self.bounds, self.degree = np.zeros((2, len(rows)), dtype=np.int64)
        self.pending = picks[:0]
        self.covered = 0

    def measure(self, chosen: Ints) -> None:
        """Cover by rows chosen already, which are not picked again; take every row's exact worth as its bound."""
        for rows, sums, edges, covered in self.shards.map(_worth, chosen):
            at = np.searchsorted(self.rows, rows)
            self.bounds[at] += sums
            self.degree[at] += edges
            self.covered += covered
        self.bounds[~self.eligible | np.isin(self.rows, self.picks)] = -1

    def advance(self) -> bool:
        """Make the picks of one round, maybe none; False once no row that is allowed adds anything."""
        if self.request.ledger.bound:
            still = np.flatnonzero(self.bounds >= 0)
            self.bounds[still[~self.request.ledger.allowed(self.rows[still])]] = -1
        keys, at = smallest(-self.bounds, np.arange(len(self.rows), dtype=np.int64), CANDIDATES + 1)
        if len(keys) == 0 or keys[0] >= 0:
            return False
        few = int(np.searchsorted(np.cumsum(self.degree[at]), COLUMN_ENTRIES))
        m = min(CANDIDATES, max(1, few), int((keys < 0).sum()))
        outside = (int(keys[m]), int(self.rows[at[m]])) if len(keys) > m else (1, 0)
        batch = self.rows[at[:m]]
        columns = self.shards.map(_columns, self.pending, batch)
        made, self.bounds[at[:m]] = _greedy(_Batch(columns, m), batch, outside, self.request, len(self.picks))
        self.pending = batch[[candidate for candidate, _ in made]]
        self.picks = np.concatenate([self.picks, self.pending])
        self.gains = np.concatenate([self.gains, np.array([gain for _, gain in made], dtype=np.int64)])
        self.covered += sum(gain for _, gain in made)
        return True
