"""What a worker is told of a training: everything, in values that travel."""

from __future__ import annotations

from dataclasses import dataclass

from engine.schema import RunError
from engine.tasks import Setup


class DivergedError(RunError):
    """The loss or the weights are not finite any more: another try ends in the same way."""


@dataclass(frozen=True)
class Job:
    """A training, as every worker of it sees it. Folders are named as workers elsewhere find them.

    `workers` 0 is this process. `checkpoint_steps` None: an epoch, and 100 at least.
    """

    setup: Setup
    out: str
    images: str
    test: str | None
    seed: int
    workers: int
    threads: int
    gpus: float
    loaders: int
    checkpoint_steps: int | None
    deepspeed: str | None
    max_pixels: int

    @property
    def parts_at_once(self) -> int:
        """Return how many parts of a step are worked on at a time."""
        return max(1, self.workers)
