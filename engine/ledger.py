"""What picks must satisfy together, and the account of what is left of it while they are made.

Every eligible row is in a cell: its group in each column that has conditions. A pick is allowed where picks that meet every
condition can still be made after it, which `flows` decides, exactly. What is closed once stays closed, and it depends on the
picks alone, not on their order or on who asks: so a ledger is made again from the picks of a run that was cut short.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from engine.arrays import Bools, Floats, Ints
from engine.blocks import Block, among
from engine.flows import Circulation, circulation
from engine.schema import InputError

DOWN, UP = 0, 1
"""The nodes from which the one tree of groups goes down, and to which the other goes up."""


@dataclass(frozen=True)
class Groups:
    """A column's groups: the code of each eligible row (n,), and how many picks a group needs at least and takes at most."""

    column: str
    codes: Ints
    low: Ints
    high: Ints

    @property
    def counts(self) -> Ints:
        """How many eligible rows each group has."""
        return np.bincount(self.codes, minlength=len(self.low))

    @property
    def binding(self) -> bool:
        """Whether any group can be asked for more than nothing, or can be full."""
        return bool((self.low > 0).any() or (self.high < self.counts).any())


@dataclass(frozen=True)
class Network:
    """The circulation of a budget through cells; `arcs` (c,) and `group_arcs` by column are where cells and groups stand."""

    flow: Circulation
    arcs: Ints
    group_arcs: list[Ints]


def _nested(cells: Ints, coarse: int, fine: int) -> bool:
    """Return whether each group of the column `fine` lies within one of `coarse`."""
    pairs = np.unique(cells[:, [fine, coarse]], axis=0)
    return len(pairs) == len(np.unique(pairs[:, 0]))


def two_chains(cells: Ints) -> tuple[list[int], list[int]] | None:
    """Return the columns of cells (c, columns) as two chains, each from its coarsest to its finest; None where there are none.

    In a chain every group of a column lies within one group of the column before.
    """
    every = range(cells.shape[1])
    sizes = [len(np.unique(cells[:, column])) for column in every]
    for sides in itertools.product((0, 1), repeat=max(0, cells.shape[1] - 1)):
        chains = [sorted((c for c in every if (0, *sides)[c] == side), key=lambda c: sizes[c]) for side in (0, 1)]
        if all(_nested(cells, *pair) for chain in chains for pair in itertools.pairwise(chain)):
            return chains[0], chains[1]
    return None


def network(cells: Ints, capacity: Ints, bounds: list[tuple[Ints, Ints]], least: int, most: int) -> tuple[Network | None, int]:
    """Return `least` to `most` picks as a flow through cells (c, columns), or None and by how much the bounds fail.

    `capacity` (c,) are the eligible rows of each cell, `bounds` the (low, high) of each column's groups. Raises InputError
    where three columns or more do not make two chains.
    """
    chains = two_chains(cells)
    if chains is None:
        raise InputError(
            "conditions on three columns or more are decided exactly only where they are nested (each video lies within one "
            "scene), in two such chains at most, and these are not: leave one of them out"
        )
    there = [np.isin(np.arange(len(low)), cells[:, column]) for column, (low, _) in enumerate(bounds)]
    lacking = sum(int(low[~mask].sum()) for (low, _), mask in zip(bounds, there, strict=True))
    if lacking:
        return None, lacking
    tail, head, low, high = [np.array([UP])], [np.array([DOWN])], [np.array([least])], [np.array([most])]
    nodes, count, ends = 2, 1, []
    group_arcs: list[Ints] = [np.empty(0, dtype=np.int64)] * cells.shape[1]
    for root, chain in zip((DOWN, UP), chains, strict=True):
        above = np.full(len(cells), root, dtype=np.int64)
        for column in chain:
            groups, first, place = np.unique(cells[:, column], return_index=True, return_inverse=True)
            below = np.arange(nodes, nodes + len(groups), dtype=np.int64)
            tail.append(above[first] if root == DOWN else below)
            head.append(below if root == DOWN else above[first])
            low.append(bounds[column][0][groups])
            high.append(bounds[column][1][groups])
            group_arcs[column] = np.full(len(bounds[column][0]), -1, dtype=np.int64)
            group_arcs[column][groups] = np.arange(count, count + len(groups))
            nodes, count, above = nodes + len(groups), count + len(groups), below[place]
        ends.append(above)
    arcs = np.arange(count, count + len(cells), dtype=np.int64)
    tail.append(ends[0])
    head.append(ends[1])
    low.append(np.zeros_like(capacity))
    high.append(capacity)
    flow, short = circulation(nodes, *(np.concatenate(part).astype(np.int64) for part in (tail, head, low, high)))
    return (Network(flow, arcs, group_arcs) if flow is not None else None), short


