"""A block of the feature matrix, and what is exact over blocks: rankings and integer sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Bools, Floats, Ints
from engine.canonical import CHUNK_ELEMENTS, canonical_norms


class Source(Protocol):
    """Vectors that are read when they are wanted."""

    def read(self, at: Ints | None = None) -> torch.Tensor:
        """Return the vectors at some places, or all, (m, d) float32."""


@dataclass
class Block:
    """A fixed range of pool rows, the unit of work and of rounding.

    `data` holds the vectors, `x` (r, d) float32, or reads them when they are wanted; `rows` (r,) the pool row of each
    vector, ascending; `columns` the per-row columns that the method declared; `eligible` (r,) False for rows that may
    not be picked; `state` what a method keeps between rounds, lost when a shard is restarted.
    """

    index: int
    data: torch.Tensor | Source
    rows: Ints
    eligible: Bools
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    held: torch.Tensor | None = None

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
            return self.x[torch.from_numpy(at)]
        return self.data.read(at)

    def release(self) -> None:
        """Let go of vectors that can be read again."""
        self.held = None

    @cached_property
    def norms(self) -> Floats:
        """The canonical L2 norm of each vector, (r,) float64."""
        return canonical_norms(self.x)


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


def fixed_point_scale(count: int, largest: float) -> float:
    """Return the power of two by which values up to `largest` are scaled so that `count` of them sum in int64.

    count * largest * scale < 2^62. Returns 1 where everything is zero.
    """
    if largest <= 0 or count <= 0:
        return 1.0
    return float(2.0 ** np.floor(62 - np.log2(count) - np.log2(largest) - 1e-9))


def weighted_sums(x: torch.Tensor, weight: Floats, group: Ints, groups: int, scale: float) -> npt.NDArray[np.int64]:
    """Return the int64 sums of round(weight_i x_i * scale) over the rows of each group, (groups, d)."""
    out = torch.zeros((groups, x.shape[1]), dtype=torch.int64)
    step = max(1, CHUNK_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        scaled = torch.from_numpy(weight[part] * scale).to(x.device)[:, None]
        values = x[part].double().mul_(scaled).round_().to(torch.int64).cpu()
        out.index_add_(0, torch.from_numpy(group[part]), values)
    return out.numpy()


def fixed_point_sums(
    x: torch.Tensor, rows: Ints, group: Ints, groups: int, scale: float, minus: Ints | None = None
) -> npt.NDArray[np.int64]:
    """Return the int64 sums of round(x[rows] * scale) over the rows of each group, (groups, d).

    With `minus`, another group for each row, its rows are taken from that one's sums. Integer addition is associative:
    the sums are exact whatever the order, the blocks or the shards.
    """
    out = torch.zeros((groups, x.shape[1]), dtype=torch.int64)
    step = max(1, CHUNK_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = x[torch.from_numpy(rows[part])].double().mul_(scale).round_().to(torch.int64).cpu()
        out.index_add_(0, torch.from_numpy(group[part]), values)
        if minus is not None:
            out.index_add_(0, torch.from_numpy(minus[part]), values.neg_())
    return out.numpy()
