"""`influence`, `gradient_similarity`, `stability`: the images of lowest score, one after the other.

Scores are what the encoders of the same names gave: the change of a reference set's loss that training on an image would
bring, by influence functions (ISAL, Liu et al., ICCV 2021) or by the likeness of gradients alone; and how little a
detector's boxes move under noise (Kao et al., ACCV 2018).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from engine.arrays import Floats
from engine.blocks import Block
from engine.select.scored import ranked
from engine.shards import Request, Shards, Step


@dataclass(frozen=True)
class Options:
    """None of them has any."""


def _negated(block: Block, column: str) -> Floats:
    """Return what an image gains, (r,) float64: its score's opposite; NaN for one that has none."""
    return -block.predicted(column)[:, 0].double().numpy()


def _of_lowest(column: str, shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Pick the images of lowest score; the gain is its opposite, ties go to the smaller row.

    Images without a score, in which a detector saw nothing, come last, in a seeded order (gain empty). Smaller budgets are
    prefixes.
    """
    yield from ranked(shards, request, partial(_negated, column=column))


influence = partial(_of_lowest, "influence")
gradient_similarity = partial(_of_lowest, "influence")
stability = partial(_of_lowest, "stability")
