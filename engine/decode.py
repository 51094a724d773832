"""From the bytes of one image file to 8-bit RGB, or a reason why not."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded. Pillow knows more, and goes by a file's content, not its name: of EPS it makes a picture by starting
Ghostscript, which no image of a pool may do."""
NO_IMAGE = "not an image file: no JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, PPM or JPEG 2000"

SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


class BadImageError(ValueError):
    """This image cannot be used; the message is the reason written to rejected.parquet."""


def _to_8bit(image: Image.Image) -> Image.Image:
    """Return a 16-bit (or 32-bit integer holding 16-bit) grey image scaled to 8 bits: 65,535 becomes 255."""
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BadImageError(f"integer pixels from {low} to {high} have no known range")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT or image.mode == "I":
        image = _to_8bit(image)
    if image.mode == "F":
        raise BadImageError("floating-point pixels have no known range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


ORIENTATION = 0x0112
"""The EXIF tag of how an image is to be turned when it is shown."""
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError)
"""What Pillow's format plug-ins raise on damaged files."""


def read_header(data: bytes) -> tuple[tuple[int, int], int, str]:
    """Return an image's (width, height) in px as stored, its EXIF orientation (1: as stored) and its format's name.

    No pixel is decoded. Raises BadImageError with the reason.
    """
    Image.MAX_IMAGE_PIXELS = None  # nothing is decoded here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                found = image.getexif().get(ORIENTATION, 1)
                return image.size, found if found in range(1, 9) else 1, str(image.format)
    except UnidentifiedImageError:
        raise BadImageError("not an image file that Pillow knows" if data else "empty file") from None
    except DAMAGED as error:
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def decode(data: bytes, max_pixels: int, draft_px: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Return an RGB image and its (width, height) in px as stored.

    With `draft_px` a JPEG whose sides are both at least twice that is decoded at a half, a quarter or an eighth of its
    size, the smallest whose sides are not below it: the decoder leaves out the high frequencies of its own transform,
    which costs a fraction of the time and gives pixels that differ a little from those of resizing. The network's own
    resizing follows as ever.

    Grey, palette, CMYK and 16-bit images are converted, alpha is dropped, an animation gives its first frame; EXIF
    rotation is not applied (as in torchvision's and timm's loaders, with which the published features were made).
    The size is read from the header and checked against `max_pixels` before anything is decoded.

    Raises BadImageError with the reason.
    """
    if not data:
        raise BadImageError("empty file")
    Image.MAX_IMAGE_PIXELS = None  # the check below is ours, with the user's own limit
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata in images that decode well
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadImageError(f"{width} x {height} = {width * height:,} pixels is above --max-pixels {max_pixels:,}")
                if draft_px is not None:
                    image.draft(None, (draft_px, draft_px))
                return _to_rgb(image), (width, height)
    except UnidentifiedImageError:
        raise BadImageError(NO_IMAGE) from None
    except BadImageError:
        raise
    except DAMAGED as error:
        raise BadImageError(f"{type(error).__name__}: {error}") from error
