"""The networks under a detector: torchvision's and timm's, cut where they give maps, with the weights asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torchvision import models

from engine.backbones import NO_FILE, create_network
from engine.schema import InputError, first_line
from engine.tasks.setup import Setup
from engine.weights import read_state, told, unwrap

IMAGENET: dict[str, Any] = {
    "resnet50": models.ResNet50_Weights.IMAGENET1K_V1,
    "mobilenet_v3_large": models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
    "vgg16": models.VGG16_Weights.IMAGENET1K_FEATURES,
}
"""What torchvision's detectors start from."""


def torchvision_body(name: str, setup: Setup, pretrained: bool, **arguments: Any) -> Any:
    """Return torchvision's classification network without its classifier, with the weights asked for if `pretrained`.

    It is the same network whatever it starts from (torchvision's SSDlite halves its last layers where it has no weights).
    """
    network: Any = models.get_model(name, weights=None, **arguments)
    body: torch.nn.Module
    if hasattr(network, "features"):
        body = network.features
    else:
        network.fc, body = torch.nn.Identity(), network
    if pretrained and setup.weights == "hub":
        try:
            state = IMAGENET[name].get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            reason = first_line(error)
            raise InputError(
                f"the weights of {name!r} cannot be fetched from the hub ({reason}): pass --weights FILE"
            ) from error
        take_weights(body, state, f"torchvision's file of {name!r}")
    elif pretrained and setup.weights not in NO_FILE:
        take_weights(body, unwrap(read_state(setup.weights)), f"weights file {setup.weights!r}")
    return body


def timm_body(name: str, setup: Setup, pretrained: bool, model_option: Sequence[str]) -> Any:
    """Return timm's network as one that gives its maps, finest first, with the weights asked for if `pretrained`.

    Raises InputError for one that gives none.
    """
    body = create_network(name, pretrained and setup.weights == "hub", model_option, features_only=True)
    if pretrained and setup.weights not in NO_FILE:
        take_weights(body, unwrap(read_state(setup.weights)), f"weights file {setup.weights!r}")
    return body


def take_weights(body: torch.nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load a classification network's weights into its part that gives maps.

    That part may have other names: timm's `stages_0` for `stages.0`, a prefix, or none for `features`. What the file has
    above the maps (last convolution, classifier) is left over. Raises InputError that lists the keys which are missing,
    of another shape, or more than the part has.
    """
    wanted = body.state_dict()
    names = {_flat(key): key for key in state} | {key.removeprefix("features."): key for key in state}
    names |= {key: key for key in state}
    found = {key: names.get(_plain(key)) for key in wanted}
    used = {name for name in found.values() if name}
    inside = {name.split(".")[0] for name in used}
    problems = told(
        missing=(key for key, name in found.items() if not (name or key.endswith("num_batches_tracked"))),
        unexpected=(key for key in state if key not in used and key.split(".")[0] in inside),
        shape=(key for key, name in found.items() if name and state[name].shape != wanted[key].shape),
    )
    if problems:
        raise InputError(f"{what} does not fit the detector's network ({problems})")
    body.load_state_dict({key: state[name] for key, name in found.items() if name}, strict=False)


def _flat(key: str) -> str:
    """Return a name as timm's networks that give maps have it: `stages.0.norm` is `stages_0.norm`."""
    return key.replace(".", "_", 1)


def _plain(key: str) -> str:
    """Return a name without the prefix of timm's wrappers."""
    return re.sub(r"^(model|body)\.", "", key)


def stages_of(body: Any, ends: Sequence[str]) -> list[list[str]]:
    """Return the names of a network's parameters by stage, lowest first; each stage ends with the module named in `ends`.

    Raises InputError where the network has no such modules.
    """
    modules = [_plain(name) for name, _ in body.named_modules()]
    last = []
    for end in ends:
        inside = [at for at, name in enumerate(modules) if f"{name}.".startswith((f"{end}.", f"{_flat(end)}."))]
        if not inside:
            raise InputError("option trainable_layers: the stages of this network are not known; leave it out")
        last.append(inside[-1])
    stages: list[list[str]] = [[] for _ in ends]
    for name, _ in body.named_parameters():
        at = modules.index(_plain(name).rpartition(".")[0])
        stages[sum(at > end for end in last[:-1])].append(name)
    return stages


def freeze_below(body: Any, ends: Sequence[str], trained: int) -> None:
    """Freeze all but the `trained` uppermost stages of a network; see `stages_of`."""
    if trained > len(ends):
        raise InputError(f"option trainable_layers is {trained}: this network has {len(ends)} stages")
    if trained == len(ends):
        return
    frozen = {name for stage in stages_of(body, ends)[: len(ends) - trained] for name in stage}
    for name, parameter in body.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
