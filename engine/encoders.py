"""Encoders: a batch of images -> feature columns. The ENCODERS table holds them all.

An encoder splits in two: `prepare` turns one RGB image into 8-bit pixels of a fixed size, on CPU threads; `encode`
turns a stacked batch of those into vectors, on the model's device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from engine.arrays import Ints
from engine.decode import BadImageError
from engine.patterns import Clustering, kept, map_features, patterns, transformer_features
from engine.schema import InputError, lookup, nearest, parse_pairs
from engine.store import PATTERNS
from engine.verbs import EmbedOptions
from engine.weights import load_backbone

NO_FILE = ("hub", "random")
"""Values of `weights` that name no file."""

Pixels = npt.NDArray[np.uint8]
Vectors = npt.NDArray[np.float32]


class Encoder(Protocol):
    """What every entry of ENCODERS builds."""

    column: str
    dim: int
    vectors_per_image: int

    def prepare(self, image: Image.Image) -> Pixels:
        """Return the image's pixels, uint8, the same shape for every image; raises BadImageError where it can't."""

    def encode(self, batch: Pixels, rows: Ints) -> Vectors | list[Vectors]:
        """Return (len(batch), dim) float32 vectors, or, for the column `patterns`, (k, dim) for each image.

        `rows` (len(batch),) are the images' pool rows, for an encoder that draws; 1 <= k <= vectors_per_image.
        """

    def describe(self) -> dict[str, Any]:
        """Return what a manifest should say: the values in force after the model's own defaults."""


class PixelsEncoder:
    """The image itself, downsampled (box filter) to `pixels_size` squared RGB in [0, 1]: needs no weights."""

    column = "embedding"
    vectors_per_image = 1

    def __init__(self, options: EmbedOptions, device: str) -> None:
        self.side_px = options.pixels_size
        self.dim = 3 * self.side_px**2

    def prepare(self, image: Image.Image) -> Pixels:
        small = image.resize((self.side_px, self.side_px), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.uint8).reshape(-1)

    def encode(self, batch: Pixels, rows: Ints) -> Vectors:
        return batch.astype(np.float32) / np.float32(255)

    def describe(self) -> dict[str, Any]:
        return {"pixels_size": self.side_px}


