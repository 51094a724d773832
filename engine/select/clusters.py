"""The pool in k-means clusters, and the rows inside some of them: the ground of methods that work within clusters.

Centres come from D^2 seeds and exact Lloyd steps. Which rows a cluster has stays in the blocks; the driver sees counts,
and the members of a few clusters at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Bools, Floats, Ints
from engine.blocks import Block, Ranked, among
from engine.draws import random_keys
from engine.nearest import nearest_sqdist
from engine.select.lloyd import Matrix, largest_entry, lloyd
from engine.select.seeding import d2_seeds
from engine.shards import Shards, Step

Centres = tuple[int, int, Matrix]
"""(Lloyd steps done, rows the last one moved, the centres after it (k, d))."""


def fit_centres(
    shards: Shards, k: int, iterations: int, seed: int, key: tuple[int, ...], resume: Step | None = None
) -> Iterator[Centres]:
    """Yield the centres of k clusters over all rows, eligible or not: the D^2 seeds, then those after each Lloyd step.

    A pure function of (seed, key). The last ones yielded are the result: after `iterations` steps, or sooner, once no
    row moves. `resume` is a step with the number of Lloyd steps done, and their `centres` among its arrays.
    """
    if resume is not None:
        done, centres = resume.number, np.asarray(resume.arrays["centres"], dtype=np.float32)
    else:
        done, centres = 0, shards.take(d2_seeds(shards, k, seed, key)[0]).numpy()
    yield done, shards.n, centres
    for step in lloyd(shards, centres, iterations - done, max(shards.map(largest_entry))):
        yield done + step.number, step.moved, step.centres


@dataclass(frozen=True)
class Counts:
    """Rows of each cluster (k,): all, the eligible ones, and the labelled ones."""

    rows: Ints
    eligible: Ints
    labeled: Ints


def _settle(block: Block, centres: Matrix, labeled: Ints) -> Counts:
    """Give each row its nearest centre; keep in the block which rows each cluster has, and how far from its centre."""
    cluster, sqdist = nearest_sqdist(block.x, torch.tensor(centres), block.norms)
    order = np.argsort(cluster, kind="stable")
    starts = np.searchsorted(cluster[order], np.arange(len(centres) + 1))
    block.state["clusters"] = cluster, sqdist, order, starts
    masks: tuple[Any, ...] = (slice(None), block.eligible, among(block.rows, labeled))
    return Counts(*(np.bincount(cluster[mask], minlength=len(centres)) for mask in masks))


def _add(a: Counts, b: Counts) -> Counts:
    return Counts(a.rows + b.rows, a.eligible + b.eligible, a.labeled + b.labeled)


def settle(shards: Shards, centres: Matrix, labeled: Ints) -> Counts:
    """Put every row into the cluster of its nearest centre, for `members`; return how many each cluster has."""
    counts: Counts = shards.map(_settle, centres, labeled, combine=_add)
    return counts


@dataclass(frozen=True)
class Members:
    """The rows of some clusters, in row order.

    `numbers` (m,) are their numbers among all vectors, as `Shards.map(at=...)` takes them; `rows` their pool rows,
    `cluster` and `sqdist` their cluster and the canonical squared distance to its centre; `eligible`.
    """

    numbers: Ints
    rows: Ints
    cluster: Ints
    sqdist: Floats
    eligible: Bools


def cluster_distances(block: Block) -> tuple[Ints, Floats]:
    """Return each row's cluster and the canonical squared distance to its centre, as `settle` found them."""
    cluster, sqdist, _, _ = block.state["clusters"]
    return cluster, sqdist


def _members(block: Block, clusters: Ints) -> tuple[int, Members]:
    cluster, sqdist, order, starts = block.state["clusters"]
    inside = [order[starts[c] : starts[c + 1]] for c in clusters]
    at = np.sort(np.concatenate(inside))
    return len(block.rows), Members(at, block.rows[at], cluster[at], sqdist[at], block.eligible[at])


