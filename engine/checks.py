"""Whether the vectors and predictions of shards can be worked with."""

from __future__ import annotations

import numpy as np
import torch

from engine.blocks import Block
from engine.schema import InputError
from engine.shards import Shards
from engine.store import SCORES

SUM_ERROR = 0.01
"""How far the sum of an image's probabilities may be off 1: float16 rounds each by a 2,048th."""

RANGES = "probabilities are at least 0 and sum to 1, scores are from 0 to 1; give a model's probabilities, not its logits"


def _first_bad(block: Block) -> int:
    """Return the first row of the block whose vector is not finite, or -1."""
    bad = ~torch.isfinite(block.x).all(dim=1).cpu().numpy()
    return int(block.rows[bad][0]) if bad.any() else -1


def check_finite(shards: Shards, uri: str) -> None:
    """Raise InputError naming the first row whose vector has a NaN or an infinity."""
    bad = [row for row in shards.map(_first_bad) if row >= 0]
    if bad:
        raise InputError(f"{uri}: the vector of row {bad[0]} holds a NaN or an infinity: embed or import it again")


def _first_wrong(block: Block) -> tuple[int, str] | None:
    """Return the first row of the block whose predictions can't be, and what is wrong with them."""
    for name in block.predictions:
        values = block.predicted(name).numpy()
        if name in SCORES:
            for at in np.flatnonzero(np.isinf(values).any(axis=1))[:1]:
                return int(block.rows[at]), "an infinite score: embed the pool again"
            continue
        sums = values.sum(axis=1, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            outside = (values < 0) | (values > (1 if name == "score" else np.inf))
        bad = outside.any(axis=1) | ((np.abs(sums - 1) > SUM_ERROR) | np.isnan(sums) if name == "probs" else False)
        for at in np.flatnonzero(bad)[:1]:
            odd = values[at][outside[at]]
            what = f"a {'score' if name == 'score' else 'probability'} of {odd[0]:g}" if len(odd) else f"a sum of {sums[at]:g}"
            return int(block.rows[at]), f"{what}: {RANGES}"
    return None


def check_predictions(shards: Shards, uri: str) -> None:
    """Raise InputError naming the first row whose probabilities are negative or don't sum to 1, or with such a score."""
    for found in shards.map(_first_wrong):
        if found:
            row, what = found
            raise InputError(f"{uri}: row {row} has {what}")
