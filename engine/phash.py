"""A 64-bit perceptual hash: images that look alike differ in few bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE_PX = 32
LOW = 8
SCALE = 1 << 20
"""Cosines are rounded to multiples of 1 / SCALE: sums of products with 8-bit greys stay below 2^58, exact in int64."""


def _cosines() -> npt.NDArray[np.int64]:
    """Return the first LOW rows of the DCT-II of SIDE_PX values, times SCALE, (LOW, SIDE_PX)."""
    angle = np.pi / (2 * SIDE_PX) * np.arange(LOW)[:, None] * (2 * np.arange(SIDE_PX) + 1)
    return np.asarray(np.rint(SCALE * np.cos(angle)), dtype=np.int64)


COSINES = _cosines()


def phash(image: Image.Image) -> int:
    """Return the perceptual hash of an image, 0 <= hash < 2^64.

    The usual definition (pHash, as in the `imagehash` package): grey (ITU-R 601 luma), resized to 32 x 32 with a Lanczos
    filter; the type-II discrete cosine transform in both directions; of its 8 x 8 lowest frequencies, the first
    included, each bit says whether a value is above their median. Row by row, the first bit is the most significant.
    The transform is computed in whole numbers, so a hash is the same on every machine: an image of one colour has no
    noise to be hashed.
    """
    grey = np.asarray(image.convert("L").resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS), dtype=np.int64)
    low = (COSINES @ grey @ COSINES.T).reshape(-1)
    ascending = np.sort(low)
    above = 2 * low > ascending[31] + ascending[32]
    return int.from_bytes(np.packbits(above).tobytes(), "big")
