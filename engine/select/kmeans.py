"""`kmeans`: one pick from each of `budget` clusters (Pourahmadi et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block, Ranked, fixed_point_scale
from engine.canonical import canonical_sqdist
from engine.nearest import Centres
from engine.schema import Opt
from engine.select.clusters import first_members, settle
from engine.select.lloyd import AFRESH, LloydStep, Matrix, Since, assign, farthest_rows, largest_entry, lloyd
from engine.select.nearby import Approximation
from engine.select.picking import UNCONDITIONAL, Shelves, both_ways, first_allowed
from engine.select.seeding import d2_seeds, random_rows
from engine.shards import Request, Shards, Step


@dataclass(frozen=True)
class Options:
    """Options of `kmeans`."""

    iterations: Annotated[int, Opt("Lloyd steps; stops early once no row moves.", min=0, max=100_000)] = 20
    restarts: Annotated[int, Opt("Independent runs; the one of least inertia is kept.", min=1, max=1000)] = 5
    seeding: Annotated[str, Opt("First centres: D^2 sampling, or random rows as faiss does.", choices=("d2", "random"))] = "d2"
    neighbors: Annotated[
        int | None,
        Opt(
            "Approximate: compare a row only with its own centre and this many near it. Default: exact.",
            min=1,
            max=1_000_000,
        ),
    ] = None
    exact_every: Annotated[int, Opt("With `neighbors`: steps from one exact step to the next.", min=2, max=100_000)] = 10


@dataclass(frozen=True)
class Clusters:
    """The end of a run: inertia in fixed point, and for each cluster its size and its nearest eligible row.

    `row` is -1 where a cluster has no eligible row; `sqdist` is infinite there.
    """

    inertia: int
    size: Ints
    sqdist: Floats
    row: Ints

    @classmethod
    def none(cls) -> Clusters:
        """Return what stands for no run yet."""
        return cls(0, np.empty(0, dtype=np.int64), np.empty(0), np.empty(0, dtype=np.int64))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what a journal keeps of it."""
        return {"inertia": np.array(self.inertia), "size": self.size, "sqdist": self.sqdist, "row": self.row}

    @classmethod
    def of(cls, arrays: dict[str, npt.NDArray[Any]]) -> Clusters:
        """Return what `arrays` gave."""
        return cls(int(arrays["inertia"]), arrays["size"], arrays["sqdist"], arrays["row"])


def _summarise(block: Block, centres: Centres, scale: float, since: Since) -> Clusters:
    """Give each row its final centre; return the block's share of the clusters."""
    k = len(centres.column)
    cluster = assign(block, centres, since)
    rows = np.arange(len(cluster), dtype=np.int64)
    own = canonical_sqdist(block.x, rows, centres.c.to(block.x.device), centres.column[cluster])
    sqdist, row = np.full(k, np.inf), np.full(k, -1, dtype=np.int64)
    ok = np.flatnonzero(block.eligible)
    order = ok[np.lexsort((block.rows[ok], own[ok], cluster[ok]))]
    found, first = np.unique(cluster[order], return_index=True)
    sqdist[found], row[found] = own[order[first]], block.rows[order[first]]
    inertia = int(np.rint(own * scale).astype(np.int64).sum())
    return Clusters(inertia, np.bincount(cluster, minlength=k), sqdist, row)


def _closer(a: Clusters, b: Clusters) -> Clusters:
    """Combine two summaries: for each cluster the nearer row, the smaller one of two equally near."""
    b_wins = (b.sqdist < a.sqdist) | ((b.sqdist == a.sqdist) & (b.row >= 0) & ((a.row < 0) | (b.row < a.row)))
    sqdist, row = np.where(b_wins, b.sqdist, a.sqdist), np.where(b_wins, b.row, a.row)
    return Clusters(a.inertia + b.inertia, a.size + b.size, sqdist, row)


def _picks(shards: Shards, clusters: Clusters, centres: Matrix, request: Request) -> Step:
    """Return a pick a cluster, largest cluster first: its nearest row that is allowed.

    A cluster with none gives its turn to the allowed row farthest from its own centre; those come last.
    """
    settled = False

    def fetch(shelves: Ints, most: Ints, taken: Ints) -> list[Ranked]:
        nonlocal settled
        if not settled:
            settle(shards, centres, request.labeled)
            settled = True
        wanted = np.zeros(len(centres), dtype=np.int64)
        wanted[shelves] = most
        return first_members(shards, wanted, taken).shelves(shelves)

    filled = [(clusters.sqdist[c:][:there], clusters.row[c:][:there]) for c, there in enumerate((clusters.row >= 0).tolist())]
    order = np.lexsort((clusters.row, -clusters.size))
    order = order[clusters.row[order] >= 0]
    shelves = Shelves(shards, request, fetch, np.ones(len(centres), dtype=np.int64), filled=filled)
    picks, sqdist = shelves.take_all(order)
    there = picks >= 0
    picks, sqdist, size = picks[there], sqdist[there], clusters.size[order[there]]
    negated, rows = first_allowed(shards, request, partial(farthest_rows, shards, centres), picks)
    picks, sqdist = np.concatenate([picks, rows]), np.concatenate([sqdist, -negated])
    size = np.concatenate([size, np.zeros(len(rows), dtype=np.int64)])
    columns = {"cluster_size": size, "centre_distance": np.sqrt(sqdist)}
    return Step(0, 0, picks, size.astype(np.float64), columns=columns)


