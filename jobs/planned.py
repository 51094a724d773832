"""What is known of a step once it is planned, and of the features that it reads or writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.placement import MEMORY_SHARE
from jobs.selecting import Measured
from jobs.step import Step
from jobs.traffic import Size, row_bytes
from jobs.work import Cluster, Work

OBJECT_STORE_SHARE = 0.3
"""Of a node's memory, Ray's default."""
LIBRARIES = 0.5 * (1 << 30)
"""What a worker's libraries take before it does anything."""


@dataclass(frozen=True)
class Features:
    """A feature store that is there, or will be: rows, floats, vectors of an image, and some vectors if there are any."""

    rows: int
    dim: int
    each: float = 1.0
    x: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Planned:
    """A step's plan: what it does one after the other, or `why_not`; where its figures are from; what it writes and holds.

    `message` is what a node's object store holds of one call. `memory` gives a worker's bytes by the number of workers.
    """

    label: str
    verb: str
    works: tuple[Work, ...]
    basis: str
    why_not: str = ""
    images: int = 0
    storage: float = 0.0
    driver: float = 0.0
    message: float = 0.0
    memory: Callable[[int], float] = lambda workers: 0.0


def basis(found: Measured) -> str:
    """Return where a selection's figures are from."""
    (n, most), (b, more) = ((min(v), max(v)) for v in zip(*((p.n, p.b) for p in found.points), strict=True))
    return f"modelled from {n:,} to {most:,} vectors, {b:,} to {more:,} picks, measured"


def not_planned(step: Step, why: str) -> Planned:
    """Return the plan of a step of which nothing can be said, and why."""
    return Planned(step.label, step.verb, (), "", why_not=why)


def room_of(cluster: Cluster, shards: int) -> float:
    """Return what of a node's memory a shard takes for vectors by default."""
    return MEMORY_SHARE * cluster.memory / min(shards, max(1, cluster.cpus))


def shard_memory(strategy: str, size: Size, limit: int | None, cluster: Cluster, vectors: bool) -> Callable[[int], float]:
    """Return what a shard holds, by the number of workers: libraries, its vectors where there is room, what goes with them."""

    def memory(workers: int) -> float:
        shards = max(1, min(workers, size.blocks))
        held = 4.0 * size.n * size.d / shards if vectors else 0.0
        room = limit or room_of(cluster, shards)
        return LIBRARIES + (held if held <= room else 0.0) + row_bytes(strategy, size) * size.n / shards

    return memory
