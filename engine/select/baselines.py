"""`random` and `uniform`: the lower and the upper reference (Pourahmadi et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.arrays import Bools, Ints
from engine.blocks import Block, Ranked, merge_smallest, smallest
from engine.draws import random_keys
from engine.schema import InputError
from engine.select.picking import Shelves, draw
from engine.shards import Request, Shards, Step

NO_GAIN = np.nan


@dataclass(frozen=True)
class Options:
    """Neither has any."""


def random(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Pick the first `budget` rows of one seeded permutation: smaller budgets are prefixes of larger ones."""
    picks = draw(shards, request, (), np.empty(0, dtype=np.int64))
    yield Step(1, 1, picks, np.full(len(picks), NO_GAIN))


def _classes(block: Block) -> Ints:
    return np.unique(block.columns["label"])


def _lowest_keys_by_class(block: Block, seed: int, classes: Ints, most: Ints, taken: Ints) -> list[Ranked]:
    found = []
    for label, m in zip(classes, most.tolist(), strict=True):
        mine: Bools = block.eligible & (block.columns["label"] == label) & ~np.isin(block.rows, taken)
        rows = np.unique(block.rows[mine])
        found.append(smallest(random_keys(seed, (), rows), rows, m))
    return found


def _merge_classes(most: Ints, a: list[Ranked], b: list[Ranked]) -> list[Ranked]:
    return [merge_smallest(m, x, y) for m, x, y in zip(most.tolist(), a, b, strict=True)]


def uniform(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Pick floor(budget / classes) rows of every class by the pool's own labels, in class order by turns.

    A class with too few gives all it has; what is missing from `budget` is drawn from all other eligible rows.
    Reads the labels: an upper reference, not a method. Raises InputError when a row has none.
    """
    classes = np.unique(np.concatenate(shards.map(_classes)))
    if len(classes) == 0 or classes[0] < 0:
        raise InputError("strategy 'uniform' reads the pool's labels, and some rows have none: use 'random'")

    def fetch(shelves: Ints, most: Ints, taken: Ints) -> list[Ranked]:
        given = request.seed, classes[shelves], most, taken
        found: list[Ranked] = shards.map(_lowest_keys_by_class, *given, combine=partial(_merge_classes, most))
        return found

    share, every = request.budget // len(classes), np.arange(len(classes), dtype=np.int64)
    rows, _ = Shelves(shards, request, fetch, np.full(len(classes), share, dtype=np.int64)).take_all(np.tile(every, share))
    picks = rows[rows >= 0]
    picks = np.concatenate([picks, draw(shards, request, (), picks)])
    yield Step(1, 1, picks, np.full(len(picks), NO_GAIN))