def cells_of(groups: list[Groups]) -> tuple[Ints, Ints, Ints]:
    """Return the cells that rows are in (c, columns), in order, each row's cell (n,), and the rows of each cell (c,)."""
    code = np.zeros(len(groups[0].codes), dtype=np.int64)
    for column in groups:
        _, code = np.unique(code * len(column.low) + column.codes, return_inverse=True)
    _, first, counts = np.unique(code, return_index=True, return_counts=True)
    return np.stack([column.codes[first] for column in groups], axis=1), code, counts


@dataclass(frozen=True)
class Terms:
    """What a run's picks must satisfy, made ready: from it every ledger of the run begins.

    `rows` (n,) are the eligible pool rows, ascending, `cell` (n,) each one's cell, `network` the budget's flow through the
    cells, None where no column has conditions. `cost` (n,) is what each row costs and `total` what there is to spend, if
    anything is counted so: then there may be any number of picks.
    """

    rows: Ints
    cell: Ints
    network: Network | None
    cost: Floats | None = None
    total: Fraction | None = None


@dataclass(frozen=True)
class Closing:
    """What of a block may be picked no more: rows of closed `cells`, and those that cost more than `affordable`."""

    cells: Bools
    affordable: float


def decimal(cost: float) -> Fraction:
    """Return a cost as it is written: the shortest decimal that is this float, exactly."""
    return Fraction(repr(float(cost)))