def _seeds(shards: Shards, request: Request, options: Options, restart: int) -> Ints:
    if options.seeding == "d2":
        return d2_seeds(shards, request.budget, request.seed, (restart,))[0]
    return random_rows(shards, request.seed, (restart,), request.budget, np.empty(0, dtype=np.int64))


def kmeans(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Cluster the whole pool into `budget` clusters; pick the eligible row nearest to each centre in its cluster.

    Labelled rows take part in the clustering and are not eligible (the multi-batch form when there are any). `gain`
    is the size of a pick's cluster, the objective the inertia: the sum of squared distances to the nearest centre.

    With `neighbors` assignments are approximate, the last one too: see `nearby`. The inertia is then that of the
    assignment found, and a pick the nearest row of those in its cluster; where conditions refuse that one, clusters are
    those of the exact assignment.
    Deviations from the released code: exactly `budget` picks (it drops empty clusters), and D^2 seeding by default
    (`seeding=random` is the released one's).
    """
    k, nothing = request.budget, np.empty(0, dtype=np.int64)
    if k == 0:
        yield Step(0, 0, nothing, np.empty(0))
        return
    largest = max(shards.map(largest_entry))
    scale = fixed_point_scale(shards.n, 4 * shards.d * largest * largest)
    total = options.restarts * options.iterations + 1
    run = _Run(shards, request, options, largest, scale)
    for restart, step, anchor in run.steps():
        note = f"restart {restart + 1} of {options.restarts}, {step.moved:,} rows moved"
        arrays = {"at": np.array(anchor[:2]), "centres": anchor[2], "best": run.best_centres, **run.best_clusters.arrays()}
        number = restart * options.iterations + step.number
        yield Step(number, total, nothing, np.empty(0), note, step.inertia, arrays=arrays)
    last, aside = both_ways(request, partial(_picks, shards, run.best_clusters, run.best_centres))
    arrays = {UNCONDITIONAL: aside.picks} if aside else {}
    yield replace(last, number=total, total=total, objective=run.best_clusters.inertia / scale, arrays=arrays)


Anchor = tuple[int, int, Matrix]
"""(restart, Lloyd steps done, the centres then): a place from which the steps after it follow."""


class _Run:
    """The restarts, one after the other, and the best of those that are through."""

    def __init__(self, shards: Shards, request: Request, options: Options, largest: float, scale: float) -> None:
        self.shards, self.request, self.options, self.largest, self.scale = shards, request, options, largest, scale
        self.near = Approximation(options.neighbors, options.exact_every) if options.neighbors else None
        self.best_clusters, self.best_centres = Clusters.none(), np.empty((0, shards.d), dtype=np.float32)

    def _finish(self, centres: Matrix, since: Since) -> None:
        """Summarise a restart's end; keep it if it is the best."""
        ready = Centres.of(torch.tensor(centres))
        clusters: Clusters = self.shards.map(_summarise, ready, self.scale, since, combine=_closer)
        if not len(self.best_centres) or clusters.inertia < self.best_clusters.inertia:
            self.best_clusters, self.best_centres = clusters, centres

    def _from(self, anchor: Anchor) -> Iterator[tuple[int, LloydStep, Anchor]]:
        """Yield the steps of a restart from an anchor on, each with the last anchor before its end."""
        restart, done, centres = anchor
        every = self.near.exact_every if self.near else 1
        since = AFRESH
        for step in lloyd(self.shards, centres, self.options.iterations - done, self.largest, self.near):
            step = replace(step, number=done + step.number)
            centres, since = step.centres, step.since
            if step.number % every == 0:
                anchor = restart, step.number, centres
            yield restart, step, anchor
        self._finish(centres, since)

    def steps(self) -> Iterator[tuple[int, LloydStep, Anchor]]:
        """Yield (restart, step, anchor) to the end of the last restart."""
        first, resume = 0, self.request.resume
        if resume is not None:
            self.best_clusters, self.best_centres = Clusters.of(resume.arrays), resume.arrays["best"]
            first, done = (int(value) for value in resume.arrays["at"])
            yield from self._from((first, done, resume.arrays["centres"]))
            first += 1
        for restart in range(first, self.options.restarts):
            centres = self.shards.take(_seeds(self.shards, self.request, self.options, restart)).numpy()
            yield from self._from((restart, 0, centres))
