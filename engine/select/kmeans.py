"""`kmeans`: one pick from each of `budget` clusters (Pourahmadi et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block, fixed_point_scale
from engine.canonical import canonical_sqdist
from engine.nearest import Centres
from engine.schema import Opt
from engine.select.bounds import Motion
from engine.select.lloyd import Matrix, assign, farthest_rows, largest_entry, lloyd
from engine.select.seeding import d2_seeds, random_rows
from engine.shards import Request, Shards, Step


@dataclass(frozen=True)
class Options:
    """Options of `kmeans`."""

    iterations: Annotated[int, Opt("Lloyd steps; stops early once no row moves.", min=0, max=100_000)] = 20
    restarts: Annotated[int, Opt("Independent runs; the one of least inertia is kept.", min=1, max=1000)] = 5
    seeding: Annotated[str, Opt("First centres: D^2 sampling, or random rows as faiss does.", choices=("d2", "random"))] = "d2"


@dataclass(frozen=True)
class Clusters:
    """The end of a run: inertia in fixed point, and for each cluster its size and its nearest eligible row.

    `row` is -1 where a cluster has no eligible row; `sqdist` is infinite there.
    """

    inertia: int
    size: Ints
    sqdist: Floats
    row: Ints


def _summarise(block: Block, centres: Centres, scale: float, motion: Motion | None) -> Clusters:
    """Give each row its final centre; return the block's share of the clusters."""
    k = len(centres.column)
    cluster = assign(block, centres, motion)
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


def _picks(shards: Shards, clusters: Clusters, centres: Matrix) -> Step:
    """Return exactly one pick a cluster, largest cluster first.

    A cluster with no eligible row gives its turn to the eligible row farthest from its own centre; those come last.
    """
    order = np.lexsort((clusters.row, -clusters.size))
    order = order[clusters.row[order] >= 0]
    picks, sqdist, size = clusters.row[order], clusters.sqdist[order], clusters.size[order]
    lacking = len(centres) - len(picks)
    if lacking:
        negated, rows = farthest_rows(shards, centres, picks, lacking)
        picks, sqdist = np.concatenate([picks, rows]), np.concatenate([sqdist, -negated])
        size = np.concatenate([size, np.zeros(len(rows), dtype=np.int64)])
    columns = {"cluster_size": size, "centre_distance": np.sqrt(sqdist)}
    return Step(0, 0, picks, size.astype(np.float64), columns=columns)


def _no_centres(shards: Shards) -> Matrix:
    return np.empty((0, shards.d), dtype=np.float32)


def _seeds(shards: Shards, request: Request, options: Options, restart: int) -> Ints:
    if options.seeding == "d2":
        return d2_seeds(shards, request.budget, request.seed, (restart,))[0]
    return random_rows(shards, request.seed, (restart,), request.budget, np.empty(0, dtype=np.int64))


def kmeans(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Cluster the whole pool into `budget` clusters; pick the eligible row nearest to each centre in its cluster.

    Labelled rows take part in the clustering and are not eligible (the multi-batch form when there are any). `gain`
    is the size of a pick's cluster, the objective the inertia: the sum of squared distances to the nearest centre.

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
    best: tuple[Clusters, Matrix] | None = None
    first, done, centres = 0, 0, _no_centres(shards)
    if request.resume is not None:
        first, done = divmod(request.resume.number - 1, max(1, options.iterations))
        done, centres = done + 1, request.resume.arrays["centres"]
        if first:
            kept: Matrix = request.resume.arrays["best"]
            best = shards.map(_summarise, Centres.of(torch.tensor(kept)), scale, None, combine=_closer), kept
    for restart in range(first, options.restarts):
        if restart > first or not len(centres):
            centres, done = shards.take(_seeds(shards, request, options, restart)).numpy(), 0
        motion: Motion | None = None
        for step in lloyd(shards, centres, options.iterations - done, largest):
            centres, motion = step.centres, step.motion
            note = f"restart {restart + 1} of {options.restarts}, {step.moved:,} rows moved"
            arrays = {"centres": centres, "best": best[1] if best else _no_centres(shards)}
            number = restart * options.iterations + done + step.number
            yield Step(number, total, nothing, np.empty(0), note, step.inertia, arrays=arrays)
        ready = Centres.of(torch.tensor(centres))
        clusters: Clusters = shards.map(_summarise, ready, scale, motion, combine=_closer)
        if best is None or clusters.inertia < best[0].inertia:
            best = clusters, centres
    assert best is not None
    last = _picks(shards, *best)
    yield replace(last, number=total, total=total, objective=best[0].inertia / scale)
