"""What turns batches into steps of the optimiser: one model in this process, a replica a worker (DDP), or shards (ZeRO).

A machine is told each part's weight in the step, so that the gradient is that of the mean over the whole step's images,
whoever has how many of them.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, Protocol

import torch
import torch.distributed as dist

from engine.places import Place
from engine.schema import InputError
from engine.tasks import Batch, Task
from engine.tasks.setup import WEIGHTS
from engine.training.checkpoints import Saved, write_file
from engine.training.job import Job
from engine.training.optimizers import build_optimizer, parameter_groups, set_rate

STATE = "optimizer.pt"


class Learner(torch.nn.Module):
    """A task's loss as a module, so that what wraps a model (DDP, DeepSpeed) sees one forward whatever the task does."""

    def __init__(self, task: Task, model: torch.nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.task, self.model, self.device = task, model, device
        self.precision = precision

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the mean loss over a batch's images, under autocast to bfloat16 where that was asked for."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.task.loss(self.model, batch)


class Machine(Protocol):
    """What the step loop drives; every worker makes the same calls in the same order."""

    model: torch.nn.Module
    """The task's model, on its device; under ZeRO 3 without its weights."""

    def learn(self, batch: Batch, weight: float, last: bool) -> torch.Tensor:
        """Add a part's gradient, times `weight`; `last` of the step's parts. Return its mean loss, a scalar, detached."""

    def step(self, rate: float) -> torch.Tensor | None:
        """Move the weights; return the norm that the gradient had before it was clipped, where it is."""

    def whole(self) -> torch.nn.Module:
        """Return the model with all its weights, for evaluation and checkpoints."""

    def save(self, folder: Place, rank: int) -> dict[str, Any]:
        """Write what this worker adds to a checkpoint; return the entries of its files."""

    def load(self, saved: Saved) -> None:
        """Take up a checkpoint; raises InputError where it is another model's."""


class Replica:
    """A whole model in every worker. Gradients are averaged by DDP where there are several.

    Two choices keep a step's bits the same in an unbroken and in a resumed run. `find_unused_parameters` is on: parameters
    that some batches don't use (detectors) are no error, and the gradients' buckets stay as they are first cut, where DDP
    would cut them anew after the first step and so add in another order. Buffers (running statistics) are not sent round
    at every step: they decide nothing in training, and evaluations and checkpoints take the first worker's.
    """

    def __init__(self, task: Task, model: torch.nn.Module, job: Job, device: torch.device) -> None:
        training = job.setup.training
        self.model, self.device = model.to(device), device
        self.groups = parameter_groups(model, task.rates(model), training)
        self.optimizer = build_optimizer(self.groups, training)
        self.clip = training.clip_grad
        self.learner: torch.nn.Module = Learner(task, model, device, training.precision)
        self.workers = job.parts_at_once
        if self.workers > 1:
            self.learner = torch.nn.parallel.DistributedDataParallel(
                self.learner,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
            )

    def learn(self, batch: Batch, weight: float, last: bool) -> torch.Tensor:
        """Add a part's gradient; DDP divides by the number of workers, so that is multiplied out."""
        apart = self.workers > 1 and not last
        with self.learner.no_sync() if apart else contextlib.nullcontext():  # type: ignore[operator]
            loss: torch.Tensor = self.learner(batch)
            (loss * (weight * self.workers)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, rate: float) -> torch.Tensor | None:
        """Clip, move, forget the gradients."""
        norm = None
        if self.clip is not None:
            trained = [parameter for group in self.groups for parameter in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(trained, self.clip)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def whole(self) -> torch.nn.Module:
        """Return the model, with the first worker's buffers."""
        share_buffers(self.model)
        return self.model

    def save(self, folder: Place, rank: int) -> dict[str, Any]:
        """Write the optimiser's state: the first worker's, all are the same."""
        if rank:
            return {}
        held = io.BytesIO()
        torch.save(self.optimizer.state_dict(), held)
        return write_file(folder, STATE, held.getvalue())

    def load(self, saved: Saved) -> None:
        """Take up weights and optimiser."""
        load_weights(self.model, saved.place.at(WEIGHTS))
        state = torch.load(io.BytesIO(saved.place.at(STATE).read()), map_location=self.device, weights_only=True)
        try:
            self.optimizer.load_state_dict(state)
        except ValueError as error:
            raise InputError(f"checkpoint {saved.place.uri} is of another optimiser: {error}") from error


def share_buffers(model: torch.nn.Module) -> None:
    """Give every worker the first one's buffers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def load_weights(model: torch.nn.Module, file: Place) -> None:
    """Load a .safetensors file whose weights must fit exactly; raises InputError that names what differs."""
    from safetensors.torch import load

    try:
        model.load_state_dict(load(file.read()))
    except RuntimeError as error:
        raise InputError(f"weights {file.uri} are of another model: {' '.join(str(error).split())}") from error


def to_safetensors(model: torch.nn.Module) -> bytes:
    """Return a model's weights and buffers as a .safetensors file, on the CPU, none sharing memory with another."""
    from safetensors.torch import save

    state = model.state_dict()
    return save({name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()})
