"""One worker's training: from the newest checkpoint, or the beginning, to the last step.

What a step does is a function of (seed, step, worker): its images and their augmentation (order.py), dropout and the like
(seeded before each part), its rate. So a training that was killed gives, from its last checkpoint on, the very steps that
it would have given, and the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3

from engine.places import Place
from engine.schema import InputError, Progress
from engine.tasks import Result
from engine.tasks.setup import WEIGHTS
from engine.training.checkpoints import Saved, folder_of, newest, publish_step, told_kept, write_file
from engine.training.evaluation import evaluate, open_test
from engine.training.examples import Part, Source, TrainingParts, feed, to_device
from engine.training.job import DivergedError, Job
from engine.training.log import Log
from engine.training.machines import Machine, Replica, load_weights, share_buffers, to_safetensors
from engine.training.order import order_of
from engine.training.rates import rate_of
from engine.training.seeds import BUILD, PART, seed_all
from engine.training.zero import Shards

AVERAGE = "average.safetensors"
STEPS = "steps"
READ_EVERY = {"cpu": 1, "cuda": 10}
"""Steps whose losses are read at once: reading one from a GPU waits for it."""
MIN_CHECKPOINT_STEPS = 100
ONE_VALUE = "more than 1 value per channel"


def steps_place(out: str) -> Place:
    """Return the folder of a training's checkpoints."""
    return Place(out).at(STEPS)


