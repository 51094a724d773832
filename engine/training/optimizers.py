"""A task's rates as parameter groups, and torch's optimisers over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from engine.schema import InputError
from engine.verbs import TrainingOptions

Groups = list[dict[str, Any]]


def parameter_groups(model: torch.nn.Module, scales: Mapping[str, float], training: TrainingOptions) -> Groups:
    """Return the optimiser's groups: params, lr_scale (their rate relative to the schedule's), weight_decay.

    Parameters without a scale are frozen. Without `decay_1d`, those of one dimension (norms) and biases don't decay.
    Raises InputError where nothing is left to train.
    """
    named = dict(model.named_parameters())
    assert scales.keys() <= named.keys(), sorted(scales.keys() - named.keys())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named.items():
        parameter.requires_grad_(name in scales)
        if name not in scales:
            continue
        decays = training.decay_1d or (parameter.ndim > 1 and not name.endswith(".bias"))
        key = scales[name], training.weight_decay if decays else 0.0
        groups.setdefault(key, {"params": [], "lr_scale": key[0], "weight_decay": key[1]})["params"].append(parameter)
    if not groups:
        raise InputError("every parameter of the model is frozen: there is nothing to train")
    return list(groups.values())


def build_optimizer(groups: Groups, training: TrainingOptions) -> torch.optim.Optimizer:
    """Return torch's SGD, Adam (decay in the gradient) or AdamW (decay apart); the step loop sets its rates.

    Raises InputError for Nesterov's momentum without one.
    """
    if training.optimizer == "sgd":
        if training.nesterov and not training.momentum:
            raise InputError("nesterov needs a momentum: give --option momentum=0.9, or leave nesterov out")
        return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, nesterov=training.nesterov)
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=training.lr)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
