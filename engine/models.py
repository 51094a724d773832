"""The networks behind a command's encoders: a timm backbone as the options say, or a checkpoint's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cached_property

import torch

from engine.backbones import Network
from engine.checkpoints import Checkpoint
from engine.schema import InputError
from engine.tasks import Task
from engine.verbs import EmbedOptions, PreprocessingOptions

OWN = ("backbone", "weights", "model_option", *(field.name for field in fields(PreprocessingOptions)))
"""Options that say what a checkpoint says itself."""


def check_checkpoint(options: EmbedOptions) -> None:
    """Raise InputError for options that a checkpoint has its own values of, and for --best without a checkpoint."""
    if options.checkpoint is None:
        if options.best:
            raise InputError("--best is for --checkpoint, and none is given")
        return
    defaults = {field.name: field.default for field in fields(EmbedOptions)}
    given = [f"--{name.replace('_', '-')}" for name in OWN if getattr(options, name) != defaults[name]]
    if given:
        raise InputError(f"{', '.join(given)} beside --checkpoint: its model and preprocessing are its own, leave that out")


class Models:
    """What the encoders of a command share, each made when it is first asked for, on their device.

    `folders`: the places of their stores, by encoder, where some find what was made for them beforehand.
    """

    def __init__(self, options: EmbedOptions, device: str, folders: Mapping[str, str] | None = None) -> None:
        check_checkpoint(options)
        self.options, self.device, self.folders = options, device, dict(folders or {})

    @cached_property
    def trained(self) -> tuple[Checkpoint, Task, torch.nn.Module]:
        """The checkpoint, its task, and its model in eval mode, frozen; raises InputError where none is given."""
        if self.options.checkpoint is None:
            raise InputError(f"--encoder {self.options.encoder} needs --checkpoint DIR, which `coresift finetune` writes")
        checkpoint = Checkpoint(self.options.checkpoint)
        task, model = checkpoint.load(self.options.best)
        model.requires_grad_(False).to(self.device)
        if self.options.channels_last:
            model.to(memory_format=torch.channels_last)
        return checkpoint, task, model

    @cached_property
    def network(self) -> Network:
        """The backbone: of the options, or of the checkpoint's classifier with the checkpoint's preprocessing."""
        if self.options.checkpoint is None:
            return Network(self.options, self.device)
        checkpoint, task, model = self.trained
        setup = checkpoint.setup
        backbone = getattr(model, "backbone", None)
        if task.column != "probs" or backbone is None:
            raise InputError(
                f"{self.options.checkpoint} holds a model for {setup.task}: --encoder {self.options.encoder} takes the "
                "backbone of a classifier"
            )
        shared = {field.name: getattr(setup, field.name) for field in fields(PreprocessingOptions)}
        return Network(replace(self.options, backbone=setup.model, **shared), self.device, backbone)
