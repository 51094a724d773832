"""What a step is made of, and so how long it takes on any number of workers, and when more of them stop helping."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LITTLE = 0.1
"""Twice the workers that save less than this share of the time have stopped helping."""
MOST_WORKERS, ANY_NUMBER = 1 << 16, 1 << 30
ROUND_TRIP_S, ACTOR_S = 0.003, 0.0005
"""A call to all shards and its answers: 4 ms for four actors of one machine; each further one is taken for half a ms."""
START_S = 15.0
"""Ray, the workers' imports and their network, until the first of them works: as `benchmarks/results/embed.md` has it."""


@dataclass(frozen=True)
class Cluster:
    """What a node has: CPUs, GPUs, bytes of memory, bytes a second of network (None: not known, and nothing is said of it)."""

    cpus: int
    gpus: int
    memory: float
    network: float | None

    def nodes(self, workers: int, gpus_each: float, cpus_each: float) -> int:
        """Return how many nodes hold so many workers."""
        fits = [self.gpus / gpus_each] if gpus_each else [self.cpus / max(cpus_each, 0.01)]
        return max(1, math.ceil(workers / max(1, int(fits[0]))))


@dataclass(frozen=True)
class Work:
    """A step's time, in parts that take part in different ways.

    `worker_s` seconds of one worker are shared by all, in `pieces` that are not split; `driver_s` are the driver's alone;
    `rounds` calls go to all workers, `down` bytes to every node and `up` bytes from worker to worker in all of them together.
    `read` bytes come over the network, shared by the nodes. `most` workers, where the step itself says how many. `piece` is
    what the pieces are called. In this process `threads` work on them.
    """

    worker_s: float
    pieces: int
    fixed_s: float = 0.0
    driver_s: float = 0.0
    rounds: float = 0.0
    down: float = 0.0
    up: float = 0.0
    read: float = 0.0
    gpus_each: float = 0.0
    cpus_each: float = 1.0
    most: int = ANY_NUMBER
    piece: str = "parts"
    threads: int = 1

    def used(self, workers: int) -> int:
        """Return how many of some workers have something to do."""
        return max(1, min(workers, self.most, self.pieces))

    def parts(self, workers: int, cluster: Cluster) -> dict[str, float]:
        """Return the seconds that each part takes on so many Ray workers; on 0, in this process."""
        used, on_ray = self.used(workers or self.threads), workers > 0 and self.most > 1
        found = {
            "start": self.fixed_s + (START_S if on_ray else 0.0),
            "work": self.worker_s * math.ceil(self.pieces / used) / max(1, self.pieces),
            "driver": self.driver_s,
            "messages": self.rounds * (ROUND_TRIP_S + ACTOR_S * used) if on_ray else 0.0,
        }
        if cluster.network:
            nodes = cluster.nodes(used, self.gpus_each, self.cpus_each)
            read_s = self.read / nodes / cluster.network
            moved = self.down * (nodes - 1) + self.up * math.log2(nodes) if on_ray else 0.0
            found["network"] = max(0.0, read_s - found["work"]) + moved / cluster.network
        return found

    def seconds(self, workers: int, cluster: Cluster) -> float:
        """Return the time on so many workers."""
        return sum(self.parts(workers, cluster).values())

    def bound(self, workers: int, cluster: Cluster) -> str:
        """Return what keeps so many workers from being as much faster as they are more."""
        parts = self.parts(workers, cluster)
        if workers >= self.most:
            return f"the step is for {self.most:,}" if self.most > 1 else "the step is for one process"
        if workers >= self.pieces:
            return f"there are only {self.pieces:,} {self.piece}"
        uneven = parts["work"] - self.worker_s / max(1, min(workers, self.pieces))
        said = {
            "start": "starting takes most of the rest",
            "driver": "the driver's own share does not shrink",
            "messages": f"{self.rounds:,.0f} round trips to all workers",
            "network": "the network",
        }
        worst = max(said, key=lambda name: parts.get(name, 0.0))
        return f"{self.pieces:,} {self.piece} don't divide evenly" if uneven > parts.get(worst, 0.0) else said[worst]


def parts_of(works: Sequence[Work], workers: int, cluster: Cluster) -> dict[str, float]:
    """Return the seconds of each part of steps that run one after the other."""
    found = Counter[str]()
    for work in works:
        found.update(work.parts(workers, cluster))
    return dict(found)


def worker_seconds(works: Sequence[Work], workers: int, cluster: Cluster) -> float:
    """Return the seconds that workers are held, all together: by each step only those that it can use."""
    return sum(work.used(workers) * work.seconds(workers, cluster) for work in works)


def enough(works: Sequence[Work], cluster: Cluster) -> tuple[int, str]:
    """Return the number of workers of which twice as many save less than LITTLE of the time, and what bounds it then."""

    def seconds(workers: int) -> float:
        return sum(work.seconds(workers, cluster) for work in works)

    workers = 1
    while workers < MOST_WORKERS and seconds(workers) - seconds(2 * workers) >= LITTLE * seconds(workers):
        workers *= 2
    longest = max(works, key=lambda work: work.seconds(workers, cluster))
    return workers, longest.bound(workers, cluster)
