"""Classification: one class an image, by any of timm's networks with a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.arrays import Ints
from engine.backbones import network_input, preprocessing
from engine.decode import decode
from engine.images import Record
from engine.inputs import Input, Pixels
from engine.schema import MAX_PIXELS, InputError
from engine.tasks import Prediction, Result, Task
from engine.tasks.accuracy import accuracy
from engine.tasks.augment import Augment, build_augment, mix
from engine.tasks.classifier import Classifier, build_classifier, norms_of, rates_of
from engine.tasks.setup import Setup
from engine.verbs import ClassifyOptions

Example = tuple[torch.Tensor, int]
Batch = tuple[torch.Tensor, torch.Tensor]
"""Images (r, 3, height, width) float32, normalised; labels (r,) int64, or, where images are mixed, (r, classes) float32."""


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

    def predict(self, model: torch.nn.Module, pixels: Pixels, sizes: Ints) -> list[Prediction]:
        """Return each image's probabilities."""
        device = next(model.parameters()).device
        mean, std = (255 * torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (self.mean, self.std))
        with torch.inference_mode():
            images = torch.from_numpy(pixels).to(device, non_blocking=True).float().sub_(mean).div_(std)
            probabilities = model(images).float().softmax(dim=1).cpu().numpy()
        return list(probabilities)

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
