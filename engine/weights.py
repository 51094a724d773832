"""Pretrained weights from a file, whatever layout the paper's authors saved them in."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from engine.places import Place
from engine.schema import InputError

WRAPPERS = ("teacher", "state_dict", "model")
"""Entries under which a checkpoint keeps its weights: DINO; MoCo-v2 and CompRess; DeiT and CompRess."""

PREFIXES = (
    "module.encoder_q.",  # MoCo-v2, before its key encoder and queue
    "module.backbone.",  # DINO, as trained over several GPUs
    "backbone.",  # DINO, teacher
    "module.",  # anything saved from a DataParallel model (CompRess)
)
"""Prefixes of a backbone's keys, the first that occurs is taken and keys without it are other networks' or heads'."""

HEADS = ("fc.", "head.", "head_dist.", "classifier.")
"""First parts of classifier and projection keys, which a backbone doesn't need."""


def read_state(uri: str) -> dict[str, Any]:
    """Return what a .safetensors or PyTorch file holds, without running any code from it.

    Raises InputError for a missing file, an unknown suffix, or a pickle with more than tensors in it.
    """
    place = Place(uri)
    if not place.exists():
        raise InputError(f"weights file {uri!r} does not exist")
    data = place.read()
    if place.path.endswith(".safetensors"):
        import safetensors
        import safetensors.torch

        try:
            return dict(safetensors.torch.load(data))
        except safetensors.SafetensorError as error:
            raise InputError(f"weights file {uri!r} is not safetensors: {error}") from error
    if not place.path.endswith((".pth", ".pt", ".bin", ".tar")):
        raise InputError(f"weights file {uri!r} is neither .safetensors nor .pth, .pt, .bin, .tar")
    import io
    import pickle

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO keeps its arguments beside its weights
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"weights file {uri!r} cannot be read with weights_only: {reason}") from error
    if not isinstance(state, dict):
        raise InputError(f"weights file {uri!r} holds a {type(state).__name__}, not a state dict")
    return state


def unwrap(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the backbone's tensors by their plain names, out of the layouts in WRAPPERS and PREFIXES."""
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    for prefix in PREFIXES:
        inside = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        if inside:
            state = inside
            break
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def misfit(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """Return which weights of a model are missing, unexpected or of another shape, up to five of each; empty if all fit."""
    return told(
        wanted.keys() - state.keys(),
        state.keys() - wanted.keys(),
        (key for key in state.keys() & wanted.keys() if state[key].shape != wanted[key].shape),
    )


def told(missing: Iterable[str], unexpected: Iterable[str], shape: Iterable[str]) -> str:
    """Return weights that don't fit as a text: how many of each, and the names of up to five."""
    problems = []
    for word, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shape)):
        keys = sorted(found)
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            problems.append(f"{len(keys)} {word}: {', '.join(keys[:5])}{more}")
    return "; ".join(problems)


def load_backbone(model: torch.nn.Module, uri: str) -> None:
    """Load a weights file into a backbone that has no classifier.

    Raises InputError that lists the keys that are missing, not known or of another shape, classifiers aside.
    """
    state = unwrap(read_state(uri))
    wanted = model.state_dict()
    state = {key: value for key, value in state.items() if key in wanted or not key.startswith(HEADS)}
    optional = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    problems = misfit({**optional, **state}, wanted)
    if problems:
        raise InputError(f"weights file {uri!r} does not fit the backbone ({problems})")
    model.load_state_dict(state, strict=False)
