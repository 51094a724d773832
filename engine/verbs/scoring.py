"""Options of the encoders that score images by a trained model: what `--encoder-option` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.schema import Opt


@dataclass(frozen=True, kw_only=True)
class SimilarityOptions:
    """What of a model is differentiated, and against which labels of its own making."""

    parameters: Annotated[
        str | None,
        Opt(
            "Which count: all (but biases and norms), head (the same of it), or a regular expression that names are searched "
            "for. Default: all of a classifier, a detector's head."
        ),
    ] = None
    pseudo: Annotated[
        str | None,
        Opt(
            "Classifiers: the likeliest class, or the loss expected over the ten likeliest. Default: argmax.",
            choices=("argmax", "expected"),
        ),
    ] = None
    pseudo_score: Annotated[
        float | None, Opt("Detectors: boxes of this score and more are pseudo labels. Default: 0.1.", min=0, max=1)
    ] = None


@dataclass(frozen=True, kw_only=True)
class InfluenceOptions(SimilarityOptions):
    """LiSSA's recursion, too. Defaults are ISAL's (Liu et al., ICCV 2021)."""

    damp: Annotated[float, Opt("Share of h that a step forgets.", min=0, max=0.999)] = 0.01
    scale: Annotated[
        tuple[float, ...],
        Opt(
            "What a Hessian product is divided by, one for all, or one for each group of the head. Default: 1e4 (classifiers); "
            "100,8000,5000 (FCOS: classes, boxes, centerness); 1000,1000,5000,1000 (Faster R-CNN: RPN, then boxes); 1000.",
            min=1e-6,
        ),
    ] = ()
    restarts: Annotated[int | None, Opt("Recursions averaged. Default: 4; detectors 1.", min=1, max=10_000)] = None
    steps: Annotated[int | None, Opt("Steps of a recursion. Default: 250; detectors 1000.", min=1, max=10_000_000)] = None
    images: Annotated[int, Opt("Labelled images of a step.", min=1, max=4096)] = 1


@dataclass(frozen=True, kw_only=True)
class StabilityOptions:
    """Localisation stability."""

    noise: Annotated[
        tuple[float, ...],
        Opt("Levels: standard deviations of the noise on 8-bit pixels.", min=0, max=255),
    ] = (8.0, 16.0, 24.0, 32.0, 40.0, 48.0)


SCORING: dict[str, type[SimilarityOptions] | type[StabilityOptions]] = {
    "influence": InfluenceOptions,
    "gradient_similarity": SimilarityOptions,
    "stability": StabilityOptions,
}
"""By encoder, its options."""
