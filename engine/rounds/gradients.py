"""Influence on a linear head's loss, of stored vectors: what the encoders of the same names give of a network's images.

A head is small enough that all of it is done again whenever it is asked for: v and h in a second, the scores of a block
in one forward-mode product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.canonical import single_thread
from engine.draws import random_uniform
from engine.evaluate import Labelled
from engine.influence import Gradient, Losses, Recursion, forward_scores, influenced, lissa, reference_gradient
from engine.schema import InputError, Progress, build_options, parse_pairs
from engine.verbs import SCORING, InfluenceOptions, SimilarityOptions

DRAW = 83
"""The key of the draws of the vectors of LiSSA's steps."""
BATCH = 8192
HEAD = ("weight", "bias")
"""What a head's parameters are called."""
CALCULUS = Recursion()
"""ISAL's constants for classifiers, where no option says otherwise."""


@dataclass(frozen=True)
class Head:
    """A head and what of it is differentiated; `name` is the strategy that asks, `options` are those of its encoder."""

    model: torch.nn.Linear
    name: str
    options: SimilarityOptions
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """The influenced parameters: by default the weight, without the bias, as ISAL has it."""
        return influenced(self.model, self.options.parameters or "all", HEAD)


def head_options(name: str, pairs: tuple[str, ...]) -> SimilarityOptions:
    """Return the options of a scoring strategy; raises InputError for those that a head can't have."""
    options = build_options(SCORING[name], parse_pairs(pairs, "--encoder-option"), f"encoder {name!r}")
    assert isinstance(options, SimilarityOptions)
    if options.pseudo == "expected" or options.pseudo_score is not None:
        raise InputError(
            "options pseudo=expected and pseudo_score are for networks: a head's pseudo label is its likeliest class"
        )
    if isinstance(options, InfluenceOptions) and len(options.scale) > 1:
        raise InputError(f"option scale is {','.join(f'{value:g}' for value in options.scale)}: a head takes one value")
    return options


def losses_of(x: torch.Tensor, y: torch.Tensor) -> Losses:
    """Return the cross entropies (r,) of vectors x (r, d) with labels y (r,)."""

    def losses(model: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(x), y, reduction="none")

    return losses


def head_gradient(head: Head, train: Labelled, reference: Labelled, progress: Progress) -> Gradient:
    """Return h: v of the reference vectors, taken by `influence` through LiSSA over those trained on.

    The vectors of a step are drawn with replacement: a function of (seed, restart, step, slot).
    """
    y, labels = torch.tensor(reference.y), torch.tensor(train.y)

    def batches() -> Iterator[Losses]:
        for start in range(0, len(y), BATCH):
            yield losses_of(reference.x[start : start + BATCH], y[start : start + BATCH])

    def draw(restart: int, step: int) -> Losses:
        at = torch.from_numpy((random_uniform(head.seed, (DRAW, restart, step), slots) * len(labels)).astype(np.int64))
        return losses_of(train.x[at], labels[at])

    with single_thread():
        v = reference_gradient(head.model, head.names, batches())
        if not isinstance(head.options, InfluenceOptions):
            return v
        given, slots = head.options, np.arange(head.options.images, dtype=np.int64)
        scale = given.scale[0] if given.scale else CALCULUS.scale
        recursion = Recursion(given.damp, scale, given.restarts or CALCULUS.restarts, given.steps or CALCULUS.steps)
        return lissa(head.model, head.names, v, draw, recursion, progress)


def head_scores(head: Head, h: Gradient, num_images: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return vectors (r, d) -> their scores (r, 1), lower is better, with the likeliest class for a label."""

    def scores(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            likeliest = head.model(x).argmax(dim=1)
        return (forward_scores(head.model, head.names, h, losses_of(x, likeliest)).double() / num_images).float()[:, None]

    return scores