def members(shards: Shards, clusters: Ints) -> Members:
    """Return the rows of some clusters; `settle` comes first."""
    found = shards.map(_members, clusters)
    ends = np.cumsum([count for count, _ in found])
    parts = [part for _, part in found]
    numbers = [part.numbers + end - count for part, end, (count, _) in zip(parts, ends, found, strict=True)]
    return Members(
        np.concatenate(numbers),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.cluster for part in parts]),
        np.concatenate([part.sqdist for part in parts]),
        np.concatenate([part.eligible for part in parts]),
    )


def packs(clusters: Ints, rows: Ints, most: int) -> Iterator[Ints]:
    """Yield the clusters in runs that hold at most `most` rows together; a larger cluster is a run of its own.

    `rows` (k,) are the rows of every cluster, of which `clusters` are some.
    """
    run: list[int] = []
    held = 0
    for cluster in clusters.tolist():
        if run and held + rows[cluster] > most:
            yield np.array(run, dtype=np.int64)
            run, held = [], 0
        run.append(cluster)
        held += int(rows[cluster])
    if run:
        yield np.array(run, dtype=np.int64)


def rank_within(group: Ints) -> Ints:
    """Return the place of each entry within its run of equal values; `group` is sorted."""
    return np.arange(len(group), dtype=np.int64) - np.searchsorted(group, group)


@dataclass(frozen=True)
class Chosen:
    """Rows chosen from clusters: by cluster, then key, then row; `sqdist` is the one to the cluster's centre."""

    cluster: Ints
    key: npt.NDArray[Any]
    row: Ints
    sqdist: Floats

    def shelves(self, clusters: Ints) -> list[Ranked]:
        """Return the keys and rows of each of some clusters."""
        low, high = np.searchsorted(self.cluster, clusters), np.searchsorted(self.cluster, clusters, "right")
        return [(self.key[a:b], self.row[a:b]) for a, b in zip(low, high, strict=True)]


def _first(most: Ints, found: Chosen) -> Chosen:
    order = np.lexsort((found.row, found.key, found.cluster))
    cluster = found.cluster[order]
    kept = order[rank_within(cluster) < most[cluster]]
    return Chosen(found.cluster[kept], found.key[kept], found.row[kept], found.sqdist[kept])


def _choose(block: Block, most: Ints, taken: Ints, draw: tuple[int, int] | None) -> Chosen:
    cluster, sqdist = cluster_distances(block)
    ok = np.flatnonzero(block.eligible & ~np.isin(block.rows, taken))
    key = sqdist[ok] if draw is None else random_keys(draw[0], (draw[1],), block.rows[ok])
    return _first(most, Chosen(cluster[ok], key, block.rows[ok], sqdist[ok]))


def _merge(most: Ints, a: Chosen, b: Chosen) -> Chosen:
    pairs = ((a.cluster, b.cluster), (a.key, b.key), (a.row, b.row), (a.sqdist, b.sqdist))
    return _first(most, Chosen(*(np.concatenate(pair) for pair in pairs)))


def first_members(shards: Shards, most: Ints, taken: Ints, draw: tuple[int, int] | None = None) -> Chosen:
    """Return the most[c] eligible rows closest to the centre of each cluster c, or the first drawn by (seed, key).

    `taken` are left out; fewer where a cluster has fewer. `settle` comes first.
    """
    found: Chosen = shards.map(_choose, most, taken, draw, combine=partial(_merge, most))
    return found


def _open(block: Block, k: int, taken: Ints) -> Ints:
    cluster, _ = cluster_distances(block)
    return np.bincount(cluster[block.eligible & ~np.isin(block.rows, taken)], minlength=k)


def open_members(shards: Shards, k: int, taken: Ints) -> Ints:
    """Return how many eligible rows, `taken` left out, each of k clusters has, (k,)."""
    counts: Ints = shards.map(_open, k, taken, combine=np.add)
    return counts
