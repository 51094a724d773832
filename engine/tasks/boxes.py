"""A detector's training examples: boxes that follow their image through augmentation and resizing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from engine.images import Record
from engine.tasks.canvas import CanvasInput

Example = dict[str, torch.Tensor]
"""image (3, height, width) uint8; boxes (m, 4) float32: left, top, right, bottom in px of that image; labels (m,) int64."""

CROP_PX = 4
"""Images with a shorter side are not cropped: a crop may take three tenths of a side, which must be a pixel at least."""


@functools.lru_cache(maxsize=4)
def _steps(augment: str, fill: tuple[int, ...]) -> tuple[Any, ...]:
    flip = v2.RandomHorizontalFlip(0.5)
    if augment == "none":
        return ()
    if augment == "flip":
        return (flip,)
    return v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=list(fill)), v2.RandomIoUCrop(), flip


def placed(boxes: torch.Tensor, labels: torch.Tensor, size: Sequence[int], resized: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return boxes (left, top, right, bottom) of an image of a size (width, height), as targets on the image resized.

    Clipped to it; those without area are left out.
    """
    ends = torch.tensor([*resized] * 2, dtype=torch.float32)
    found = (boxes * (ends / torch.tensor([*size] * 2, dtype=torch.float32))).clamp(min=torch.zeros(4), max=ends)
    area = (found[:, 2:] > found[:, :2]).all(1)
    return {"boxes": found[area], "labels": labels[area]}


def corners_of(record: Record) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the boxes of an image that are targets, (m, 4) left, top, right, bottom in px as stored, and their classes.

    Crowds are none.
    """
    kept = ~record.crowd
    corners = record.boxes[kept].copy()
    corners[:, 2:] += corners[:, :2]
    return torch.from_numpy(corners), torch.from_numpy(record.box_labels[kept])


def make_example(record: Record, image: Image.Image, given: CanvasInput, augment: str, fill: tuple[int, ...]) -> Example:
    """Return an image and its boxes, augmented by draws from torch's global generator, and resized as `given` says.

    `none`; `flip`: half of the images from left to right; `ssd` (Liu et al., 2016, section 2.2): colours distorted,
    half of the images shrunk on a canvas of the colour `fill`, a random crop that has an overlap of a random least IoU
    with one box at least, flip. Boxes are clipped to the image; those without area left, those whose centre a crop cut
    off, and crowds are no targets.
    """
    corners, labels = corners_of(record)
    # boxes and labels travel together, so that a step that drops boxes could not part them
    boxes: Any = tv_tensors.BoundingBoxes(
        corners,
        format="XYXY",
        canvas_size=(image.height, image.width),
    )
    for step in _steps(augment, fill):
        if not (isinstance(step, v2.RandomIoUCrop) and min(image.size) < CROP_PX):
            image, boxes = step(image, boxes)
    pixels = given.resize(image)
    targets = placed(boxes.as_subclass(torch.Tensor), labels, image.size, pixels.shape[:0:-1])
    return {"image": torch.from_numpy(np.ascontiguousarray(pixels)), **targets}
