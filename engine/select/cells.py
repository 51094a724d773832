"""Approximate nearest centres: a row is compared only with centres near its own.

Centres are put into cells of centres near one another. A row whose centre is in a cell is compared with the cell's
centres and, of each of them, the nearest others. A row that a far centre has come nearest to is missed until an exact
step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.arrays import Bools, Ints
from engine.blocks import Block
from engine.canonical import canonical_sqdist, rows_at
from engine.nearest import TILE_ELEMENTS, Centres, margin_of, nearest, search
from engine.products import score_error
from engine.select.exact import exact_sqdist, exact_step

CELL_CENTRES = 32
"""Centres of a cell on average: so many that the products of a block's rows with a cell are not too thin."""
GROUPING_STEPS = 3


@dataclass(frozen=True)
class Approximation:
    """Rows are compared with the centres of their own one's cell and `neighbors` of each; every so many steps with all."""

    neighbors: int
    exact_every: int


@dataclass(frozen=True)
class Cells:
    """The cell of each centre, (k,), and the numbers of the centres that each cell's rows are compared with, ascending."""

    cell: Ints
    centres: list[Ints]


def _grouped(centres: torch.Tensor) -> Ints:
    """Return each centre's cell, (k,), by a few k-means steps among the centres; a pure function of them."""
    k = len(centres)
    count = max(1, k // CELL_CENTRES)
    means = centres[torch.from_numpy(np.arange(count) * k // count)]
    for _ in range(GROUPING_STEPS):
        cell = nearest(centres, means)
        sums, sizes = np.zeros((count, centres.shape[1])), np.bincount(cell, minlength=count)
        np.add.at(sums, cell, centres.double().numpy())
        means[torch.from_numpy(sizes > 0)] = torch.from_numpy(sums[sizes > 0] / sizes[sizes > 0, None]).float()
    return np.unique(nearest(centres, means), return_inverse=True)[1]


def cells_of(centres: torch.Tensor, neighbors: int) -> Cells:
    """Put centres (k, d) into cells; a pure function of them, whatever the threads."""
    cell, k = _grouped(centres), len(centres)
    step = exact_step(float(centres.double().norm(dim=1).max()) * (1 + 1e-9), centres.shape[1])
    near = [np.zeros(k, dtype=np.bool_) for _ in range(int(cell.max()) + 1)]
    rows = max(1, TILE_ELEMENTS // k)
    for start in range(0, k, rows):
        sqdist = exact_sqdist(centres[start : start + rows], centres, step)
        reach = sqdist.kthvalue(min(neighbors + 1, k), dim=1, keepdim=True).values
        for own, close in zip(cell[start : start + rows], (sqdist <= reach).numpy(), strict=True):
            near[own] |= close
    return Cells(cell, [np.flatnonzero(mask | (cell == number)) for number, mask in enumerate(near)])


def assign_near(block: Block, centres: Centres, cells: Cells, moved: Bools) -> Ints:
    """Give each row the nearest of the centres it is compared with, (r,), and keep it in the block.

    Among them the answer is the canonical one; equal distances go to the smaller number. Rows none of whose centres
    `moved` (k,) since they were compared with them keep theirs.
    """
    x, ready, own = block.x, centres.to(block.x.device), block.state["cluster"]
    found: Ints = own.copy()
    order = np.argsort(cells.cell[own], kind="stable")
    ends = np.searchsorted(cells.cell[own][order], np.arange(len(cells.centres) + 1))
    for numbers, low, high in zip(cells.centres, ends[:-1], ends[1:], strict=True):
        if high > low and moved[numbers].any():
            rows = order[low:high]
            some = ready.some(np.unique(ready.column[numbers]))
            error = score_error(x.shape[1], block.norms[rows], ready.largest)
            part = rows_at(x, rows)
            found[rows] = some.kept[search(part, some, some.half, margin_of(error, part), canonical_sqdist).column]
    block.state["cluster"] = found
    return found
