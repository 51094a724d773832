"""Evaluation while training: every worker predicts its share of the test images, the first one measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.images import Record
from engine.tasks import Prediction, Result
from engine.training.examples import Pictures, Source, TestBatches, feed
from engine.training.job import Job


@dataclass(frozen=True)
class Test:
    """A worker's share of the test images, in batches."""

    source: Source
    feed: Iterable[Pictures]
    num_batches: int


def open_test(job: Job, rank: int, pinned: bool) -> Test | None:
    """Return a worker's share of a job's test images, in batches as large as the parts of its steps, or None."""
    if job.test is None:
        return None
    training, source = job.setup.training, Source(job.setup, job.test)
    size = max(1, training.batch_size // (job.parts_at_once * training.accumulate))
    batches = TestBatches(source, size, job.parts_at_once, rank, job.max_pixels)
    return Test(source, feed(batches, range(len(batches)), job.loaders, pinned), len(batches))


def evaluate(
    test: Test, model: torch.nn.Module, job: Job, rank: int, group: Any, progress: Callable[[int, int], None]
) -> list[Result] | None:
    """Return the task's metrics of a model on the test images; None but on the first worker.

    `group` is a process group of the CPU's (gloo) where there are several workers. Predictions are made in the precision
    of the training.
    """
    training, device, source = job.setup.training, next(model.parameters()).device, test.source
    model.eval()
    mine: list[tuple[Prediction, Record]] = []
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.precision == "bf16"):
        for number, pictures in enumerate(test.feed):
            predictions = source.task.predict(model, pictures.pixels, pictures.sizes)
            mine += zip(predictions, pictures.records, strict=True)
            progress(number + 1, test.num_batches)
    every: list[Any] = [mine]
    if job.parts_at_once > 1:
        every = [None] * job.parts_at_once
        dist.gather_object(mine, every if rank == 0 else None, group=group)
    if rank:
        return None
    ordered: list[Any] = [None] * len(source.set)
    for worker, found in enumerate(every):
        ordered[worker :: job.parts_at_once] = found
    return source.task.measure([np.asarray(p, dtype=np.float32) for p, _ in ordered], [record for _, record in ordered])
