"""Trained models: a published checkpoint folder -> its task and its model with the trained weights."""

from __future__ import annotations

from typing import Any

import torch

from engine.folders import LET_GO, digest_of, read_manifest, read_run
from engine.places import Place
from engine.schema import InputError
from engine.tasks import Setup, Task, build_task, setup_from
from engine.tasks.setup import WEIGHTS
from engine.weights import misfit, read_state

BEST = "best.safetensors"
IMAGES, HELDOUT = "images", "heldout"
"""Folders of a checkpoint: the labelled images that it was trained on, and those that were kept from training."""


class Checkpoint:
    """A published checkpoint/ folder, as finetune writes it.

    `model.safetensors` are the weights after the last step (their moving average, where one was kept), `best.safetensors`
    those of the best evaluation, if there was one; the manifest's `model` is the setup that they fit.
    """

    def __init__(self, uri: str) -> None:
        self.place = Place(uri)
        manifest = read_manifest(self.place)
        if manifest is None:
            raise InputError(self._why_not(uri))
        if manifest["kind"] != "checkpoint":
            raise InputError(f"{uri} is a {manifest['kind']} folder, not a checkpoint")
        self.manifest: dict[str, Any] = manifest
        self.setup: Setup = setup_from(manifest["model"])

    def _why_not(self, uri: str) -> str:
        if not self.place.exists():
            return f"{uri} does not exist: give the folder that `coresift finetune` wrote"
        if read_run(self.place) is not None:
            return f"{uri} is unfinished: run the command that began it again, it goes on where it stopped"
        return f"{uri} is not a checkpoint (no manifest.json): make one with `coresift finetune`"

    def _weights(self, best: bool) -> str:
        """Return the name of the weights asked for; raises InputError where there are none of a best evaluation."""
        if best and BEST not in self.manifest["files"]:
            raise InputError(
                f"{self.place.uri} has no weights of a best evaluation, as it was trained without --test: leave out --best"
            )
        name = BEST if best else WEIGHTS
        if name in self.manifest.get(LET_GO, ()):
            raise InputError(f"{self.place.uri}/{name} was let go by `coresift rounds`: --keep-models all keeps every round's")
        return name

    def digest(self, best: bool = False) -> str:
        """Return what tells these weights and their setup from others, wherever the folder lies."""
        weights = self.manifest["files"][self._weights(best)]
        return digest_of({"model": self.manifest["model"], "weights": weights["sha256"]})

    def load(self, best: bool = False) -> tuple[Task, torch.nn.Module]:
        """Return the task, and its model with these weights, on the CPU, in eval mode.

        Raises InputError that lists the weights which are missing, not known, or of another shape.
        """
        task = build_task(self.setup)
        model = task.build(pretrained=False).eval()
        name = self._weights(best)
        state = read_state(self.place.at(name).address)
        problems = misfit(state, model.state_dict())
        if problems:
            raise InputError(f"{name} of {self.place.uri} does not fit its model {self.setup.model!r} ({problems})")
        model.load_state_dict(state)
        return task, model
