"""What a model is made from: everything that a checkpoint must say to build it again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from engine.schema import InputError, build_options, lookup
from engine.verbs import ClassifyOptions, DetectOptions, TrainingOptions

TRAINING: dict[str, type[TrainingOptions]] = {"classify": ClassifyOptions, "detect": DetectOptions}
"""The training options of each task."""


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