class Ledger:
    """The account of a run's picks: `takes` enters one, if it is allowed. Without terms everything is."""

    def __init__(self, terms: Terms | None = None, picks: Iterable[int] = ()) -> None:
        self.terms = terms
        if terms is None:
            return
        self.flow = terms.network.flow.copy() if terms.network else None
        self.shut: Bools = np.zeros(len(terms.network.arcs) if terms.network else 1, dtype=np.bool_)
        self.taken: Bools = np.zeros(len(terms.rows), dtype=np.bool_)
        self.num_taken, self.left, self.affordable = 0, terms.total or Fraction(0), np.inf
        if terms.cost is not None:
            self.by_cost, self.cheapest = np.argsort(terms.cost, kind="stable"), 0
            self._afford()
        for row in picks:
            entered = self.takes(row)
            assert entered, f"row {row} breaks a condition that it met before"

    @property
    def bound(self) -> bool:
        """Whether anything can be refused."""
        return self.terms is not None

    @property
    def priced(self) -> bool:
        """Whether it is a sum that is spent, and not a number of picks."""
        return self.terms is not None and self.terms.cost is not None

    def _afford(self) -> None:
        """Set the largest cost, as a float, that is not above what is left."""
        near = float(self.left)
        self.affordable = near if decimal(near) <= self.left else float(np.nextafter(near, -np.inf))

    def takes(self, row: int) -> bool:
        """Enter a pick, and return True; False, and nothing is entered, where it is not allowed."""
        if self.terms is None:
            return True
        at = int(np.searchsorted(self.terms.rows, row))
        assert self.terms.rows[at] == row, f"row {row} is not eligible"
        cost, cell = self.terms.cost, int(self.terms.cell[at])
        if self.taken[at] or self.shut[cell] or (cost is not None and cost[at] > self.affordable):
            return False
        if (
            self.flow is not None
            and self.terms.network is not None
            and not self.flow.raise_low(int(self.terms.network.arcs[cell]))
        ):
            self.shut[cell] = True
            return False
        self.taken[at] = True
        self.num_taken += 1
        if cost is not None:
            self.left -= decimal(cost[at])
            self._afford()
        return True

    def closing(self) -> Closing:
        """Return everything that is closed now, exactly."""
        assert self.terms is not None
        if self.flow is not None and self.terms.network is not None:
            self.shut |= self.flow.fixed(self.terms.network.arcs)
        return Closing(self.shut.copy(), self.affordable)

    def allowed(self, rows: Ints) -> Bools:
        """Return which of some eligible rows could be picked now, (m,)."""
        if self.terms is None:
            return np.ones(len(rows), dtype=np.bool_)
        closing, at = self.closing(), np.searchsorted(self.terms.rows, rows)
        allowed: Bools = ~closing.cells[self.terms.cell[at]] & ~self.taken[at]
        return allowed if self.terms.cost is None else allowed & (self.terms.cost[at] <= closing.affordable)

    def at_most(self) -> int:
        """Return how many more picks what is left may pay for, at most: 0 once it pays for none."""
        terms = self.terms
        assert terms is not None
        assert terms.cost is not None
        while self.cheapest < len(self.by_cost):
            at = int(self.by_cost[self.cheapest])
            if terms.cost[at] > self.affordable:
                return 0
            if not self.taken[at] and not self._full(int(terms.cell[at])):
                return max(1, min(len(terms.rows) - self.num_taken, int(self.left / decimal(terms.cost[at]))))
            self.cheapest += 1
        return 0

    def _full(self, cell: int) -> bool:
        """Return whether nothing more may be picked of a cell."""
        if self.terms is not None and self.terms.network is not None and self.flow is not None and not self.shut[cell]:
            self.shut[cell] = not self.flow.can_rise(int(self.terms.network.arcs[cell]))
        return bool(self.shut[cell])


def fill(budget: int, found: Network, column: int, order: Ints) -> Ints:
    """Return an even split of the budget over a column's groups, (groups,), that the other bounds allow; they become its lows.

    By water filling: in each turn every group gets one more, in the given order, until the budget is used up; a group that
    can't be given one more gets none again. That is the split whose smallest share is largest, then the next, and so on.
    """
    arcs = found.group_arcs[column]
    left, open_groups = budget - int(found.flow.low[arcs[arcs >= 0]].sum()), [int(g) for g in order if arcs[g] >= 0]
    while left and open_groups:
        still = []
        for group in open_groups:
            if left and found.flow.raise_low(int(arcs[group])):
                left -= 1
                still.append(group)
        open_groups = still
    shares = np.zeros(len(arcs), dtype=np.int64)
    shares[arcs >= 0] = found.flow.low[arcs[arcs >= 0]]
    return shares


def reset_block(block: Block, excluded: Ints, terms: Terms | None) -> None:
    """Make a block ready for a fresh run: no state, `excluded` (ascending) not eligible, and each row's cell and cost."""
    block.state.clear()
    block.eligible = ~among(block.rows, excluded)
    block.cell = block.cost = None
    if terms is not None:
        at = np.searchsorted(terms.rows, block.rows[block.eligible])
        block.cell = np.full(len(block.rows), -1, dtype=np.int64)
        block.cell[block.eligible] = terms.cell[at]
        if terms.cost is not None:
            block.cost = np.zeros(len(block.rows))
            block.cost[block.eligible] = terms.cost[at]


def close_block(block: Block, closing: Closing) -> None:
    """Make ineligible what a ledger has closed."""
    if block.cell is not None:
        block.eligible = block.offered & ~closing.cells[block.cell]
    if block.cost is not None:
        block.eligible &= block.cost <= closing.affordable
