"""Detection: boxes of classes in images, by torchvision's detectors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from engine.arrays import Ints
from engine.decode import decode
from engine.images import Record
from engine.inputs import Input, Pixels
from engine.places import Place
from engine.schema import MAX_PIXELS, InputError
from engine.tasks import Calculus, Prediction, Result, Target, Task
from engine.tasks.boxes import Example, corners_of, make_example, placed
from engine.tasks.canvas import CanvasInput
from engine.tasks.coco import box_ap
from engine.tasks.detectors import PRETRAINED, Kind, build_detector, canvas_of, kind_of
from engine.tasks.heads import detector_calculus, detector_heads, giving_losses
from engine.tasks.setup import WEIGHTS, Setup, starting_checkpoint
from engine.verbs import DetectOptions
from engine.weights import read_state

Batch = tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]
"""Images (3, height, width) uint8 of several sizes, and the boxes and labels of each."""


@dataclass
class Detect:
    """The task; see `Task` for what its methods give."""

    setup: Setup
    training: DetectOptions
    kind: Kind
    canvas: CanvasInput
    input: Input
    calculus: Calculus
    column: str = "detections"
    criterion: str = "AP"

    def build(self, pretrained: bool) -> torch.nn.Module:
        """Return the detector; a checkpoint folder as weights gives all of it, else they are the backbone's."""
        folder = pretrained and starting_checkpoint(self.setup, ("task", "model", "model_option", "class_names"))
        model: torch.nn.Module = build_detector(self.setup, pretrained and not folder)
        if folder:
            model.load_state_dict(read_state(Place(self.setup.weights).at(WEIGHTS).address))
        return model

    def rates(self, model: torch.nn.Module) -> dict[str, float]:
        """Return 1 for what is new, `backbone_lr` over `lr` for the pretrained network; what is frozen is left out."""
        training = self.training
        ratio = 1.0 if training.backbone_lr is None else training.backbone_lr / training.lr
        return {
            name: ratio if PRETRAINED.match(name) else 1.0
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def train_mode(self, model: torch.nn.Module) -> None:
        """Put the model into training mode, but for frozen batch norms, which keep their statistics."""
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
                module.eval()

    def check(self, record: Record) -> str | None:
        """Return why an image can't be used: a box of a class that the detector does not know."""
        unknown = record.box_labels[(record.box_labels < 0) | (record.box_labels >= len(self.setup.class_names))]
        if not len(unknown):
            return None
        return f"a box of class {unknown[0]}, and the detector knows classes 0 to {len(self.setup.class_names) - 1}"

    def example(self, record: Record) -> Example:
        """Return the image as evaluation sees it, but for augmentation, and its boxes."""
        image, _ = decode(record.data, MAX_PIXELS)
        return make_example(record, image, self.canvas, self.training.augment, (124, 116, 104))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the images and their targets, with the head's own class numbers."""
        targets = [{"boxes": one["boxes"], "labels": one["labels"] + self.kind.offset} for one in examples]
        return [one["image"] for one in examples], targets

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the sum of the detector's losses, each averaged as torchvision does (FCOS, SSD: over the batch's boxes).

        An image without boxes is all background; SSD, whose negatives are three to a positive, learns nothing from it.
        One image alone (the rest of an epoch) is normalised by running statistics: SSDlite's coarsest map is a pixel, and
        has no variance.
        """
        images, targets = batch
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
        for module in norms:
            module.train(len(images) > 1)
        losses: dict[str, torch.Tensor] = model([image.float() / 255 for image in images], targets)
        for module in norms:
            module.train()
        return torch.stack(list(losses.values())).sum()

    def predict(self, model: torch.nn.Module, pixels: Pixels, sizes: Ints) -> list[Prediction]:
        """Return each image's boxes in px as stored.

        Images that pad to one shape go through the model together, so that what an image gives does not depend on those
        beside it.
        """
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for at, (width, height) in enumerate(sizes.tolist()):
            tall, wide = self.canvas.shape(width, height)
            groups[-(-tall // 32), -(-wide // 32)].append(at)
        device = next(model.parameters()).device
        found: dict[int, Prediction] = {}
        with torch.inference_mode():
            for rows in groups.values():
                cut = [np.ascontiguousarray(self.canvas.cut(pixels[at], *sizes[at].tolist())) for at in rows]
                images = [torch.from_numpy(image).to(device).float() / 255 for image in cut]
                for at, image, boxes in zip(rows, cut, model(images), strict=True):
                    found[at] = self._stored(boxes, image.shape[2] / sizes[at, 0], image.shape[1] / sizes[at, 1])
        return [found[at] for at in range(len(sizes))]

    def heads(self, model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
        """Return the parameters of the last layer of each of the head's outputs."""
        return detector_heads(model, self.kind.head)

    def _targets(self, boxes: torch.Tensor, labels: torch.Tensor, size: Sequence[int]) -> dict[str, torch.Tensor]:
        tall, wide = self.canvas.shape(*size)
        return placed(boxes, labels + self.kind.offset, size, (wide, tall))

    def targets(self, records: Sequence[Record], sizes: Ints) -> list[Target]:
        """Return the boxes that were drawn, but for crowds; an image may have none: it is all background."""
        return [self._targets(*corners_of(record), size) for record, size in zip(records, sizes.tolist(), strict=True)]

    def pseudo(
        self, model: torch.nn.Module, pixels: Pixels, sizes: Ints, expected: bool, least_score: float
    ) -> list[Target | None]:
        """Return the boxes that the model finds of `least_score` and more; None where there is none."""
        found: list[Target | None] = []
        for boxes, size in zip(self.predict(model, pixels, sizes), sizes.tolist(), strict=True):
            sure = torch.from_numpy(boxes[boxes[:, 4] >= least_score])
            corners = torch.cat([sure[:, :2], sure[:, :2] + sure[:, 2:4]], dim=1)
            target = self._targets(corners, sure[:, 5].long(), size)
            found.append(target if len(target["labels"]) else None)
        return found

    def losses(
        self, model: torch.nn.Module, pixels: Pixels, sizes: Ints, targets: Sequence[Target], keys: Sequence[int]
    ) -> torch.Tensor:
        """Return the sum of the detector's losses for each image, taken alone: torchvision averages over a batch's boxes."""
        device = next(model.parameters()).device
        losses = []
        for own, size, target, key in zip(pixels, sizes.tolist(), targets, keys, strict=True):
            image = torch.from_numpy(np.ascontiguousarray(self.canvas.cut(own, *size))).to(device).float() / 255
            with torch.random.fork_rng([device] if device.type == "cuda" else []), giving_losses(model):
                torch.manual_seed(key)
                found: dict[str, torch.Tensor] = model([image], [{name: value.to(device) for name, value in target.items()}])
            losses.append(torch.stack(list(found.values())).sum())
        return torch.stack(losses)

    def _stored(self, boxes: dict[str, torch.Tensor], scale_x: float, scale_y: float) -> Prediction:
        """Return a model's boxes of one image as (m, 6), best first, by its scale in both directions."""
        corners = boxes["boxes"].cpu().double().numpy() / [scale_x, scale_y, scale_x, scale_y]
        scores, labels = boxes["scores"].cpu().numpy(), boxes["labels"].cpu().numpy() - self.kind.offset
        table = np.column_stack([corners[:, :2], corners[:, 2:] - corners[:, :2], scores, labels])
        return table[np.argsort(-scores, kind="stable")].astype(np.float32)

    def measure(self, predictions: Sequence[Prediction], records: Sequence[Record]) -> list[Result]:
        """Return COCO's box AP and its other figures, then AP of each class."""
        return box_ap(predictions, records, self.setup.class_names)


def build(setup: Setup) -> Task:
    """Return the task; raises InputError for a model that is not known or options that it does not take."""
    training = setup.training
    assert isinstance(training, DetectOptions)
    if training.layer_decay != 1:
        raise InputError(
            f"option layer_decay is {training.layer_decay}: a detector takes backbone_lr and trainable_layers only"
        )
    if training.lr == 0 and training.backbone_lr is not None:
        raise InputError(
            f"option lr is 0 and backbone_lr {training.backbone_lr}: rates are relative to lr, which must be positive"
        )
    canvas = canvas_of(setup)
    kind = kind_of(setup.model)
    return Detect(setup, training, kind, canvas, canvas, detector_calculus(kind.head))
