"""From an RGB image to the 8-bit pixels that an encoder takes: what decoding needs to know of an encoder, no more.

An input is small and can be pickled: it travels to tasks that decode and never see the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.decode import BadImageError

Pixels = npt.NDArray[np.uint8]


class Input(Protocol):
    """What an encoder takes. Inputs that are equal give equal pixels: encoders share them."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes of one image's pixels."""

    @property
    def wanted_px(self) -> int:
        """Return the side in px below which an image loses by being decoded smaller than it is stored."""

    def prepare(self, image: Image.Image) -> Pixels:
        """Return the image's pixels, uint8, the same shape for every image; raises BadImageError where it can't."""


@dataclass(frozen=True)
class SquareInput:
    """The image squeezed (box filter) into a square, as a flat row of RGB."""

    side_px: int

    @property
    def num_bytes(self) -> int:
        """Return the bytes of one image's pixels."""
        return 3 * self.side_px**2

    @property
    def wanted_px(self) -> int:
        """Return the square's side."""
        return self.side_px

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (3 * side_px^2,) uint8."""
        small = image.resize((self.side_px, self.side_px), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.uint8).reshape(-1)


@dataclass(frozen=True)
class NetworkInput:
    """timm's evaluation transform up to 8-bit pixels; scaling to floats happens on the batch, beside the model."""

    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    max_pixels: int

    @property
    def num_bytes(self) -> int:
        """Return the bytes of one image's pixels."""
        return math.prod(self.input_size)

    @property
    def wanted_px(self) -> int:
        """Return the larger side of the resized image before it is cropped."""
        return math.ceil(max(self.input_size[1:]) / self.crop_pct)

    def prepare(self, image: Image.Image) -> Pixels:
        """Return (3, height, width) uint8; raises BadImageError for an image so narrow that resizing it is a bomb."""
        short, long = min(image.size), max(image.size)
        resized = min(self.input_size[1:]) / self.crop_pct
        if self.crop_mode == "center" and resized * resized * long / short > self.max_pixels:
            raise BadImageError(f"{image.width} x {image.height} pixels: resized by its short side it is above --max-pixels")
        return np.asarray(_transform(self)(image), dtype=np.uint8)


@functools.lru_cache(maxsize=8)
def _transform(given: NetworkInput) -> Callable[[Image.Image], Any]:
    from timm.data import create_transform

    transform: Callable[[Image.Image], Any] = create_transform(
        given.input_size,
        interpolation=given.interpolation,
        crop_pct=given.crop_pct,
        crop_mode=given.crop_mode,
        is_training=False,
        use_prefetcher=True,
    )
    return transform
