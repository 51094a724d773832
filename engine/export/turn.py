"""Boxes on images that their EXIF orientation turns: what tools show is turned, what we store is not."""

from __future__ import annotations

from collections.abc import Callable

Box = tuple[float, float, float, float]
"""x, y, width, height in px."""
Size = tuple[float, float]
"""Width and height in px."""

TURNS: dict[int, Callable[[float, float, float, float], tuple[float, float]]] = {
    2: lambda x, y, w, h: (w - x, y),
    3: lambda x, y, w, h: (w - x, h - y),
    4: lambda x, y, w, h: (x, h - y),
    5: lambda x, y, w, h: (y, x),
    6: lambda x, y, w, h: (h - y, x),
    7: lambda x, y, w, h: (h - y, w - x),
    8: lambda x, y, w, h: (y, w - x),
}
"""Where a point of an image as stored, w x h px, is shown, by its orientation (EXIF 0x0112); 1 leaves it."""
SIDEWAYS = 5
"""From this orientation on width and height are exchanged."""


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the size of an image as it is shown."""
    return (size[1], size[0]) if orientation >= SIDEWAYS else size


def turned(box: Box, size: Size, orientation: int) -> Box:
    """Return a box on an image as stored as a box on the image as shown; `size` is that as stored."""
    if orientation not in TURNS:
        return box
    x, y, width, height = box
    corners = [TURNS[orientation](*corner, *size) for corner in ((x, y), (x + width, y + height))]
    (left, right), (top, bottom) = (sorted(values) for values in zip(*corners, strict=True))
    return left, top, right - left, bottom - top


def turned_back(box: Box, size: Size, orientation: int) -> Box:
    """Return a box on an image as shown as a box on it as stored; `size` is that as shown."""
    return turned(box, size, {6: 8, 8: 6}.get(orientation, orientation))
