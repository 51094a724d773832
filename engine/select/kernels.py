"""How well picks cover a block by a kernel, in whole numbers: the block's side of `maxherding`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block
from engine.nearest import TILE_ELEMENTS
from engine.select.columns import add_edges, settle
from engine.select.exact import exact_sqdist
from engine.select.lloyd import Matrix

TILE_ROWS = 1 << 16
"""Rows of a tile, at most: their values, up to 2^36 each, sum exactly in float64."""


@dataclass(frozen=True)
class Kernel:
    """k(x, p) in whole numbers of 1 / unit: a Gaussian of `sigma`, or (None) a top-hat of squared radius `sqradius`.

    Of exact distances between vectors rounded to multiples of `step`.
    """

    step: float
    unit: float
    sigma: float | None
    sqradius: float = 0.0

    def values(self, x: torch.Tensor, centres: torch.Tensor) -> Floats:
        """Return k of each row of x (r, d) and each centre (m, d), times `unit`, rounded: (r, m) float64."""
        sqdist: Floats = exact_sqdist(x, centres, self.step).cpu().numpy()
        if self.sigma is None:
            return (sqdist <= self.sqradius).astype(np.float64)
        sqdist *= -0.5 / (self.sigma * self.sigma)
        np.exp(sqdist, out=sqdist)
        sqdist *= self.unit
        return np.rint(sqdist, out=sqdist)


def covered(block: Block) -> Floats:
    """Return how well each row is covered, (r,) whole numbers as float64, to be raised in place."""
    found: Floats = block.state.setdefault("covered", np.zeros(len(block.rows)))
    return found


def _tiles(block: Block, centres: Matrix, kernel: Kernel) -> Iterator[tuple[slice, Floats]]:
    """Yield (rows, k of those rows and all centres) until the block is through."""
    points = torch.tensor(centres, device=block.x.device)
    size = min(TILE_ROWS, max(1, TILE_ELEMENTS // max(1, len(centres))))
    for start in range(0, len(block.rows), size):
        part = slice(start, start + size)
        yield part, kernel.values(block.x[part], points)


def measure(block: Block, new: Matrix, batch: Matrix, kernel: Kernel) -> Ints:
    """Cover the block by new picks; return for each of a batch what it would add, and to how many rows, (m + 1, 2).

    The last line holds the coverage of the block, and 0.
    """
    out = np.zeros((len(batch) + 1, 2), dtype=np.int64)
    best = covered(block)
    if len(new) or len(batch):
        for part, values in _tiles(block, np.concatenate([new, batch]), kernel):
            np.maximum(best[part], values[:, : len(new)].max(axis=1, initial=0.0), out=best[part])
            added = torch.from_numpy(values)[:, len(new) :].sub_(torch.from_numpy(best[part])[:, None]).clamp_(min=0)
            out[:-1, 0] += added.sum(dim=0).to(torch.int64).numpy()
            out[:-1, 1] += torch.count_nonzero(added, dim=0).numpy()
    out[-1, 0] = int(best.astype(np.int64).sum())
    return out


def link(block: Block, new: Matrix, batch: Matrix, rows: Ints, kernel: Kernel) -> None:
    """Cover the block by new picks; keep as edges where the batch, the pool's `rows`, would add something."""
    measure(block, new, batch[:0], kernel)
    best = covered(block)
    for part, values in _tiles(block, batch, kernel):
        owner, which = np.nonzero(values > best[part][:, None])
        add_edges(block, rows[which], owner + part.start, values[owner, which].astype(np.int64))


def settle_links(block: Block) -> None:
    """Make the edges ready for `LazyGreedy`."""
    settle(block, covered(block).astype(np.int64))