class Training:
    """A worker on its way through the steps."""

    def __init__(self, job: Job, rank: int, device: torch.device, group: Any, progress: Progress) -> None:
        self.job, self.rank, self.device, self.group, self.progress = job, rank, device, group, progress
        self.source = Source(job.setup, job.images)
        self.test = open_test(job, rank, device.type == "cuda")
        self.task, self.options = self.source.task, job.setup.training
        self.order = order_of(self.options, len(self.source.set), job.seed)
        self.rate = rate_of(self.options, self.order.steps_per_epoch, self.order.total_steps)
        self.steps = steps_place(job.out)
        self.done, self.last, self.best = 0, None, None
        self.spent = dict.fromkeys(("data_s", "evaluate_s", "save_s"), 0.0)
        saved = self._newest()
        seed_all(job.seed, BUILD)
        self.model = self.task.build(pretrained=saved is None).to(device)
        if job.deepspeed is None:  # which sends weights round as flat bytes
            self.model.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPUs and GPUs
        decay = self.options.ema_decay
        self.average = None if decay is None else ModelEmaV3(self.model, decay=decay)
        machine = Replica if job.deepspeed is None else Shards
        self.machine: Machine = machine(self.task, self.model, job, device)
        if saved is not None:
            self.machine.load(saved)
            if self.average is not None:
                load_weights(self.average.module, saved.place.at(AVERAGE))
            facts = saved.facts
            self.done, self.last, self.best = saved.step, facts["last"], facts["best"]
            self.spent.update(facts["spent"])
        self.log = Log(Place(job.out), self.done) if rank == 0 else None
        self.unread: list[dict[str, Any]] = []
        self.since = time.perf_counter()

    def _newest(self) -> Saved | None:
        """Return the checkpoint to go on from: the one that the first worker finds whole."""
        found = newest(self.steps) if self.rank == 0 else None
        facts = self._agree(found and found.facts)
        return facts and Saved(folder_of(self.steps, facts["step"]), facts)

    def _agree(self, value: Any) -> Any:
        """Return the first worker's value."""
        held = [value]
        if self.job.parts_at_once > 1:
            dist.broadcast_object_list(held, 0, group=self.group)
        return held[0]

    def run(self) -> None:
        """Train to the end: the last checkpoint holds the last weights and the results.

        Raises DivergedError where loss or weights are not finite, RunError for an image that can't be decoded.
        """
        job, total = self.job, self.order.total_steps
        try:
            parts = TrainingParts(self.source, self.order, job.seed, job.parts_at_once, self.options.accumulate, self.rank)
            items = range(self.done * self.options.accumulate, total * self.options.accumulate)
            stream = iter(feed(parts, items, job.loaders, self.device.type == "cuda"))
            self.task.train_mode(self.model)
            self.progress("train", self.done, total, "")
            while self.done < total:
                self._step(stream)
                evaluates, saves = self._due()
                if evaluates or saves or self.done % READ_EVERY[self.device.type] == 0:
                    self._read()
                if evaluates:
                    self._evaluate()
                if saves:
                    self._save()
        finally:
            if self.log is not None:
                self.log.close()

    def _due(self) -> tuple[bool, bool]:
        """Return whether to evaluate, and whether to write a checkpoint, after the steps done."""
        per_epoch, ended = self.order.steps_per_epoch, self.done == self.order.total_steps
        every = (self.options.eval_epochs or 0) * (1 if self.options.steps is not None else per_epoch)
        evaluates = self.test is not None and (ended or (every > 0 and self.done % every == 0))
        return evaluates, ended or self.done % (self.job.checkpoint_steps or max(MIN_CHECKPOINT_STEPS, per_epoch)) == 0

    def _step(self, stream: Iterator[Part]) -> None:
        """Do the next step; its loss and gradient are those of the mean over all its images, on all workers."""
        step, accumulate, workers = self.done, self.options.accumulate, self.job.parts_at_once
        count = len(self.order.batch(step))
        turns = min(accumulate, math.ceil(count / workers))
        loss = torch.zeros((), device=self.device)
        for turn in range(accumulate):
            before = time.perf_counter()
            part = next(stream)
            self.spent["data_s"] += time.perf_counter() - before
            if part.batch is None:
                continue
            seed_all(self.job.seed, PART, step, turn, self.rank)
            weight = part.size / part.of
            loss += weight * self._learn(to_device(part.batch, self.device), weight, turn == turns - 1)
        rate = self.rate(step)
        norm = self.machine.step(rate)
        if self.average is not None:
            self.average.update(self.model)
        if workers > 1:
            dist.all_reduce(loss)
        self.done += 1
        self.unread.append({"loss": loss, "grad_norm": norm, "lr": rate, "step": self.done, "images": count})

    def _learn(self, batch: Any, weight: float, last: bool) -> torch.Tensor:
        try:
            return self.machine.learn(batch, weight, last)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            count = len(self.order.batch(self.done))
            raise InputError(
                f"step {self.done + 1} has {count} images for {self.job.parts_at_once} workers x accumulate "
                f"{self.options.accumulate}: a batch norm can't learn from one alone. Give a batch_size that leaves more for "
                "the last batch of an epoch, or --option freeze_norm=true"
            ) from error

    def _read(self) -> None:
        """Read the losses of the steps since the last time: check them, log them, show the last one."""
        if not self.unread:
            return
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        speed = sum(entry["images"] for entry in self.unread) / seconds
        for entry in self.unread:
            line = {"step": entry["step"], "epoch": self._epoch(entry["step"]), "kind": "train"}
            line |= {"loss": float(entry["loss"]), "lr": entry["lr"]}
            if entry["grad_norm"] is not None:
                line["grad_norm"] = float(entry["grad_norm"])
            line["images_per_s"] = round(speed, 2)
            if not math.isfinite(line["loss"]) or not math.isfinite(line.get("grad_norm", 0.0)):
                raise self._diverged(line["step"], f"loss {line['loss']}", line["lr"])
            if self.log is not None:
                self.log.write(line)
        self.unread.clear()
        note = f"loss {line['loss']:.4g}, rate {line['lr']:.3g}, {speed:,.1f} images/s"
        self.progress("train", self.done, self.order.total_steps, note)

    def _diverged(self, step: int, what: str, rate: float) -> DivergedError:
        kept = told_kept(self.steps).capitalize()
        clip = "" if self.options.clip_grad is not None else ", --option clip_grad=1"
        return DivergedError(
            f"step {step} of {self.order.total_steps} gave {what} at rate {rate:.3g}: the training diverged. Try a lower lr, a "
            f"longer warmup{clip} or --option precision=float32, in another --out. {kept} in {Place(self.job.out).uri}"
        )

    def _epoch(self, step: int) -> float:
        return round(step / self.order.steps_per_epoch, 4)

    def _weights(self) -> torch.nn.Module:
        """Return what is evaluated and published: the weights' moving average where there is one, else the weights."""
        if self.average is None:
            return self.machine.whole()
        share_buffers(self.average.module)
        module: torch.nn.Module = self.average.module
        return module

    def _evaluate(self) -> None:
        """Measure the weights on the test images, and keep them where they are the best so far."""
        assert self.test is not None
        began, weights = time.perf_counter(), self._weights()

        def shown(done: int, total: int) -> None:
            self.progress("evaluate", done, total, f"after step {self.done}")

        results = self._agree(evaluate(self.test, weights, self.job, self.rank, self.group, shown))
        self.last = self._record(results)
        value = {name: value for name, value, _ in results}.get(self.task.criterion)
        if value is not None and (self.best is None or value > self.best["value"]):
            name = f"best-{self.done:09d}.safetensors"
            self.best = {**self.last, "value": value, "weights": name}
            if self.rank == 0:
                self.steps.at(name).write(to_safetensors(weights))
        if self.log is not None:
            figures = {name: value for name, value, _ in results}
            self.log.write({"step": self.done, "epoch": self._epoch(self.done), "kind": "test", **figures})
        self.task.train_mode(self.model)
        self.spent["evaluate_s"] += time.perf_counter() - began
        self.since += time.perf_counter() - began

    def _record(self, results: list[Result]) -> dict[str, Any]:
        metrics = [{"metric": name, "value": value, "note": note} for name, value, note in results]
        return {"step": self.done, "epoch": self._epoch(self.done), "metrics": metrics}

    def _save(self) -> None:
        """Write a checkpoint of the steps done; weights that are not finite are none."""
        began, whole = time.perf_counter(), self.machine.whole()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in whole.parameters()):
            raise self._diverged(self.done, "weights that are not finite", self.rate(self.done - 1))
        folder = folder_of(self.steps, self.done)
        files = self.machine.save(folder, self.rank)
        if self.rank == 0:
            files |= write_file(folder, WEIGHTS, to_safetensors(whole))
            if self.average is not None:
                files |= write_file(folder, AVERAGE, to_safetensors(self.average.module))
        every: list[Any] = [files]
        if self.job.parts_at_once > 1:
            every = [None] * self.job.parts_at_once
            dist.gather_object(files, every if self.rank == 0 else None, group=self.group)
        seconds = time.perf_counter() - began
        self.spent["save_s"] += seconds
        self.since += seconds
        if self.log is not None:
            self.log.flush()
            facts = {"last": self.last, "best": self.best, "spent": dict(self.spent), "epoch": self._epoch(self.done)}
            publish_step(self.steps, self.done, {name: entry for found in every for name, entry in found.items()}, facts)
