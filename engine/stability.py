"""The encoder `stability`: how much a detector's boxes move when its image is made noisy (Kao et al., ACCV 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.arrays import Floats, Ints
from engine.inputs import Pixels
from engine.models import Models
from engine.predictors import Predictor
from engine.scorers import check_plain, own_options
from engine.store import DETECTIONS, STABILITY
from engine.tasks import Prediction
from engine.verbs import EmbedOptions

NOISE = 83
"""The key of the noise's draws."""


def best_overlaps(boxes: Prediction, others: Prediction) -> Floats:
    """Return, for each of boxes (m, 6), the largest IoU with any of the others (k, 6), (m,); 0 where there is none."""
    if len(boxes) == 0 or len(others) == 0:
        return np.zeros(len(boxes))
    a, b = boxes[:, None, :4].astype(np.float64), others[None, :, :4].astype(np.float64)
    ends = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    shared = np.clip(ends - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(axis=-1)
    area = a[..., 2:].prod(axis=-1) + b[..., 2:].prod(axis=-1) - shared
    overlaps = np.divide(shared, area, out=np.zeros_like(shared), where=area > 0)
    return np.asarray(overlaps.max(axis=1), dtype=np.float64)


def stability(clean: Prediction, noisy: Sequence[Prediction]) -> float:
    """Return an image's localisation stability in 0..1 from its boxes (m, 6) and those of its noisy copies; NaN without boxes.

    The IoU of a box with the best overlapping one of a copy, of whatever class, is averaged over the copies; the mean over
    the boxes is weighted by their scores.
    """
    if len(clean) == 0:
        return float("nan")
    each, weight = np.mean([best_overlaps(clean, boxes) for boxes in noisy], axis=0), clean[:, 4].astype(np.float64)
    return float((weight * each).sum() / weight.sum() if weight.sum() > 0 else each.mean())


class StabilityEncoder:
    """How little a detector's boxes move under noise (localisation stability), higher is steadier; needs --checkpoint."""

    column = STABILITY
    dim = vectors_per_image = 1

    def __init__(self, options: EmbedOptions, models: Models) -> None:
        check_plain(options, "stability")
        self.predictor = Predictor(options, models, DETECTIONS, "stability")
        self.input = self.predictor.task.input
        self.options, self.seed = own_options(options, "stability"), options.seed

    def _noisy(self, pixels: Pixels, rows: Ints, level: int) -> Pixels:
        """Return images with Gaussian noise added to their 8-bit pixels, drawn by (seed, row, level)."""
        out = np.empty_like(pixels)
        for at, row in enumerate(rows.tolist()):
            drawn = np.random.default_rng([self.seed, NOISE, row, level]).standard_normal(pixels.shape[1:], dtype=np.float32)
            out[at] = np.rint(np.clip(pixels[at] + np.float32(self.options.noise[level]) * drawn, 0, 255))
        return out

    def encode(self, batch: Pixels, rows: Ints, sizes: Ints) -> npt.NDArray[np.float32]:
        """Return (len(batch), 1), NaN for an image in which the detector finds nothing."""
        clean = self.predictor.predict(batch, sizes)
        levels = range(len(self.options.noise))
        noisy = [self.predictor.predict(self._noisy(batch, rows, level), sizes) for level in levels]
        values = [stability(boxes, copies) for boxes, *copies in zip(clean, *noisy, strict=True)]
        return np.array(values, dtype=np.float32)[:, None]

    def describe(self) -> dict[str, Any]:
        """Return whose boxes, and the levels of noise."""
        return {**self.predictor.describe(), "options": asdict(self.options)}
