"""Encoders that predict: a finetuned model's probabilities or boxes for each image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Ints
from engine.inputs import Pixels
from engine.models import Models
from engine.schema import InputError
from engine.store import BOX_VALUES, DETECTIONS
from engine.tasks import Prediction
from engine.verbs import EmbedOptions


class Predictor:
    """A checkpoint's task and model on their device; raises InputError where its predictions are not of `column`.

    `encoder` is the one that reads them, where it is not named like them.
    """

    def __init__(self, options: EmbedOptions, models: Models, column: str, encoder: str | None = None) -> None:
        self.options, self.device = options, models.device
        self.checkpoint, self.task, self.model = models.trained
        if self.task.column != column and encoder:
            raise InputError(f"--encoder {encoder} is for a detector, and {options.checkpoint} holds a classifier")
        if self.task.column != column:
            raise InputError(
                f"{options.checkpoint} holds a model for {self.checkpoint.setup.task}, which gives {self.task.column}: "
                f"--encoder {self.task.column}"
            )
        self.class_names = self.checkpoint.setup.class_names

    def predict(self, batch: Pixels, sizes: Ints) -> list[Prediction]:
        """Return the task's predictions of prepared images, in the precision asked for."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.options.precision == "bf16"):
            return self.task.predict(self.model, batch, sizes)

    def describe(self) -> dict[str, Any]:
        """Return whose predictions they are."""
        setup = self.checkpoint.setup
        return {
            "digest": self.checkpoint.digest(self.options.best),
            "task": setup.task,
            "model": setup.model,
            "class_names": list(self.class_names),
        }


class ProbsEncoder:
    """The probability of each class by the classifier of --checkpoint, float32."""

    column = "probs"
    vectors_per_image = 1

    def __init__(self, options: EmbedOptions, models: Models) -> None:
        self.predictor = Predictor(options, models, self.column)
        self.input = self.predictor.task.input
        self.dim = len(self.predictor.class_names)
        if options.compile:
            self.predictor.model = torch.compile(self.predictor.model, dynamic=False)  # type: ignore[assignment]

    def encode(self, batch: Pixels, rows: Ints, sizes: Ints) -> npt.NDArray[np.float32]:
        """Return (len(batch), classes)."""
        return np.stack(self.predictor.predict(batch, sizes))

    def describe(self) -> dict[str, Any]:
        """Return whose probabilities they are."""
        return self.predictor.describe()


class DetectionsEncoder:
    """The boxes that the detector of --checkpoint finds, with class and score, best first."""

    column = DETECTIONS
    vectors_per_image = 1
    dim = BOX_VALUES

    def __init__(self, options: EmbedOptions, models: Models) -> None:
        for name, given in (("draft", options.draft), ("compile", options.compile), ("dtype", options.dtype != "float32")):
            if given:
                raise InputError(f"--{name} is not for --encoder detections: boxes are in px of whole images, float32")
        self.predictor = Predictor(options, models, self.column)
        self.input = self.predictor.task.input

    def encode(self, batch: Pixels, rows: Ints, sizes: Ints) -> list[npt.NDArray[np.float32]]:
        """Return (m, 6) for each image: x, y, width, height in px as stored, score, class."""
        return self.predictor.predict(batch, sizes)

    def describe(self) -> dict[str, Any]:
        """Return whose boxes they are."""
        return self.predictor.describe()