class EmbeddingEncoder:
    """The pooled features of a timm backbone without its classifier, in eval mode, float32."""

    column = "embedding"
    vectors_per_image = 1

    def __init__(self, options: EmbedOptions, device: str) -> None:
        self.device = device
        self.model = build_backbone(options).eval().requires_grad_(False).to(device)
        self.format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model.to(memory_format=self.format)
        self.config = preprocessing(self.model, options)
        self.transform = _build_transform(self.config)
        self.mean = 255 * torch.tensor(self.config["mean"], device=device).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(self.config["std"], device=device).view(1, 3, 1, 1)
        self.pooling = options.pooling
        self.max_pixels = options.max_pixels
        probe = np.zeros((1, *self.config["input_size"]), dtype=np.uint8)
        self._check_size(options, probe)
        self.dim = int(self.encode(probe, np.zeros(1, dtype=np.int64))[0].shape[-1])

    def _check_size(self, options: EmbedOptions, probe: Pixels) -> None:
        """Raise InputError where the backbone does not take images of the size asked for."""
        try:
            with torch.inference_mode():
                cast(Any, self.model).forward_features(self._scaled(probe))
        except (AssertionError, RuntimeError, ValueError) as error:
            side = options.image_size
            raise InputError(f"backbone {options.backbone!r} does not take images of {side} px: {error}") from error

    def prepare(self, image: Image.Image) -> Pixels:
        short, long = min(image.size), max(image.size)
        resized = min(self.config["input_size"][1:]) / self.config["crop_pct"]
        if self.config["crop_mode"] == "center" and resized * resized * long / short > self.max_pixels:
            raise BadImageError(f"{image.width} x {image.height} pixels: resized by its short side it is above --max-pixels")
        return np.asarray(self.transform(image), dtype=np.uint8)

    def encode(self, batch: Pixels, rows: Ints) -> Vectors | list[Vectors]:
        with torch.inference_mode():
            return self._pool(self._scaled(batch)).float().cpu().numpy()

    def _scaled(self, batch: Pixels) -> torch.Tensor:
        """Return the batch as the model takes it, on its device."""
        images = torch.from_numpy(batch).to(self.device, non_blocking=True)
        return images.float().sub_(self.mean).div_(self.std).contiguous(memory_format=self.format)

    def _pool(self, images: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
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
        return {key: self.config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}


class PatternsEncoder(EmbeddingEncoder):
    """Up to `num_patterns` k-means centres of the local features that carry `attention_ratio` of an image's attention."""

    column = PATTERNS

    def __init__(self, options: EmbedOptions, device: str) -> None:
        self.ratio = options.attention_ratio
        self.clustering = Clustering(options.num_patterns, options.pattern_metric, options.seed)
        self.vectors_per_image = options.num_patterns
        self.backbone = options.backbone
        super().__init__(options, device)

    def encode(self, batch: Pixels, rows: Ints) -> list[Vectors]:
        with torch.inference_mode():
            features, weights = self._local(self._scaled(batch))
            return patterns(features, kept(weights, self.ratio), rows, self.clustering)

    def _local(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return local features (r, p, d) and their weights (r, p); raises InputError for a backbone without."""
        from timm.layers import Attention
        from timm.models.vision_transformer import Block, VisionTransformer

        model: Any = self.model
        if isinstance(model, VisionTransformer):
            last = model.blocks[-1]
            if model.cls_token is None or len(model.blocks) < 2 or type(last) is not Block or type(last.attn) is not Attention:
                raise InputError(
                    f"backbone {self.backbone!r} gives no patterns: "
                    "a transformer needs a class token, two blocks or more, and plain attention"
                )
            return transformer_features(model, images)
        maps: torch.Tensor = model.forward_features(images)
        if maps.ndim != 4:
            raise InputError(
                f"backbone {self.backbone!r} gives no patterns: take a vision transformer or a convolutional network"
            )
        return map_features(maps.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else maps)

    def describe(self) -> dict[str, Any]:
        clustering = self.clustering
        return {
            **super().describe(),
            "num_patterns": clustering.k,
            "attention_ratio": self.ratio,
            "pattern_metric": clustering.metric,
            "seed": clustering.seed,
        }


def build_backbone(options: EmbedOptions) -> torch.nn.Module:
    """Return the timm backbone with the weights asked for and no classifier.

    `weights`: a file; `hub` downloads timm's own; `random` leaves them as initialised (seeded), for tests of speed.
    """
    import timm

    name = options.backbone
    if not timm.is_model(name.split(".")[0]):
        import difflib

        close = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.4)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise InputError(f"unknown backbone {name!r}{hint} (any name that timm.list_models() gives)")
    base, _, tag = name.partition(".")
    tags = [model.partition(".")[2] for model in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"unknown weights {tag!r} of backbone {base!r}{nearest(tag, tags)} (one of: {', '.join(tags) or 'none'})"
        )
    arguments = {key: _literal(value) for key, value in parse_pairs(options.model_option, "--model-option").items()}
    torch.manual_seed(0)
    try:
        model: torch.nn.Module = timm.create_model(name, pretrained=options.weights == "hub", num_classes=0, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"backbone {name!r} cannot be built with {arguments}: {error}") from error
    except (OSError, RuntimeError) as error:
        if options.weights != "hub":
            raise
        reason = str(error).splitlines()[0]
        raise InputError(f"the weights of {name!r} cannot be fetched from the hub ({reason}): pass --weights FILE") from error
    if options.weights not in NO_FILE:
        load_backbone(model, options.weights)
    resize: Any = getattr(model, "set_input_size", None)
    if options.image_size and resize is not None:  # vision transformers resample their position embeddings
        resize(img_size=(options.image_size, options.image_size))
    if options.pooling == "cls" and getattr(model, "cls_token", None) is None:
        raise InputError(f"backbone {name!r} has no class token: --pooling mean or model")
    return model


def _literal(value: str) -> Any:
    """Return a model argument as a number, bool or None where it reads as one, else as the string it is."""
    import ast

    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def preprocessing(model: torch.nn.Module, options: EmbedOptions) -> dict[str, Any]:
    """Return the model's own preprocessing (timm's data config) with the overrides in `options`.

    Raises InputError for a mean or std that does not have three values.
    """
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = dict(resolve_model_data_config(model))
    if options.image_size:
        config["input_size"] = (3, options.image_size, options.image_size)
    for name in ("mean", "std"):
        value = getattr(options, name)
        if value is not None:
            if len(value) not in (1, 3):
                raise InputError(f"--{name} {','.join(map(str, value))} has {len(value)} values: give one, or one a channel")
            config[name] = tuple(value) * (3 // len(value))
    if not all(0 <= value <= 1 for value in config["mean"]):
        raise InputError(f"--mean {config['mean']} must lie in 0..1: pixels are scaled to that")
    if not all(0 < value < float("inf") for value in config["std"]):
        raise InputError(f"--std {config['std']} must be positive")
    for name in ("interpolation", "crop_pct", "crop_mode"):
        value = getattr(options, name)
        if value is not None:
            config[name] = value
    return config


def _build_transform(config: dict[str, Any]) -> Callable[[Image.Image], Any]:
    """Return timm's evaluation transform up to 8-bit pixels; scaling to floats happens on the batch."""
    from timm.data import create_transform

    keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
    transform: Callable[[Image.Image], Any] = create_transform(
        **{key: config[key] for key in keys}, is_training=False, use_prefetcher=True
    )
    return transform


ENCODERS: dict[str, Callable[[EmbedOptions, str], Encoder]] = {
    "embedding": EmbeddingEncoder,
    "patterns": PatternsEncoder,
    "pixels": PixelsEncoder,
}


def build_encoder(options: EmbedOptions, device: str) -> Encoder:
    """Return the encoder that `options.encoder` names, on a device ('cpu', 'cuda')."""
    return lookup(options.encoder, ENCODERS, "encoder")(options, device)


@functools.cache
def encoder_help() -> dict[str, str]:
    """Return name -> what it gives, from the docstrings of the table."""
    return {name: " ".join((build.__doc__ or "").split()) for name, build in ENCODERS.items()}
