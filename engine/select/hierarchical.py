"""`hierarchical`: k-means of k-means, and a budget split evenly down the tree (Vo et al. 2024).

Plain k-means puts most of its centres where most rows are. Clustering the centres again, and these centres again, gives
top clusters that spread over what the pool shows rather than over how often it shows it; the budget is shared equally
among them, then among the clusters below each. So a rare kind of image gets as many picks as a common one.

Cost: the k-means of the lowest level. The levels above work on its centres alone, on the driver.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Ints
from engine.blocks import Ranked
from engine.draws import random_keys
from engine.nearest import nearest_sqdist
from engine.schema import InputError, Opt
from engine.select.clusters import Chosen, Counts, first_members, fit_centres, open_members, rank_within, settle
from engine.select.lloyd import Matrix
from engine.select.picking import UNCONDITIONAL, Shelves, both_ways
from engine.shards import Request, Shards, Step, close, from_array

SEED_KEY, SPLIT_KEY, LEAF_KEY = 2011, 2012, 2013
FIRST_LEVEL, ROWS_PER_CLUSTER, RATIO = 1000, 50, 10


@dataclass(frozen=True)
class Options:
    """Options of `hierarchical`."""

    levels: Annotated[
        tuple[int, ...] | None,
        Opt("Clusters of each level, the lowest first: 1000,100,10. Default: by pool and budget.", min=1),
    ] = None
    leaf: Annotated[
        str, Opt("Which images of a lowest cluster: those closest to its centre, or random.", choices=("closest", "random"))
    ] = "closest"
    resamplings: Annotated[
        int, Opt("Times that a level above the lowest is clustered again on the centres closest to its own.", min=0, max=1000)
    ] = 10
    iterations: Annotated[int, Opt("Lloyd steps of each k-means; stops early once no row moves.", min=0, max=100_000)] = 20


def default_levels(n: int, budget: int) -> tuple[int, ...]:
    """Return the clusters of each level for a pool of n rows, the lowest first: each a tenth of the one below, at least 2.

    The lowest has as many as there are picks, at least 1000, and at most one for each 50 rows.
    """
    levels = [max(1, min(max(budget, FIRST_LEVEL), n // ROWS_PER_CLUSTER))]
    while levels[-1] // RATIO >= 2:
        levels.append(levels[-1] // RATIO)
    return tuple(levels)


def _check(levels: tuple[int, ...], n: int) -> None:
    falling = all(below > above for below, above in itertools.pairwise(levels))
    if not levels or not falling or levels[0] > n:
        raise InputError(
            f"option levels is {','.join(map(str, levels))}: give the lowest level first, each of fewer clusters than the one "
            f"before it, and none of more than the pool's {n:,} images"
        )


def _fit(points: Matrix, k: int, iterations: int, seed: int, key: tuple[int, ...]) -> tuple[Matrix, Ints, npt.NDArray[Any]]:
    """Cluster the rows of an array; return the centres, each row's cluster and its squared distance to the centre."""
    *_, (_, _, centres) = fit_centres(from_array(points), k, iterations, seed, key)
    return centres, *nearest_sqdist(torch.tensor(points), torch.tensor(centres))


