"""The radius of ProbCover's balls (Yehuda et al. 2022): as large as k-means clusters, taken for classes, stay apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block
from engine.nearest import TILE_ELEMENTS, nearest
from engine.select.clusters import fit_centres
from engine.select.exact import exact_sqdist
from engine.select.lloyd import Matrix
from engine.select.seeding import random_rows
from engine.shards import Shards

RADIUS_KEY, BALLS_KEY = 3003, 3004
SAMPLE_ROWS = 5000
"""Balls whose purity is measured, each against the whole pool."""
LLOYD_STEPS = 20


def _nearest_stranger(block: Block, x: Matrix, centres: Matrix, step: float) -> Floats:
    """Return the exact squared distance from each vector (m, d) to the block's nearest row of another cluster, (m,)."""
    found = np.full(len(x), np.inf)
    if len(block.rows) == 0:
        return found
    some, means = torch.tensor(x), torch.tensor(centres)
    own, theirs = nearest(some, means), nearest(block.x, means, block.norms)
    tile = max(1, TILE_ELEMENTS // len(block.rows))
    for start in range(0, len(x), tile):
        part = slice(start, start + tile)
        sqdist = exact_sqdist(some[part].to(block.x.device), block.x, step).cpu().numpy()
        found[part] = np.where(own[part, None] == theirs[None, :], np.inf, sqdist).min(axis=1)
    return found


def pure_sqradius(shards: Shards, seed: int, clusters: int, purity: float, step: float) -> Iterator[tuple[str, float]]:
    """Yield notes on the way, and last the square of the largest radius at which `purity` of the balls are pure.

    The clusters: `clusters` k-means centres over the whole pool (D^2 seeds, up to 20 Lloyd steps), each row in that of
    its nearest centre. The balls: around 5,000 seeded rows (all, of fewer), each closed and holding every row of the
    pool within the radius; pure if those are all of one cluster. Distances are those of vectors rounded to multiples of
    `step`, so the answer is exact: the largest possible distance that is below the one at which too many stop being
    pure. Infinite where there is one cluster only. The paper tries radii on a grid, on all rows.
    """
    fit = fit_centres(shards, min(clusters, shards.n), LLOYD_STEPS, seed, (RADIUS_KEY,))
    for _, moved, after in fit:
        yield f"clusters for the radius: {moved:,} rows moved", np.nan
        centres = after
    rows: Ints = random_rows(shards, seed, (BALLS_KEY,), min(SAMPLE_ROWS, shards.n), np.empty(0, dtype=np.int64))
    strangers = np.sort(shards.map(_nearest_stranger, shards.take(rows).numpy(), centres, step, combine=np.minimum))
    impure = min(int((1 - purity) * len(strangers) + 1e-9), len(strangers) - 1)
    sqradius = max(0.0, float(strangers[impure]) - step * step)
    yield f"radius {np.sqrt(sqradius):.4g}", sqradius
