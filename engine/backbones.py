"""timm's backbones: with the weights asked for, on their device, and how their images are prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from engine.inputs import NetworkInput, Pixels
from engine.schema import InputError, first_line, nearest, parse_pairs
from engine.verbs import EmbedOptions
from engine.weights import load_backbone

NO_FILE = ("hub", "random")
"""Values of `weights` that name no file."""


class Network:
    """A backbone ready to run: on its device, in eval mode, with its preprocessing. Encoders of one command share it.

    It is the one that the options say, or `backbone`, which then must be the one that they name.
    """

    def __init__(self, options: EmbedOptions, device: str, backbone: torch.nn.Module | None = None) -> None:
        self.options, self.device = options, device
        self.model: Any = (build_backbone(options) if backbone is None else backbone).eval().requires_grad_(False).to(device)
        self.format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model.to(memory_format=self.format)
        self.config = preprocessing(options.backbone, options)
        self.input = network_input(self.config, options.max_pixels)
        self.mean = 255 * torch.tensor(self.config["mean"], device=device).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(self.config["std"], device=device).view(1, 3, 1, 1)
        self._check_size()

    @property
    def probe(self) -> Pixels:
        """One black image, to try things with."""
        return np.zeros((1, *self.config["input_size"]), dtype=np.uint8)

    def _check_size(self) -> None:
        """Raise InputError where the backbone does not take images of the size asked for."""
        try:
            self.run(self.model.forward_features, self.probe)
        except (AssertionError, RuntimeError, ValueError) as error:
            name, side = self.options.backbone, self.options.image_size
            raise InputError(f"backbone {name!r} does not take images of {side} px: {error}") from error

    def run(self, forward: Callable[[torch.Tensor], Any], batch: Pixels) -> Any:
        """Return forward(images) without gradients, in the precision asked for; images are scaled here, float32."""
        with torch.inference_mode():
            images = torch.from_numpy(batch).to(self.device, non_blocking=True)
            images = images.float().sub_(self.mean).div_(self.std).contiguous(memory_format=self.format)
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.options.precision == "bf16"):
                return forward(images)

    def compiled(self, forward: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        """Return `forward` through torch.compile if that was asked for, else as it is.

        Every shape is compiled for itself: what a batch gives must not depend on the batches that came before.
        """
        return torch.compile(forward, dynamic=False) if self.options.compile else forward

    def describe(self) -> dict[str, Any]:
        """Return the preprocessing in force after the model's own defaults."""
        return {key: self.config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}


class Overrides(Protocol):
    """What `preprocessing` reads of options or of a model's setup; None is the model's own."""

    @property
    def image_size(self) -> int | None:
        """Side in px."""

    @property
    def mean(self) -> tuple[float, ...] | None:
        """Of pixels in 0..1."""

    @property
    def std(self) -> tuple[float, ...] | None:
        """Of pixels in 0..1."""

    @property
    def interpolation(self) -> str | None:
        """Resize filter."""

    @property
    def crop_pct(self) -> float | None:
        """Share of the resized image that the crop keeps."""

    @property
    def crop_mode(self) -> str | None:
        """How it is cropped."""


def network_input(config: dict[str, Any], max_pixels: int) -> NetworkInput:
    """Return how images are prepared by a `preprocessing`."""
    size = tuple(config["input_size"])
    return NetworkInput(size, config["interpolation"], config["crop_pct"], config["crop_mode"], max_pixels)


def check_name(name: str) -> None:
    """Raise InputError for a name of a network, or of its weights, that timm does not know."""
    import timm

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


def create_network(name: str, pretrained: bool, model_option: Sequence[str], **fixed: Any) -> torch.nn.Module:
    """Return a timm network, with timm's own weights if `pretrained`, built from the user's arguments and the fixed ones.

    Raises InputError for a name, an argument or weights that can't be had.
    """
    import timm

    check_name(name)
    arguments = {key: _literal(value) for key, value in parse_pairs(model_option, "--model-option").items()} | fixed
    try:
        model: torch.nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"backbone {name!r} cannot be built with {arguments}: {error}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = first_line(error)
        raise InputError(f"the weights of {name!r} cannot be fetched from the hub ({reason}): pass --weights FILE") from error
    return model


def build_backbone(options: EmbedOptions) -> torch.nn.Module:
    """Return the timm backbone with the weights asked for and no classifier.

    `weights`: a file; `hub` downloads timm's own; `random` leaves them as initialised (seeded), for tests of speed.
    """
    torch.manual_seed(0)
    model = create_network(options.backbone, options.weights == "hub", options.model_option, num_classes=0)
    if options.weights not in NO_FILE:
        load_backbone(model, options.weights)
    resize(model, options.image_size)
    return model


def resize(model: torch.nn.Module, side_px: int | None) -> None:
    """Make a network take images of a side in px where that is its own matter.

    Vision transformers resample their position embeddings.
    """
    change: Any = getattr(model, "set_input_size", None)
    if side_px and change is not None:
        change(img_size=(side_px, side_px))


def _literal(value: str) -> Any:
    """Return a model argument as a number, bool or None where it reads as one, else as the string it is."""
    import ast

    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def preprocessing(name: str, options: Overrides) -> dict[str, Any]:
    """Return a network's own preprocessing (timm's data config) with the overrides in `options`.

    Raises InputError for an unknown name, and for a mean or std that does not have three values.
    """
    import timm
    from timm.data import resolve_data_config

    check_name(name)
    config: dict[str, Any] = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
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
