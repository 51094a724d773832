"""Training images for a classifier: crops, flips, colours, erasing, and mixtures of images, by timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from torchvision.transforms import RandomCrop

from engine.inputs import NetworkInput
from engine.schema import InputError
from engine.verbs import ClassifyOptions

PAD_PX = 4

Augment = Callable[[Image.Image], torch.Tensor]
"""An RGB image -> (3, height, width) float32, normalised; draws from the global generators of torch, numpy and random."""


@dataclass(frozen=True)
class AsEvaluated:
    """The image as evaluation sees it, so that what follows in training works on that."""

    input: NetworkInput

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return an RGB image of the network's size."""
        return Image.fromarray(self.input.prepare(image).transpose(1, 2, 0))


def build_augment(training: ClassifyOptions, given: NetworkInput, config: dict[str, Any]) -> Augment:
    """Return the training transform: crop, flip, RandAugment or colours, normalisation, erasing, in timm's order.

    `config` is the model's preprocessing. With `crop` pad and none the image is first prepared as in evaluation, where the
    papers' 32 px images stay what they are. Raises InputError for options that don't go together or that timm refuses.
    """
    scale = training.crop_scale
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise InputError(f"option crop_scale is {','.join(map(str, scale))}: give the least and the largest share, e.g. 0.08,1")
    if training.color_jitter and training.rand_augment:
        raise InputError("options color_jitter and rand_augment: timm takes one or the other; leave color_jitter at 0")
    try:
        first, colours, last = create_transform(
            given.input_size,
            is_training=True,
            scale=scale,
            hflip=0.5 if training.flip else 0.0,
            color_jitter=training.color_jitter or None,
            auto_augment=training.rand_augment,
            interpolation=given.interpolation,
            mean=config["mean"],
            std=config["std"],
            re_prob=training.erasing,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"option rand_augment is {training.rand_augment!r}, which timm does not know: {error}") from error
    resized, *flips = first.transforms
    crops = {
        "resized": [resized],
        "pad": [AsEvaluated(given), RandomCrop(given.input_size[1:], padding=PAD_PX)],
        "none": [AsEvaluated(given)],
    }
    steps = [*crops[training.crop], *flips, *colours.transforms, *last.transforms]

    def augment(image: Image.Image) -> Any:
        value: Any = image
        for step in steps:
            value = step(value)
        return value

    return augment


def mix(images: torch.Tensor, labels: torch.Tensor, training: ClassifyOptions, num_classes: int) -> torch.Tensor:
    """Mix images (r, 3, h, w) in place by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019); return targets (r, classes).

    One draw for the batch, half of them CutMix where both are on; image i mixes with image r - 1 - i. timm mixes pairs: of
    an odd number the last image stays as it is, with its own label.
    """
    mixer = Mixup(
        mixup_alpha=training.mixup,
        cutmix_alpha=training.cutmix,
        label_smoothing=training.label_smoothing,
        num_classes=num_classes,
    )
    even = len(images) // 2 * 2
    targets = [mixup_target(labels[even:], num_classes, 1.0, training.label_smoothing)]
    if even:
        targets.insert(0, mixer(images[:even], labels[:even])[1])
    return torch.cat(targets)
