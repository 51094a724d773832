"""Predicted boxes drawn on an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#808000", "#000075")
"""Of classes, in turn: dark enough for white letters."""


def draw_boxes(image: Image.Image, boxes: npt.NDArray[np.floating[Any]], class_names: Sequence[str]) -> Image.Image:
    """Return a copy of an RGB image with boxes (m, 6): x, y, width, height in px, score, class; each in its class's colour.

    The class's name and the score stand above a box, or inside where there is no room above. The best box is drawn last,
    over the others. A NaN for a score leaves it out: a box of the truth.
    """
    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    line = max(1, round(min(image.size) / 200))
    font = ImageFont.load_default(max(10, round(min(image.size) / 32)))
    for x, y, width, height, score, label in reversed(boxes.astype(float).tolist()):
        colour = COLOURS[int(label) % len(COLOURS)]
        pen.rectangle((x, y, x + width, y + height), outline=colour, width=line)
        text = class_names[int(label)] + ("" if np.isnan(score) else f" {score:.2f}")
        left, top, right, bottom = font.getbbox(text)
        wide, high = right - left + 2 * line, bottom - top + 2 * line
        x = max(0.0, min(x, drawn.width - wide))
        y = y - high if y >= high else y
        pen.rectangle((x, y, x + wide, y + high), fill=colour)
        pen.text((x + line - left, y + line - top), text, fill="white", font=font)
    return drawn
