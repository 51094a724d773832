"""Encoders: a batch of images -> feature columns. The ENCODERS table holds them all.

An encoder splits in two: its `input` turns one RGB image into 8-bit pixels of a fixed size, on any CPU; `encode` turns a
stacked batch of those into vectors, on the model's device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Ints
from engine.inputs import Input, Pixels, SquareInput
from engine.models import Models
from engine.patterns import Clustering, kept, map_features, patterns, transformer_features
from engine.predictors import DetectionsEncoder, ProbsEncoder
from engine.schema import InputError, fields_of, lookup
from engine.scorers import InfluenceEncoder, SimilarityEncoder
from engine.stability import StabilityEncoder
from engine.store import PATTERNS
from engine.verbs import SCORING, EmbedOptions

Vectors = npt.NDArray[np.float32]


class Encoder(Protocol):
    """What every entry of ENCODERS builds."""

    column: str
    dim: int
    vectors_per_image: int
    input: Input

    def encode(self, batch: Pixels, rows: Ints, sizes: Ints) -> Vectors | list[Vectors]:
        """Return (len(batch), dim) float32 vectors, or, for the columns `patterns` and `detections`, (k, dim) for each image.

        `rows` (len(batch),) are the images' pool rows, for an encoder that draws, `sizes` (len(batch), 2) their width and
        height in px as stored. Patterns: 1 <= k <= vectors_per_image; detections: any k.
        """

    def describe(self) -> dict[str, Any]:
        """Return what a manifest should say: the values in force after the model's own defaults."""


class PixelsEncoder:
    """The image itself, downsampled (box filter) to `pixels_size` squared RGB in [0, 1]: needs no weights."""

    column = "embedding"
    vectors_per_image = 1

    def __init__(self, options: EmbedOptions, models: Models) -> None:
        self.input: Input = SquareInput(options.pixels_size)
        self.side_px = options.pixels_size
        self.dim = 3 * self.side_px**2

    def encode(self, batch: Pixels, rows: Ints, sizes: Ints) -> Vectors:
        return batch.astype(np.float32) / np.float32(255)

    def describe(self) -> dict[str, Any]:
        return {"pixels_size": self.side_px}


class EmbeddingEncoder:
    """The pooled features of a timm backbone without its classifier, in eval mode, float32."""

    column = "embedding"
    vectors_per_image = 1

    def __init__(self, options: EmbedOptions, models: Models) -> None:
        self.network = models.network
        self.input: Input = self.network.input
        self.pooling = options.pooling
        if self.pooling == "cls" and getattr(self.network.model, "cls_token", None) is None:
            raise InputError(f"backbone {self.network.options.backbone!r} has no class token: --pooling mean or model")
        self.dim = int(self.network.run(self._pool, self.network.probe).shape[-1])
        self.forward = self.network.compiled(self._pool)

    def encode(self, batch: Pixels, rows: Ints, sizes: Ints) -> Vectors:
        vectors: Vectors = self.network.run(self.forward, batch).float().cpu().numpy()
        return vectors

    def _pool(self, images: torch.Tensor) -> torch.Tensor:
        model = self.network.model
        if self.pooling == "model":
            features: torch.Tensor = model(images)
            return features
        tokens: torch.Tensor = model.forward_features(images)
        if tokens.ndim == 4:
            nhwc = getattr(model, "output_fmt", "NCHW") == "NHWC"
            return tokens.mean(dim=(1, 2) if nhwc else (2, 3))
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        return tokens[:, 0] if self.pooling == "cls" else tokens[:, prefix:].mean(dim=1)

    def describe(self) -> dict[str, Any]:
        return self.network.describe()


class PatternsEncoder:
    """Up to `num_patterns` k-means centres of the local features that carry `attention_ratio` of an image's attention."""

    column = PATTERNS

    def __init__(self, options: EmbedOptions, models: Models) -> None:
        self.network = models.network
        self.input: Input = self.network.input
        self.ratio = options.attention_ratio
        self.clustering = Clustering(options.num_patterns, options.pattern_metric, options.seed)
        self.vectors_per_image = options.num_patterns
        local = _local_features(self.network.model, self.network.options.backbone)
        features, _ = self.network.run(local, self.network.probe)
        self.dim = int(features.shape[-1])
        self.forward = self.network.compiled(local)

    def encode(self, batch: Pixels, rows: Ints, sizes: Ints) -> list[Vectors]:
        features, weights = self.network.run(self.forward, batch)
        return patterns(features.float(), kept(weights.float(), self.ratio), rows, self.clustering)

    def describe(self) -> dict[str, Any]:
        clustering = self.clustering
        return {
            **self.network.describe(),
            "num_patterns": clustering.k,
            "attention_ratio": self.ratio,
            "pattern_metric": clustering.metric,
            "seed": clustering.seed,
        }


def _local_features(model: Any, name: str) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return images -> local features (r, p, d) and their weights (r, p); raises InputError for a backbone without."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    if isinstance(model, VisionTransformer):
        last = model.blocks[-1]
        if model.cls_token is None or len(model.blocks) < 2 or type(last) is not Block or type(last.attn) is not Attention:
            raise InputError(
                f"backbone {name!r} gives no patterns: "
                "a transformer needs a class token, two blocks or more, and plain attention"
            )
        return functools.partial(transformer_features, model)

    def of_maps(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps: torch.Tensor = model.forward_features(images)
        if maps.ndim != 4:
            raise InputError(f"backbone {name!r} gives no patterns: take a vision transformer or a convolutional network")
        return map_features(maps.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else maps)

    return of_maps


ENCODERS: dict[str, Callable[[EmbedOptions, Models], Encoder]] = {
    "embedding": EmbeddingEncoder,
    "patterns": PatternsEncoder,
    "pixels": PixelsEncoder,
    "probs": ProbsEncoder,
    "detections": DetectionsEncoder,
    "influence": InfluenceEncoder,
    "gradient_similarity": SimilarityEncoder,
    "stability": StabilityEncoder,
}

ALONE = frozenset(("embedding", "pixels", "probs"))
"""Encoders whose vector is a function of the image and the options alone: the images beside it and its row make no odds.

Kernels round differently in batches of other sizes, so theirs are all of one size: a part's last one is filled up.
"""


def encoder_names(text: str) -> tuple[str, ...]:
    """Parse `embedding,patterns` into distinct names of ENCODERS, in the order given; raises InputError otherwise."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        lookup(name, ENCODERS, "encoder")
    if len(set(names)) < len(names):
        raise InputError(f"--encoder {text!r} names an encoder twice")
    return names


def build_encoders(options: EmbedOptions, device: str, folders: Mapping[str, str] | None = None) -> dict[str, Encoder]:
    """Return the encoders that `options.encoder` names, by name, on a device ('cpu', 'cuda'), with one network for all.

    `folders` are the places of their stores, where some find what was made for them: needed to encode with those. Raises
    InputError for a model that can't be had, and an encoder that can't have it.
    """
    models = Models(options, device, folders)
    return {name: ENCODERS[name](options, models) for name in encoder_names(options.encoder)}


@functools.cache
def encoder_help() -> dict[str, str]:
    """Return name -> what it gives, from the docstrings of the table."""
    return {name: " ".join((build.__doc__ or "").split()) for name, build in ENCODERS.items()}


def encoder_options() -> dict[str, list[dict[str, Any]]]:
    """Return name -> the options that `--encoder-option` takes for it: name, default, choices, help."""
    return {
        name: [
            {"name": field.name, "default": field.default, "choices": list(field.opt.choices), "help": field.opt.help}
            for field in fields_of(options)
        ]
        for name, options in SCORING.items()
    }
