"""How every method makes picks that satisfy conditions: what is ranked, what is drawn, and what lies on shelves.

A method that ranks walks down its ranking (`first_allowed`); one that optimises first and picks last has a shelf of ranked
rows for each thing it picks for (`Shelves`); one that weighs every pick against the last, or draws, asks the ledger as it
goes, and has `close` turn what is not allowed any more ineligible before it looks at the blocks again. What is closed stays
closed, so a walk never goes back, and what was left behind under a bound stays below it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from engine.arrays import Floats, Ints
from engine.blocks import Block, Ranked, among, merge_smallest, smallest
from engine.draws import random_keys
from engine.ledger import Ledger
from engine.shards import Request, Shards, close

T = TypeVar("T")

Find = Callable[[Ints, int], Ranked]
"""(rows taken, m) -> the m first of the eligible rows by some key, in order, without those taken."""
Fetch = Callable[[Ints, Ints, Ints], list[Ranked]]
"""(shelves, m of each, rows taken) -> for each of these shelves its m first eligible rows, fewer if it has fewer."""

SPARE, MOST = 1024, 1 << 16
"""Rows looked at beyond those due where some may be refused; rows looked at in a round at most."""
SPARE_ROWS = 8
"""Rows of a shelf beyond those due where some may be refused."""


def first_allowed(shards: Shards, request: Request, find: Find, taken: Ints, wanted: int | None = None) -> Ranked:
    """Take rows by their rank, each that is allowed, until no more are lacking, or `wanted` are; `taken` count as made.

    Returns their keys and rows; fewer than are wanted where the ranking ends.
    """
    keys: list[np.ndarray] = []
    rows = taken[:0]
    while due := request.lacking(len(taken) + len(rows)) if wanted is None else wanted - len(rows):
        close(shards, request.ledger)
        m = min(4 * due + SPARE, MOST) if request.ledger.bound else due
        found, some = find(np.concatenate([taken, rows]), m)
        kept: list[int] = []
        for index, row in enumerate(some.tolist()):
            if len(kept) == due:
                break
            if request.ledger.takes(row):
                kept.append(index)
        keys.append(found[kept])
        rows = np.concatenate([rows, some[kept]])
        if not kept:
            break
    return np.concatenate(keys) if keys else np.empty(0), rows


def _lowest_keys(block: Block, seed: int, step: tuple[int, ...], taken: Ints, m: int) -> Ranked:
    rows = np.unique(block.rows[block.eligible & ~among(block.rows, taken)])  # several vectors an image: one key
    return smallest(random_keys(seed, step, rows), rows, m)


def first_of_permutation(shards: Shards, seed: int, step: tuple[int, ...], taken: Ints, m: int) -> Ranked:
    """Return the first m rows of a seeded permutation of the eligible rows, `taken` left out; fewer if there are fewer."""
    found: Ranked = shards.map(_lowest_keys, seed, step, np.sort(taken), m, combine=partial(merge_smallest, m))
    return found


def draw(shards: Shards, request: Request, step: tuple[int, ...], taken: Ints, wanted: int | None = None) -> Ints:
    """Take rows in the order of the permutation of (seed, step), as `first_allowed` does; return them."""
    return first_allowed(shards, request, partial(first_of_permutation, shards, request.seed, step), taken, wanted)[1]


class Shelves:
    """Ranked rows for each of some things that are picked for: `take` gives one the first row of its shelf that is allowed.

    `due` (shelves,) says about how often each will be asked, and `spare` how many more rows it is worth to have there.
    Shelves are filled by `fetch`, all that are due at once, and again those on which no row is left that may be picked;
    a shelf is at its end once it got fewer rows than were asked for. `filled` are shelves that are filled already, `taken`
    rows that are picked already.
    """

    def __init__(
        self,
        shards: Shards,
        request: Request,
        fetch: Fetch,
        due: Ints,
        *,
        spare: int = 0,
        filled: list[Ranked] | None = None,
        taken: Ints | None = None,
    ) -> None:
        self.shards, self.request, self.fetch = shards, request, fetch
        self.due, self.spare = due.copy(), spare
        self.keys: list[Floats] = [np.empty(0)] * len(due)
        self.rows: list[Ints] = [np.empty(0, dtype=np.int64)] * len(due)
        self.at, self.ended = np.zeros(len(due), dtype=np.int64), np.zeros(len(due), dtype=np.bool_)
        self.taken: set[int] = set() if taken is None else set(taken.tolist())
        if filled is not None:
            self._put(np.arange(len(due), dtype=np.int64), due, filled)

    def _put(self, shelves: Ints, wanted: Ints, found: list[Ranked]) -> None:
        for shelf, m, (keys, rows) in zip(shelves.tolist(), wanted.tolist(), found, strict=True):
            self.keys[shelf], self.rows[shelf] = keys, rows
            self.at[shelf], self.ended[shelf] = 0, len(rows) < m

    def _dead(self) -> Ints:
        """Return the shelves that are due, may have more rows, and hold none that is allowed."""
        due = np.flatnonzero((self.due > 0) & ~self.ended)
        left = [self.rows[shelf][self.at[shelf] :] for shelf in due]
        rows = np.concatenate([*left, np.empty(0, dtype=np.int64)])
        alive = ~np.isin(rows, self._taken()) & self.request.ledger.allowed(rows)
        holds = np.bincount(np.repeat(np.arange(len(due)), [len(rows) for rows in left]), alive, len(due))
        return np.asarray(due[holds == 0], dtype=np.int64)

    def _taken(self) -> Ints:
        return np.fromiter(sorted(self.taken), dtype=np.int64, count=len(self.taken))

    def _refill(self, asked: int) -> None:
        """Fill the shelf asked, and all others that are due and have run out."""
        close(self.shards, self.request.ledger)
        shelves = np.union1d(self._dead(), asked)
        spare = self.spare + (SPARE_ROWS if self.request.ledger.bound else 0)
        wanted = np.maximum(self.due[shelves], 1) + spare
        self._put(shelves, wanted, self.fetch(shelves, wanted, self._taken()))

    def take(self, shelf: int) -> tuple[int, float] | None:
        """Take the first row of a shelf that is allowed and on no other was taken; return it and its key, None at the end."""
        while True:
            rows = self.rows[shelf]
            while self.at[shelf] < len(rows):
                at = int(self.at[shelf])
                row = int(rows[at])
                self.at[shelf] += 1
                if row not in self.taken and self.request.ledger.takes(row):
                    self.taken.add(row)
                    self.due[shelf] -= 1
                    return row, float(self.keys[shelf][at])
            if self.ended[shelf]:
                self.due[shelf] = 0
                return None
            self._refill(shelf)

    def take_all(self, order: Ints) -> tuple[Ints, Floats]:
        """Take from shelves in order, until no more picks are lacking; return rows and keys, -1 and NaN for empty shelves."""
        rows, keys = np.full(len(order), -1, dtype=np.int64), np.full(len(order), np.nan)
        for slot, shelf in enumerate(order.tolist()):
            if not self.request.lacking(len(self.taken)):
                break
            found = self.take(shelf)
            if found is not None:
                rows[slot], keys[slot] = found
        return rows, keys


UNCONDITIONAL = "unconditional"
"""The array of a last step that holds what would have been picked without conditions, from the same centres or vectors."""


def both_ways(request: Request, pick: Callable[[Request], T]) -> tuple[T, T | None]:
    """Return what `pick` picks as the conditions have it, and, where there are some, what it would pick without."""
    aside = pick(replace(request, terms=None, ledger=Ledger())) if request.ledger.bound else None
    return pick(request), aside
