"""What a model is made from: everything that a checkpoint must say to build it again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from engine.backbones import NO_FILE
from engine.folders import read_manifest
from engine.places import Place
from engine.schema import InputError, build_options, lookup
from engine.verbs import ClassifyOptions, DetectOptions, TrainingOptions

TRAINING: dict[str, type[TrainingOptions]] = {"classify": ClassifyOptions, "detect": DetectOptions}
"""The training options of each task."""

WEIGHTS = "model.safetensors"
"""The file of a checkpoint folder that holds a model after its last step."""


@dataclass(frozen=True)
class Setup:
    """A task's model and how it is trained, every default filled in but those that are the model's own (None).

    `weights` is what it starts from: `hub`, `random`, a file or a checkpoint folder.
    """

    task: str
    model: str
    class_names: tuple[str, ...]
    training: TrainingOptions
    weights: str = "hub"
    model_option: tuple[str, ...] = ()
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return dataclasses.asdict(self)


def setup_from(value: dict[str, Any]) -> Setup:
    """Return the setup that `to_json` gave; raises InputError where it is not one."""
    fields = {field.name for field in dataclasses.fields(Setup)}
    if value.keys() != fields:
        raise InputError(f"a model's setup has {', '.join(sorted(value))}, not {', '.join(sorted(fields))}")
    options = lookup(value["task"], TRAINING, "task")
    tuples = {name: tuple(value[name]) for name in ("class_names", "model_option")}
    tuples |= {name: tuple(value[name]) for name in ("mean", "std") if value[name] is not None}
    training = build_options(options, value["training"], f"task {value['task']}")
    return Setup(**{**value, **tuples, "training": training})


def starting_checkpoint(setup: Setup, same: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the setup, as JSON, of the checkpoint folder that a model starts from; None where it starts from no folder.

    Raises InputError where the folder is no finished checkpoint, or where what is named in `same` differs.
    """
    if setup.weights in NO_FILE:
        return None
    place = Place(setup.weights)
    manifest = read_manifest(place)
    if manifest is None or manifest["kind"] != "checkpoint":
        if manifest is not None or place.names():
            raise InputError(f"weights {setup.weights!r} are a folder, but not a finished checkpoint that finetune wrote")
        return None
    theirs: dict[str, Any] = manifest["model"]
    for name in same:
        ours = getattr(setup, name)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if theirs[name] != ours:
            raise InputError(f"checkpoint {setup.weights!r} holds a model with {name} {theirs[name]!r}, not {ours!r}")
    return theirs
