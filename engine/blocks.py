"""A block of the feature matrix, and what is exact over blocks: rankings and integer sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Bools, Floats, Ints
from engine.canonical import CHUNK_ELEMENTS, canonical_norms, rows_at


class Source(Protocol):
    """Vectors that are read when they are wanted."""

    def read(self, at: Ints | None = None) -> torch.Tensor:
        """Return the vectors at some places, or all, (m, d) float32."""


@dataclass
class Block:
    """A fixed range of pool rows, the unit of work and of rounding.

    `data` holds the vectors, `x` (r, d) float32, or reads them when they are wanted; `rows` (r,) the pool row of each
    vector, ascending; `columns` the per-row columns that the method declared; `predictions` what a model gave for each
    row, or what reads it: `probs` (r, classes), `score` (r, k), of an image's boxes, NaN beyond its last, or `influence`,
    `stability` (r, 1), NaN for an image that has none; `eligible` (r,) False for rows that may not be picked; `cell` (r,) says
    where a ledger has the rows that might be at first, -1 for others, and `cost` (r,) what they cost, both None where there
    are no conditions; `state` what a method keeps between rounds, lost when a shard is restarted.
    """

    index: int
    data: torch.Tensor | Source
    rows: Ints
    eligible: Bools
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, torch.Tensor | Source] = field(default_factory=dict)
    cell: Ints | None = None
    cost: Floats | None = None
    held: torch.Tensor | None = None

    @property
    def offered(self) -> Bools:
        """Which rows might be picked when the run began, (r,): the eligible ones, and those that are closed since."""
        return self.eligible if self.cell is None else self.cell >= 0

    @property
    def x(self) -> torch.Tensor:
        """The vectors (r, d); read now if they are not in memory, and held until `release`."""
        if isinstance(self.data, torch.Tensor):
            return self.data
        if self.held is None:
            self.held = self.data.read()
        return self.held

    def some(self, at: Ints) -> torch.Tensor:
        """Return the vectors at some places of this block, (m, d), without reading the others."""
        if isinstance(self.data, torch.Tensor) or self.held is not None:
            return rows_at(self.x, at)
        return self.data.read(at)

    def predicted(self, name: str, at: Ints | None = None) -> torch.Tensor:
        """Return a model's predictions for the rows at some places of this block, or all, float32, in the host's memory."""
        data = self.predictions[name]
        if isinstance(data, torch.Tensor):
            return data if at is None else rows_at(data, at)
        return data.read(at)

    def release(self) -> None:
        """Let go of vectors that can be read again."""
        self.held = None

    @cached_property
    def norms(self) -> Floats:
        """The canonical L2 norm of each vector, (r,) float64."""
        return canonical_norms(self.x)


def among(rows: Ints, some: Ints) -> Bools:
    """Return which of a block's `rows` are among `some`, (r,); both ascend. Only those of the block's range are looked at."""
    low, high = np.searchsorted(some, [rows[0], rows[-1] + 1]) if len(rows) else (0, 0)
    return np.isin(rows, some[low:high])


Ranked = tuple[npt.NDArray[Any], Ints]


def smallest(keys: npt.NDArray[Any], rows: Ints, m: int) -> Ranked:
    """Return the m smallest (key, row) pairs in order: keys (m,), rows (m,). Ties go to the smaller row."""
    if len(keys) > 4 * m and m:
        reach = np.partition(keys, m - 1)[m - 1]
        near = np.flatnonzero(keys <= reach)
        keys, rows = keys[near], rows[near]
    order = np.lexsort((rows, keys))[:m]
    return keys[order], rows[order]


def merge_smallest(m: int, a: Ranked, b: Ranked) -> Ranked:
    """Combine two results of `smallest` into the m smallest of both."""
    return smallest(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]), m)


EXACT_ROWS = 8192
"""Whole numbers up to 2^40 of which the sum is exact in float64, which torch adds in a ninth of the time of int64."""


def fixed_point_scale(count: int, largest: float) -> float:
    """Return the power of two by which values up to `largest` are scaled so that `count` of them sum in int64.

    count * largest * scale < 2^62. Returns 1 where everything is zero.
    """
    if largest <= 0 or count <= 0:
        return 1.0
    return float(2.0 ** np.floor(62 - np.log2(count) - np.log2(largest) - 1e-9))


def vector_scale(count: int, largest: float) -> float:
    """Return the scale of `fixed_point_sums` and `weighted_sums` for `count` vectors in all, of entries up to `largest`.

    That of `fixed_point_scale`, or less, so that largest * scale <= 2^40.
    """
    return fixed_point_scale(max(count, 1 << 22), largest)


def _sums(
    values: Callable[[slice], torch.Tensor], group: Ints, groups: int, x: torch.Tensor, minus: Ints | None = None
) -> npt.NDArray[np.int64]:
    """Return the int64 sums of the rows of each group, (groups, d); `values` gives a slice of them, whole float64 numbers.

    With `minus`, another group for each row, its rows are taken from that one's sums. Whole numbers sum exactly, whatever
    the order, the blocks or the shards.
    """
    out = np.zeros((groups, x.shape[1]), dtype=np.int64)
    step = max(1, CHUNK_ELEMENTS // max(1, x.shape[1]))
    for first in range(0, len(group), EXACT_ROWS):
        some = x.new_zeros(out.shape, dtype=torch.float64)
        for start in range(first, min(first + EXACT_ROWS, len(group)), step):
            part = slice(start, min(start + step, first + EXACT_ROWS))
            whole = values(part)
            some.index_add_(0, torch.from_numpy(group[part]).to(x.device), whole)
            if minus is not None:
                some.index_add_(0, torch.from_numpy(minus[part]).to(x.device), whole.neg_())
        out += some.to(torch.int64).cpu().numpy()
    return out


def weighted_sums(x: torch.Tensor, weight: Floats, group: Ints, groups: int, scale: float) -> npt.NDArray[np.int64]:
    """Return the int64 sums of round(weight_i x_i * scale) over the rows of each group, (groups, d).

    `scale` is of `vector_scale`.
    """
    scaled = torch.from_numpy(weight * scale).to(x.device)[:, None]
    return _sums(lambda part: x[part].double().mul_(scaled[part]).round_(), group, groups, x)


def fixed_point_sums(
    x: torch.Tensor, rows: Ints, group: Ints, groups: int, scale: float, minus: Ints | None = None
) -> npt.NDArray[np.int64]:
    """Return the int64 sums of round(x[rows] * scale) over the rows of each group, (groups, d).

    With `minus`, another group for each row, its rows are taken from that one's sums. `scale` is of `vector_scale`.
    """
    return _sums(lambda part: rows_at(x, rows[part]).double().mul_(scale).round_(), group, groups, x, minus)
