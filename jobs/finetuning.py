"""What a training costs: three real steps of the real model on a few labelled images of the pool, in this process."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from engine.chosen import Chosen
from engine.folders import digest_of
from engine.gather import Wanted, gather
from engine.places import Place
from engine.recipes import resolve
from engine.schema import InputError, Progress, no_progress
from engine.sources import columns_of, open_pool
from engine.tasks.setup import WEIGHTS
from engine.training.job import Job
from engine.training.launch import in_process
from engine.training.loop import MIN_CHECKPOINT_STEPS, steps_place
from engine.training.order import order_of
from engine.verbs import FinetuneOptions
from jobs.work import Work

STEPS = 3
BATCH = {"classify": 8, "detect": 2}
"""Images of a step that is measured, at most; time is taken to grow with them."""
STATE = {"sgd": 1, "adam": 2, "adamw": 2}
"""Copies of the weights that an optimiser keeps."""


@dataclass(frozen=True)
class Trained:
    """A probe of a training: seconds of an image in a step, and to build the model; bytes of its weights and an image."""

    image_s: float
    fixed_s: float
    weight_bytes: float
    image_bytes: float
    batch: int
    device: str


def can_probe(options: FinetuneOptions) -> str | None:
    """Return why a training can't be measured before the job is run; None where it can."""
    if options.labels is not None and not Place(options.labels).exists():
        return f"labels {Place(options.labels).uri} are not there yet"
    setup = resolve(options)
    if setup.weights not in ("hub", "random") and not Place(setup.weights).exists():
        return f"weights {Place(setup.weights).uri} are not there yet"
    return None


def probe(options: FinetuneOptions, progress: Progress = no_progress) -> Trained:
    """Train for STEPS steps on a few images of the pool, in a temporary folder.

    Raises InputError where the pool's images have no labels.
    """
    setup = resolve(options)
    pool = open_pool(options.pool, columns_of(options))
    batch = min(setup.training.batch_size, BATCH[setup.task], max(1, pool.num_rows // STEPS))
    rows = np.unique(np.linspace(0, pool.num_rows - 1, STEPS * batch).astype(np.int64))
    few = replace(setup.training, epochs=1, steps=STEPS, batch_size=batch, accumulate=1, repeats=1, schedule="constant")
    few = replace(few, milestones=(), warmup=0.0, eval_epochs=None)
    with tempfile.TemporaryDirectory(prefix="coresift-plan-") as folder:
        wanted = Wanted(setup.task == "detect", strict=False, max_pixels=options.max_pixels)
        chosen, out = Chosen(rows, digest_of(rows.tobytes()), {}, True), Path(folder) / "model"
        images = gather(pool, chosen, Place(folder).at("images"), wanted, here=True)
        names = images.class_names or tuple(str(label) for label in range(images.manifest["max_label"] + 1))
        out.mkdir()
        job = Job(
            setup=replace(setup, training=few, class_names=names),
            out=str(out),
            images=images.place.absolute,
            test=None,
            seed=options.seed,
            workers=0,
            threads=options.cpus_per_worker,
            gpus=float(torch.cuda.is_available()),
            loaders=0,
            checkpoint_steps=STEPS,
            deepspeed=None,
            max_pixels=options.max_pixels,
        )
        clock = time.perf_counter if job.gpus or job.threads > 1 else time.process_time
        ends = [clock()]

        def note(stage: str, done: int, total: int, text: str) -> None:
            progress("probe", done, total, "steps trained")
            if stage == "train":
                ends.append(clock())

        in_process(job, note)
        weights = max(file.stat().st_size for file in Path(steps_place(str(out)).path).rglob(WEIGHTS))
    step_s = (ends[-1] - ends[2]) / (len(ends) - 3) if len(ends) > 3 else ends[-1] - ends[1]
    image_s = step_s / batch
    size = sum(part["bytes"] for part in images.manifest["parts"]) / max(1, len(images))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Trained(image_s, max(0.0, ends[1] - ends[0]), float(weights), size, batch, device)


@dataclass(frozen=True)
class Training:
    """A planned training: what it takes, what it writes, the bytes of a worker's weights and their state, its steps."""

    work: Work
    storage: float
    memory: float
    steps: int


def work_of(found: Trained, options: FinetuneOptions, num_images: int) -> Training:
    """Return what a training on so many images takes; evaluations are left out."""
    setup = resolve(options)
    training = setup.training
    if num_images < 1:
        raise InputError("a training needs images")
    order = order_of(training, num_images, options.seed)
    seen = order.total_steps * min(training.batch_size, num_images)
    copies = 1 + STATE[training.optimizer] + (training.ema_decay is not None)
    work = Work(
        worker_s=seen * found.image_s,
        pieces=max(1, min(training.batch_size, num_images)),
        fixed_s=found.fixed_s,
        rounds=float(order.total_steps),
        up=2 * found.weight_bytes * order.total_steps,
        gpus_each=options.gpus_per_worker or 0.0,
        most=max(1, options.workers),
        piece="images of a step",
    )
    kept = 2 if order.total_steps > MIN_CHECKPOINT_STEPS else 1
    storage = found.image_bytes * num_images + found.weight_bytes * (copies * kept + 2)
    return Training(work, storage, found.weight_bytes * (copies + 1), order.total_steps)
