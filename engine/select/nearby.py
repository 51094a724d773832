"""Approximate nearest centres: a row is compared only with its own centre and the centres nearest to that.

A row that another centre has come nearest to is missed until an exact step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.arrays import Bools, Ints
from engine.blocks import Block
from engine.canonical import canonical_sqdist, rows_at
from engine.nearest import TILE_ELEMENTS, Centres, settle
from engine.products import listed_products, score_error
from engine.select.exact import exact_sqdist, exact_step


@dataclass(frozen=True)
class Approximation:
    """Rows are compared with their own centre and the `neighbors` nearest to it; every so many steps with all."""

    neighbors: int
    exact_every: int


def neighbors_of(centres: torch.Tensor, neighbors: int) -> Ints:
    """Return for each centre (k, d) its number and those of the nearest others, ascending, (k, neighbors + 1) or (k, k).

    A pure function of them, whatever the threads: of exact distances, equal ones by the smaller number.
    """
    k, width = len(centres), min(neighbors + 1, len(centres))
    step = exact_step(float(centres.double().norm(dim=1).max()) * (1 + 1e-9), centres.shape[1])
    near = np.empty((k, width), dtype=np.int64)
    rows = max(1, TILE_ELEMENTS // k)
    for start in range(0, k, rows):
        sqdist = exact_sqdist(centres[start : start + rows], centres, step)
        own = torch.arange(start, start + len(sqdist))
        sqdist[torch.arange(len(sqdist)), own] = -1.0
        last = sqdist.kthvalue(width, dim=1, keepdim=True).values
        inside, at = sqdist < last, sqdist == last
        inside |= at & (at.cumsum(dim=1) <= width - inside.sum(dim=1, keepdim=True))
        near[start : start + rows] = inside.nonzero()[:, 1].reshape(-1, width).numpy()
    return near


def assign_near(block: Block, centres: Centres, near: Ints, moved: Bools) -> Ints:
    """Give each row the nearest of its own centre and those `near` that (k, m), (r,), and keep it in the block.

    Among them the answer is the canonical one; equal distances go to the smaller number. Rows none of whose centres
    `moved` (k,) keep theirs.
    """
    ready, own = centres.to(block.x.device), block.state["cluster"]
    found: Ints = own.copy()
    near_moved = np.logical_or.reduce(moved[near], axis=1)
    rows = np.flatnonzero(near_moved[own])
    if len(rows):
        x, column = rows_at(block.x, rows), centres.column[near[own[rows]]]
        product = listed_products(x, ready.c, np.arange(len(rows) + 1) * near.shape[1], column.ravel())
        score = ready.half.cpu().numpy()[column] - product.reshape(column.shape)
        error = score_error(x.shape[1], block.norms[rows], ready.largest)
        best = score.argmin(axis=1)
        close = score <= (score[np.arange(len(rows)), best] + 2.0002 * error)[:, None]
        index = column[np.arange(len(rows)), best]
        contested = np.flatnonzero(close.sum(axis=1) > 1)
        if len(contested):
            row, place = np.nonzero(close[contested])
            row = contested[row]
            index[contested] = settle(x, ready.c, row, column[row, place], canonical_sqdist)
        found[rows] = ready.kept[index]
    block.state["cluster"] = found
    return found