def cluster_level(points: Matrix, k: int, options: Options, seed: int, level: int) -> tuple[Matrix, Ints]:
    """Return k centres of the centres below (m, d), and the cluster of each of these, (m,).

    After the first k-means, `resamplings` times: only the centres closest to each cluster's centre, half as many as a
    cluster has on average (rounded up), are clustered anew, and all of them assigned again. Not where that is one each.
    """
    centres, owner, sqdist = _fit(points, k, options.iterations, seed, (SEED_KEY, level, 0))
    closest = -(-len(points) // (2 * k))
    for again in range(options.resamplings if closest > 1 else 0):
        order = np.lexsort((np.arange(len(points)), sqdist, owner))
        sample = np.sort(order[rank_within(owner[order]) < closest])
        if len(sample) < k:
            break
        centres, _, _ = _fit(points[sample], k, options.iterations, seed, (SEED_KEY, level, again + 1))
        owner, sqdist = nearest_sqdist(torch.tensor(points), torch.tensor(centres))
    return centres, owner


def split(budget: int, capacity: Ints, keys: npt.NDArray[np.uint64]) -> Ints:
    """Return shares that sum to `budget`, as even as the capacities (each at least its share) allow.

    min(capacity, t) for the largest t that the budget covers; what is left, one each, goes to those of smallest key that
    have room. Raises nothing: the budget is at most the sum of the capacities.
    """
    low, high = 0, int(capacity.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(capacity, middle).sum()) <= budget:
            low = middle
        else:
            high = middle - 1
    shares = np.minimum(capacity, low)
    room = np.flatnonzero(capacity > low)
    shares[room[np.argsort(keys[room], kind="stable")[: budget - int(shares.sum())]]] += 1
    return shares


def quotas(budget: int, eligible: Ints, parents: list[Ints], seed: int) -> Ints:
    """Return how many rows each lowest cluster gives, (k,): the budget split at the top, each share split below.

    `eligible` (k,) are the rows that may be picked of each lowest cluster; parents[i] gives each cluster of level i its
    cluster of level i + 1.
    """
    capacity = [eligible]
    for parent in parents:
        capacity.append(np.bincount(parent, weights=capacity[-1]).astype(np.int64))
    tops = len(capacity) - 1
    shares = split(budget, capacity[tops], random_keys(seed, (SPLIT_KEY, tops), np.arange(len(capacity[tops]))))
    for level in range(tops - 1, -1, -1):
        keys = random_keys(seed, (SPLIT_KEY, level), np.arange(len(capacity[level])))
        below = np.zeros_like(capacity[level])
        for cluster in np.flatnonzero(shares):
            children = np.flatnonzero(parents[level] == cluster)
            below[children] = split(int(shares[cluster]), capacity[level][children], keys[children])
        shares = below
    return shares


def _down_the_tree(shards: Shards, counts: Counts, parents: list[Ints], leaf: str, request: Request) -> Chosen:
    """Return the picks in pick order: shares of the budget, and again of what is left of it where rows were not allowed."""
    nothing, size = np.empty(0, dtype=np.int64), counts.rows
    made = Chosen(nothing, np.empty(0), nothing, np.empty(0))
    draw = None if leaf == "closest" else (request.seed, LEAF_KEY)
    while due := min(request.lacking(len(made.row)), request.budget):
        close(shards, request.ledger)
        capacity = open_members(shards, len(size), made.row) if request.ledger.bound else counts.eligible
        quota = quotas(min(due, int(capacity.sum())), capacity, parents, request.seed)
        sqdist: dict[int, float] = {}

        def fetch(shelves: Ints, most: Ints, taken: Ints, sqdist: dict[int, float] = sqdist) -> list[Ranked]:
            wanted = np.zeros_like(size)
            wanted[shelves] = most
            found = first_members(shards, wanted, taken, draw)
            sqdist |= zip(found.row.tolist(), found.sqdist.tolist(), strict=True)
            return found.shelves(shelves)

        slots = np.repeat(np.arange(len(size), dtype=np.int64), quota)
        order = slots[np.lexsort((slots, -size[slots], rank_within(slots)))]
        rows, _ = Shelves(shards, request, fetch, quota, taken=made.row).take_all(order)
        cluster, rows = order[rows >= 0], rows[rows >= 0]
        far = np.array([sqdist[row] for row in rows.tolist()], dtype=np.float64)
        parts = ((made.cluster, cluster), (made.key, far), (made.row, rows), (made.sqdist, far))
        made = Chosen(*(np.concatenate(part) for part in parts))
    return made


def hierarchical(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Split the budget evenly over the top clusters, each share over the clusters below, down to rows closest to a centre.

    As evenly as capacity, the eligible rows below a cluster, allows; what doesn't divide goes to clusters drawn by the
    seed, as in the released code. All rows take part in the lowest k-means. Picks come in turns: the first of every
    lowest cluster that gives one, largest first, then the second. `gain` is how many rows of its lowest cluster a pick
    stands for: the cluster's rows over its picks.

    Deviations: a lowest cluster gives the rows closest to its centre (`leaf=random`: seeded draws, the paper's default);
    exactly `budget` rows, never one twice; 20 Lloyd steps, not 50. As in the paper's largest run, resampling is for the
    levels above the lowest. Shares count picks alone: labelled rows only take from the capacities. Where conditions leave
    turns unused, what is left of the budget is split again, over the rows that are still allowed.
    """
    budget, nothing = request.budget, np.empty(0, dtype=np.int64)
    if budget == 0:
        yield Step(0, 0, nothing, np.empty(0))
        return
    levels = default_levels(shards.n, budget) if options.levels is None else options.levels
    _check(levels, shards.n)
    total = options.iterations + 1
    for number, moved, centres in fit_centres(shards, levels[0], options.iterations, request.seed, (SEED_KEY,), request.resume):
        arrays = {"centres": centres}
        yield Step(number, total, nothing, np.empty(0), f"{moved:,} rows moved", arrays=arrays)
    counts = settle(shards, centres, request.labeled)
    parents, points = [], centres
    for level, k in enumerate(levels[1:], start=1):
        points, owner = cluster_level(points, k, options, request.seed, level)
        parents.append(owner)
    found, aside = both_ways(request, partial(_down_the_tree, shards, counts, parents, options.leaf))
    leaf = found.cluster
    columns = {"leaf": leaf, "leaf_size": counts.rows[leaf], "centre_distance": np.sqrt(found.sqdist)}
    gains = counts.rows[leaf] / np.bincount(leaf)[leaf]
    yield Step(total, total, found.row, gains, columns=columns, arrays=arrays | ({UNCONDITIONAL: aside.row} if aside else {}))
