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
from engine.shards import Request, Shards, Step

NO_GAIN = np.nan


@dataclass(frozen=True)
class Options:
    """Neither has any."""


def _lowest_keys(block: Block, seed: int, m: int, taken: Ints) -> Ranked:
    open_rows = np.unique(block.rows[block.eligible & ~np.isin(block.rows, taken)])  # several vectors an image: one key
    return smallest(random_keys(seed, (), open_rows), open_rows, m)


def _draw(shards: Shards, seed: int, m: int, taken: Ints) -> Ints:
    """Return the first m rows of the seeded permutation of the eligible rows, `taken` left out."""
    if m == 0:
        return np.empty(0, dtype=np.int64)
    _, rows = shards.map(_lowest_keys, seed, m, taken, combine=partial(merge_smallest, m))
    return np.asarray(rows, dtype=np.int64)


def random(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Pick the first `budget` rows of one seeded permutation: smaller budgets are prefixes of larger ones."""
    picks = _draw(shards, request.seed, request.budget, np.empty(0, dtype=np.int64))
    yield Step(1, 1, picks, np.full(len(picks), NO_GAIN))


def _classes(block: Block) -> Ints:
    return np.unique(block.columns["label"])


def _lowest_keys_by_class(block: Block, seed: int, classes: Ints, m: int) -> list[Ranked]:
    found = []
    for label in classes:
        mine: Bools = block.eligible & (block.columns["label"] == label)
        rows = np.unique(block.rows[mine])
        found.append(smallest(random_keys(seed, (), rows), rows, m))
    return found


def _merge_classes(m: int, a: list[Ranked], b: list[Ranked]) -> list[Ranked]:
    return [merge_smallest(m, x, y) for x, y in zip(a, b, strict=True)]


def uniform(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Pick floor(budget / classes) rows of every class by the pool's own labels, in class order by turns.

    A class with too few gives all it has; what is missing from `budget` is drawn from all other eligible rows.
    Reads the labels: an upper reference, not a method. Raises InputError when a row has none.
    """
    classes = np.unique(np.concatenate(shards.map(_classes)))
    if len(classes) == 0 or classes[0] < 0:
        raise InputError("strategy 'uniform' reads the pool's labels, and some rows have none: use 'random'")
    share = request.budget // len(classes)
    rounds: list[tuple[int, int, int]] = []
    if share:
        by_class = shards.map(_lowest_keys_by_class, request.seed, classes, share, combine=partial(_merge_classes, share))
        rounds = [(turn, c, int(row)) for c, (_, rows) in enumerate(by_class) for turn, row in enumerate(rows)]
    picks = np.array([row for _, _, row in sorted(rounds)], dtype=np.int64)
    picks = np.concatenate([picks, _draw(shards, request.seed, request.budget - len(picks), picks)])
    yield Step(1, 1, picks, np.full(len(picks), NO_GAIN))
