"""What a model is finetuned for: a module a task, named in `setup.TRAINING`, with `build(setup) -> Task`.

A task knows models, transforms, losses and metrics; it knows no optimiser, no files, no Ray. The trainer sees it through
`Task` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Ints
from engine.images import Record
from engine.inputs import Input, Pixels
from engine.tasks.calculus import Calculus
from engine.tasks.setup import Setup, setup_from

Prediction = npt.NDArray[np.float32]
"""Of one image. classify: (classes,) probabilities. detect: (m, 6) x, y, width, height in px of the image as stored,
score, class; best score first."""

Result = tuple[str, float | None, str]
"""(metric, value, note); the value is None where the metric is not defined, and the note says why."""

Target = Any
"""What one image's loss is measured against. classify: a class (an int), or (classes,) float32, their probabilities.
detect: `boxes` (m, 4) float32, left, top, right, bottom in px of the prepared image, `labels` (m,) int64, the head's own."""

Batch = Any
"""A task's own collated examples, tensors in lists, tuples and dicts only, so that they can be moved to a device."""


class Task(Protocol):
    """What every task's module builds."""

    setup: Setup
    column: str
    """Of a feature store that holds predictions: probs or detections."""
    input: Input
    """How images are prepared for evaluation and prediction."""
    criterion: str
    """The metric by which the best checkpoint is chosen; larger is better."""
    calculus: Calculus

    def build(self, pretrained: bool) -> torch.nn.Module:
        """Return the model, on the CPU: with the weights that the setup names, or, where not `pretrained`, any.

        What is initialised is a function of the global torch generator. Raises InputError for a model or weights that
        can't be had.
        """

    def rates(self, model: torch.nn.Module) -> dict[str, float]:
        """Return each trained parameter's rate relative to `lr`, by its name; a parameter left out is frozen."""

    def train_mode(self, model: torch.nn.Module) -> None:
        """Put the model into training mode, but for what stays as it is."""

    def check(self, record: Record) -> str | None:
        """Return why an image can't be trained or evaluated on (no label, ...), or None."""

    def example(self, record: Record) -> Any:
        """Return one image as a training example, augmented by draws from the global generators (torch, numpy, random)."""

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return examples as one batch; what mixes images draws from the global generators."""

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss over the images of a batch on the model's device, a scalar."""

    def predict(self, model: torch.nn.Module, pixels: Pixels, sizes: Ints) -> list[Prediction]:
        """Return what the model, in eval mode, says of a batch of images prepared by `input`.

        `sizes` (r, 2) are the images' width and height in px as stored.
        """

    def heads(self, model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
        """Return the names of the parameters of each group of the head, by the groups of `calculus.scales`."""

    def targets(self, records: Sequence[Record], sizes: Ints) -> list[Target]:
        """Return the true targets of images prepared by `input`; `sizes` as `predict` takes them."""

    def pseudo(
        self, model: torch.nn.Module, pixels: Pixels, sizes: Ints, expected: bool, least_score: float
    ) -> list[Target | None]:
        """Return targets of the model's own making for a batch of images prepared by `input`; None: it sees nothing there.

        classify: the likeliest class, or, if `expected`, the ten likeliest by their renormalised probabilities. detect: the
        boxes that it finds of `least_score` and more.
        """

    def losses(
        self, model: torch.nn.Module, pixels: Pixels, sizes: Ints, targets: Sequence[Target], keys: Sequence[int]
    ) -> torch.Tensor:
        """Return each image's loss (r,), differentiable; the model, in eval mode, computes what it does in evaluation.

        What the loss draws (Faster R-CNN: which proposals) is a function of the image's key, 0 <= key < 2^63.
        """

    def measure(self, predictions: Sequence[Prediction], records: Sequence[Record]) -> list[Result]:
        """Return the metrics of predictions against the truth, the most telling first. Records may lack their `data`."""


def build_task(setup: Setup) -> Task:
    """Return the task of a setup; raises InputError where the setup does not fit it."""
    import importlib

    module = importlib.import_module(f"engine.tasks.{setup.task}")
    task: Task = module.build(setup)
    return task


__all__ = ["Batch", "Calculus", "Prediction", "Result", "Setup", "Target", "Task", "build_task", "setup_from"]
