"""`entropy`, `margin`, `least_confidence`: the images that a model is least sure of, one after the other.

A classifier's uncertainty about an image is that of its probabilities p: the entropy -sum p ln p (Wang & Shang 2014), one
less the margin between the two largest (Scheffer et al. 2001), one less the largest (Lewis & Gale 1994). A detector's is
that of its boxes, each a yes or no of probability s, its score: the binary entropy, 1 - |2s - 1| and 1 - s, aggregated
over the boxes of an image (Brust et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block, Ranked, merge_smallest, smallest
from engine.canonical import CHUNK_ELEMENTS, canonical_dot
from engine.schema import Opt
from engine.select.picking import draw, first_allowed
from engine.shards import Request, Shards, Step

WITHOUT_BOXES = 61


@dataclass(frozen=True)
class Options:
    """Options of all three."""

    aggregate: Annotated[
        str, Opt("Detectors: how an image's boxes make one value; sum favours many boxes.", choices=("mean", "max", "sum"))
    ] = "mean"


def _logarithms(p: Floats) -> Floats:
    """Return ln p, 0 where p is 0: p ln p is 0 there."""
    return np.log(np.where(p > 0, p, 1.0))


def _entropy(p: Floats) -> Floats:
    """Return the entropy of each row (r, c), in nats; rows that hold the same values in another order have the same one."""
    ordered = np.sort(p, axis=1)
    every = np.arange(len(p), dtype=np.int64)
    return -canonical_dot(torch.from_numpy(ordered), every, torch.from_numpy(_logarithms(ordered)), every)


def _margin(p: Floats) -> Floats:
    if p.shape[1] == 1:
        return 1 - p[:, 0]
    largest: Floats = np.partition(p, -2, axis=1)[:, -2:]
    return 1 - (largest[:, 1] - largest[:, 0])


def _least_confidence(p: Floats) -> Floats:
    largest: Floats = p.max(axis=1)
    return 1 - largest


def _binary_entropy(s: Floats) -> Floats:
    return -(s * _logarithms(s) + (1 - s) * _logarithms(1 - s))


def _binary_margin(s: Floats) -> Floats:
    return 1 - np.abs(2 * s - 1)


def _binary_confidence(s: Floats) -> Floats:
    return 1 - s


Measure = Callable[[Floats], Floats]
CLASSES: dict[str, Measure] = {"entropy": _entropy, "margin": _margin, "least_confidence": _least_confidence}
"""By strategy, the uncertainty (r,) of probabilities (r, c), float64."""
BOXES: dict[str, Measure] = {"entropy": _binary_entropy, "margin": _binary_margin, "least_confidence": _binary_confidence}
"""By strategy, the uncertainty of scores, elementwise."""


def _of_classes(probs: torch.Tensor, measure: Measure) -> Floats:
    """Return the uncertainty of each row of probs (r, c), a few rows at a time."""
    out = np.empty(len(probs))
    step = max(1, CHUNK_ELEMENTS // max(1, probs.shape[1]))
    for start in range(0, len(probs), step):
        out[start : start + step] = measure(probs[start : start + step].double().numpy())
    return out


def _of_boxes(scores: torch.Tensor, measure: Measure, aggregate: str) -> Floats:
    """Return the aggregate of each row of scores (r, k), NaN beyond its last, as is the result without any.

    Sums are taken in the order of the boxes, so that they don't depend on k.
    """
    count, total, most = np.zeros(len(scores)), np.zeros(len(scores)), np.full(len(scores), -np.inf)
    for column in scores.T:
        s = column.double().numpy()
        there = ~np.isnan(s)
        value = measure(s[there])
        count[there] += 1
        total[there] += value
        most[there] = np.maximum(most[there], value)
    total = total / np.maximum(count, 1) if aggregate == "mean" else total
    return np.where(count > 0, most if aggregate == "max" else total, np.nan)


def uncertainty(block: Block, name: str, aggregate: str) -> Floats:
    """Return how unsure a model is of each image of a block, (r,) float64; NaN for one without boxes."""
    if "score" in block.predictions:
        return _of_boxes(block.predicted("score"), BOXES[name], aggregate)
    return _of_classes(block.predicted("probs"), CLASSES[name])


def _largest(block: Block, value: Callable[[Block], Floats], taken: Ints, m: int) -> Ranked:
    """Return the m eligible rows of largest value (negated), `taken` left out, the smaller one of equal ones first."""
    if "values" not in block.state:
        block.state["values"] = value(block)
    values = block.state["values"]
    known = block.eligible & ~np.isnan(values) & ~np.isin(block.rows, taken)
    return smallest(-values[known], block.rows[known], m)


def ranked(shards: Shards, request: Request, value: Callable[[Block], Floats]) -> Iterator[Step]:
    """Pick the images of largest value, which is their gain; ties go to the smaller row.

    `value` gives those of a block's images, (r,) float64. Images that have none (NaN) come last, in a seeded order (gain
    empty). Smaller budgets are prefixes.
    """

    def find(taken: Ints, m: int) -> Ranked:
        found: Ranked = shards.map(_largest, value, taken, m, combine=partial(merge_smallest, m))
        return found

    negated, rows = first_allowed(shards, request, find, np.empty(0, dtype=np.int64))
    rest = draw(shards, request, (WITHOUT_BOXES,), rows)
    gains = np.concatenate([-negated, np.full(len(rest), np.nan)])
    yield Step(1, 1, np.concatenate([rows, rest]), gains)


def _least_sure(name: str, shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Pick the images of largest uncertainty, which is their gain; those in which a detector found no box come last."""
    yield from ranked(shards, request, partial(uncertainty, name=name, aggregate=options.aggregate))


entropy = partial(_least_sure, "entropy")
margin = partial(_least_sure, "margin")
least_confidence = partial(_least_sure, "least_confidence")
