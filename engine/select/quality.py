"""How far the pool is from some picks, and what conditions cost in that where a method optimises first and picks last."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.arrays import Ints
from engine.blocks import Block
from engine.nearest import nearest_sqdist
from engine.select.lloyd import Matrix
from engine.select.picking import UNCONDITIONAL
from engine.shards import Shards, Step


def _distances(block: Block, picks: Matrix) -> tuple[int, float, float]:
    _, sqdist = nearest_sqdist(block.x, torch.tensor(picks), block.norms)
    distance = np.sqrt(sqdist)
    return len(distance), float(distance.sum()), float(distance.max(initial=0.0))


def distances(shards: Shards, rows: Ints) -> tuple[float, float]:
    """Return the mean and the largest distance (L2) from a pool row to the nearest of some rows."""
    counts = shards.map(_distances, shards.take(rows).numpy())
    total = sum(count for count, _, _ in counts)
    return sum(value for _, value, _ in counts) / total, max(value for _, _, value in counts)


def cost_in_quality(shards: Shards, step: Step, labeled: Ints) -> dict[str, Any] | None:
    """Return mean distance and covering radius of the picks, and of what would have been picked without conditions.

    Both with the labelled rows, on the vectors as the method saw them. None where a method weighs each pick against the
    last: then there is nothing to compare with but another run.
    """
    if UNCONDITIONAL not in step.arrays or not len(step.picks):
        return None
    found = {}
    for name, picks in (("picked", step.picks), ("unconditional", step.arrays[UNCONDITIONAL])):
        mean, radius = distances(shards, np.concatenate([labeled, picks]))
        found[name] = {"mean_distance": mean, "covering_radius": radius, "num_picks": len(picks)}
    kept = int(np.isin(step.picks, step.arrays[UNCONDITIONAL]).sum())
    return {**found, "num_shared": kept}
