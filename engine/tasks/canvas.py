"""How a detector's image is prepared: resized by a rule, and laid into a canvas of one shape for every image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from engine.inputs import Pixels

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class CanvasInput:
    """A resized image in the top left corner of a black canvas of `short_px` rows and `long_px` columns.

    Its short side becomes `short_px`, or less where its long side would exceed `long_px`; both sides are rounded down.
    A portrait lies on its side in the canvas, which is therefore no square. With `square` every image is squeezed to
    fill the canvas. What `shape` says of an image's size is what `cut` takes out again.
    """

    short_px: int
    long_px: int
    square: bool
    interpolation: str

    @property
    def num_bytes(self) -> int:
        """Return the bytes of one image's canvas."""
        return 3 * self.short_px * self.long_px

    @property
    def wanted_px(self) -> int:
        """Return the short side."""
        return self.short_px

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """Return the height and width in px to which an image of this size is resized."""
        if self.square:
            return self.short_px, self.long_px
        short, long = min(width, height), max(width, height)
        fits = long * self.short_px <= self.long_px * short
        resized = (
            (self.short_px, long * self.short_px // short) if fits else (max(1, short * self.long_px // long), self.long_px)
        )
        return resized if height <= width else resized[::-1]

    def resize(self, image: Image.Image) -> Pixels:
        """Return the image resized, (3, height, width) uint8: what a detector sees in training and elsewhere."""
        height, width = self.shape(*image.size)
        resized = image.resize((width, height), FILTERS[self.interpolation])
        return np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1)

    def prepare(self, image: Image.Image) -> Pixels:
        """Return the canvas with the image, (3, short_px, long_px) uint8."""
        pixels = self.resize(image)
        if pixels.shape[1] > pixels.shape[2]:
            pixels = pixels.transpose(0, 2, 1)
        canvas = np.zeros((3, self.short_px, self.long_px), dtype=np.uint8)
        canvas[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        return canvas

    def cut(self, canvas: Pixels, width: int, height: int) -> Pixels:
        """Return a view of the image in a canvas, upright; width and height are those of the image as stored."""
        tall, wide = self.shape(width, height)
        if tall > wide:
            return canvas[:, :wide, :tall].transpose(0, 2, 1)
        return canvas[:, :tall, :wide]
