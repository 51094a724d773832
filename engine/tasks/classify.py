"""Classification: one class an image, by any of timm's networks with a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.arrays import Ints
from engine.backbones import network_input, preprocessing
from engine.decode import decode
from engine.images import Record
from engine.inputs import Input, Pixels
from engine.schema import MAX_PIXELS, InputError
from engine.tasks import Calculus, Prediction, Result, Target, Task
from engine.tasks.accuracy import accuracy
from engine.tasks.augment import Augment, build_augment, mix
from engine.tasks.calculus import EXPECTED_CLASSES
from engine.tasks.classifier import Classifier, build_classifier, norms_of, rates_of
from engine.tasks.heads import parameters_of
from engine.tasks.setup import Setup
from engine.verbs import ClassifyOptions

Example = tuple[torch.Tensor, int]
Batch = tuple[torch.Tensor, torch.Tensor]
"""Images (r, 3, height, width) float32, normalised; labels (r,) int64, or, where images are mixed, (r, classes) float32."""

CALCULUS = Calculus("all", restarts=4, steps=250, scale=1e4, scales={"head": 1e4}, batched=True)
"""ISAL's for classifiers (Liu et al., ICCV 2021)."""


@dataclass
class Classify:
    """The task; see `Task` for what its methods give."""

    setup: Setup
    training: ClassifyOptions
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    input: Input
    augment: Augment
    column: str = "probs"
    criterion: str = "top1"
    calculus: Calculus = field(default_factory=lambda: CALCULUS)

    def build(self, pretrained: bool) -> torch.nn.Module:
        """Return the classifier: its head is new, unless the weights are a checkpoint's with the same classes."""
        return build_classifier(self.setup, self.training, self.input_size, pretrained)

    def rates(self, model: torch.nn.Module) -> dict[str, float]:
        """Return the head's rate and the backbone's, layer by layer; `linear` trains the head alone."""
        assert isinstance(model, Classifier)
        return rates_of(model, self.training)

    def train_mode(self, model: torch.nn.Module) -> None:
        """Put the model into training mode, but for a frozen backbone and frozen batch norms."""
        assert isinstance(model, Classifier)
        model.train()
        if self.training.mode == "linear":
            model.backbone.eval()
        for norm in norms_of(model) if self.training.freeze_norm else ():
            norm.eval()

    def check(self, record: Record) -> str | None:
        """Return why an image can't be used: no label, or one that the head does not know."""
        if record.label < 0:
            return "no label"
        known = len(self.setup.class_names)
        return f"label {record.label}, and the head knows classes 0 to {known - 1}" if record.label >= known else None

    def example(self, record: Record) -> Example:
        """Return the augmented image and its label; raises BadImageError where it can't be decoded."""
        image, _ = decode(record.data, MAX_PIXELS)
        return self.augment(image), record.label

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return images and labels, mixed where mixup or cutmix is on."""
        images = torch.stack([image for image, _ in examples])
        labels = torch.tensor([label for _, label in examples])
        if self.training.mixup or self.training.cutmix:
            labels = mix(images, labels, self.training, len(self.setup.class_names))
        return images, labels

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross entropy; mixed labels are smoothed already."""
        images, labels = batch
        smoothing = 0.0 if labels.is_floating_point() else self.training.label_smoothing
        return torch.nn.functional.cross_entropy(model(images).float(), labels, label_smoothing=smoothing)

    def _images(self, model: torch.nn.Module, pixels: Pixels) -> torch.Tensor:
        device = next(model.parameters()).device
        mean, std = (255 * torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return torch.from_numpy(pixels).to(device, non_blocking=True).float().sub_(mean).div_(std)

    def predict(self, model: torch.nn.Module, pixels: Pixels, sizes: Ints) -> list[Prediction]:
        """Return each image's probabilities."""
        with torch.inference_mode():
            probabilities = model(self._images(model, pixels)).float().softmax(dim=1).cpu().numpy()
        return list(probabilities)

    def heads(self, model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
        """Return the linear layer's parameters: one group."""
        return {"head": parameters_of(model, ["head"])}

    def targets(self, records: Sequence[Record], sizes: Ints) -> list[Target]:
        """Return the labels."""
        return [record.label for record in records]

    def pseudo(
        self, model: torch.nn.Module, pixels: Pixels, sizes: Ints, expected: bool, least_score: float
    ) -> list[Target | None]:
        """Return the likeliest class of each image, or the ten likeliest by their renormalised probabilities."""
        probabilities = np.array(self.predict(model, pixels, sizes), dtype=np.float32)
        if not expected:
            return list(probabilities.argmax(axis=1).tolist())
        lowest = np.argsort(-probabilities, axis=1, kind="stable")[:, EXPECTED_CLASSES:]
        np.put_along_axis(probabilities, lowest, 0, axis=1)
        return list(torch.from_numpy(probabilities / probabilities.sum(axis=1, keepdims=True)))

    def losses(
        self, model: torch.nn.Module, pixels: Pixels, sizes: Ints, targets: Sequence[Target], keys: Sequence[int]
    ) -> torch.Tensor:
        """Return each image's cross entropy, without the label smoothing of training.

        That of several classes by their probabilities is the expected loss over them.
        """
        logits = model(self._images(model, pixels)).float()
        wanted = torch.stack(list(targets)) if isinstance(targets[0], torch.Tensor) else torch.tensor(list(targets))
        return torch.nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="none")

    def measure(self, predictions: Sequence[Prediction], records: Sequence[Record]) -> list[Result]:
        """Return accuracies in percent."""
        names = self.setup.class_names
        table = np.array(predictions, dtype=np.float32).reshape(-1, len(names))
        return accuracy(table, np.array([record.label for record in records], dtype=np.int64), names)


def build(setup: Setup) -> Task:
    """Return the task; raises InputError for a model that is not known or options that don't go together."""
    training = setup.training
    assert isinstance(training, ClassifyOptions)
    if training.lr == 0 and training.backbone_lr is not None:
        raise InputError(
            f"option lr is 0 and backbone_lr {training.backbone_lr}: rates are relative to lr, which must be positive"
        )
    config = preprocessing(setup.model, setup)
    given = network_input(config, MAX_PIXELS)
    augment = build_augment(training, given, config)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Classify(setup, training, mean, std, given.input_size, given, augment)
