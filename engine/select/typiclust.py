"""`typiclust`: the most typical row of each uncovered cluster (Hacohen, Dekel, Weinshall 2022).

A row's typicality is the inverse of its mean distance to its nearest neighbours in its own cluster. Fast float32
products bound every eligible row's mean from both sides; the rows whose lower bound can still win are measured
canonically, best bound first, until no other can beat them. So the picks are those of exact distances, and few rows
need them.

Cost: the clustering, and for each cluster of m rows that is picked from, about m^2 d multiplications on the shards. The
driver holds a few numbers for each row of PACK_ROWS rows, or of one larger cluster, and QUERY_ROWS vectors.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block, Ranked
from engine.canonical import canonical_norms, canonical_sqdist
from engine.nearest import TILE_ELEMENTS
from engine.products import score_error, scores
from engine.schema import Opt
from engine.select.clusters import Counts, Members, fit_centres, members, open_members, packs, rank_within, settle
from engine.select.lloyd import Matrix
from engine.select.picking import SPARE_ROWS, UNCONDITIONAL, Shelves, both_ways
from engine.shards import Request, Shards, Step

SEED_KEY = 2001
SMALL = 5
"""Clusters of so few rows are skipped as long as larger ones have rows to pick."""
PACK_ROWS, QUERY_ROWS, MEMBER_ROWS = 8192, 4096, 65536
"""Rows of clusters dealt with together; rows whose neighbours are sought at once; rows among which they are."""
WAVE = 16
"""Rows of a cluster measured canonically at once, beside as many as are picked from it."""


@dataclass(frozen=True)
class Options:
    """Options of `typiclust`."""

    max_clusters: Annotated[int, Opt("Clusters: one for each pick and labelled image, but no more than this.", min=1)] = 500
    neighbors: Annotated[int, Opt("Nearest neighbours in a row's cluster that its typicality is taken from.", min=1)] = 20
    iterations: Annotated[int, Opt("Lloyd steps; stops early once no row moves.", min=0, max=100_000)] = 20


Heap = list[tuple[int, int, int, int]]
"""(labelled and picked rows, rows, negated, number of a cluster, its eligible rows left), least first."""


def _tiers(counts: Counts, eligible: Ints) -> tuple[Heap, Heap]:
    """Return the clusters with eligible rows: those of more than SMALL rows, and the others."""
    heaps: list[Heap] = []
    for tier in (counts.rows > SMALL, counts.rows <= SMALL):
        some = np.flatnonzero(tier & (eligible > 0)).tolist()
        heaps.append([(int(counts.labeled[c]), -int(counts.rows[c]), c, int(eligible[c])) for c in some])
        heapq.heapify(heaps[-1])
    return heaps[0], heaps[1]


def turns(counts: Counts, budget: int) -> Ints:
    """Return the cluster of each pick, (budget,): in turn the one with the fewest labelled and picked rows.

    Of several such the one with the most rows, then the smaller index. A cluster of SMALL or fewer rows gets a turn only
    when no larger one has an eligible row left.
    """
    order: list[int] = []
    for heap in _tiers(counts, counts.eligible):
        while heap and len(order) < budget:
            covered, size, cluster, left = heap[0]
            order.append(cluster)
            if left > 1:
                heapq.heapreplace(heap, (covered + 1, size, cluster, left - 1))
            else:
                heapq.heappop(heap)
    return np.array(order, dtype=np.int64)


@dataclass(frozen=True)
class Queries:
    """Rows whose neighbours are sought, sorted by cluster: vectors (m, d), pool rows, clusters, norms (m,)."""

    x: Matrix
    rows: Ints
    cluster: Ints
    norms: Floats


def _tiles(block: Block, queries: Queries, cluster: Ints) -> Iterator[tuple[slice, Ints, torch.Tensor]]:
    """Yield (queries, places in the block, 0.5|x|^2 - q.x) for the pairs in one cluster; a row and itself get infinity.

    `cluster` (r,) is the cluster of each row of the block.
    """
    half = torch.from_numpy((0.5 * block.norms * block.norms).astype(np.float32))
    order = np.argsort(cluster, kind="stable")
    for asked in np.intersect1d(cluster, queries.cluster):
        at = order[slice(*np.searchsorted(cluster[order], [asked, asked + 1]))]
        first, last = np.searchsorted(queries.cluster, [asked, asked + 1])
        x, rows = block.some(at), block.rows[at]
        offset = half[torch.from_numpy(at)].to(x.device)
        step = max(1, TILE_ELEMENTS // len(at))
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            score = scores(offset, torch.tensor(queries.x[part]).to(x.device), x)
            own = np.minimum(np.searchsorted(rows, queries.rows[part]), len(rows) - 1)
            same = np.flatnonzero(rows[own] == queries.rows[part])
            score[torch.from_numpy(same), torch.from_numpy(own[same])] = torch.inf
            yield part, at, score


def _error(block: Block, norms: Floats, longest: float) -> Floats:
    """Return how far the block's products with queries of these norms (q,) may be off: in the precision they have there."""
    error: Floats = score_error(block.x.shape[1], norms, longest)
    return error


def _near(block: Block, queries: Queries, rows: Ints, cluster: Ints, m: int) -> Floats:
    """Return the m smallest approximate squared distances from each query to rows of its cluster here, (q, m).

    In order, infinite beyond the last. `rows` are the members, ascending, that the block is made of, with their cluster.
    """
    out = np.full((len(queries.rows), m), np.inf)
    for part, at, score in _tiles(block, queries, cluster[np.searchsorted(rows, block.rows)]):
        best = score.topk(min(m, len(at)), dim=1, largest=False, sorted=True).values
        out[part, : best.shape[1]] = queries.norms[part, None] ** 2 + 2 * best.double().cpu().numpy()
    return out


def _exact(block: Block, queries: Queries, limit: Floats, rows: Ints, cluster: Ints, m: int) -> Floats:
    """Return the m smallest canonical squared distances, as `_near`, of the pairs not certainly beyond `limit` (q,)."""
    out = np.full((len(queries.rows), m), np.inf)
    for part, at, score in _tiles(block, queries, cluster[np.searchsorted(rows, block.rows)]):
        reach = torch.from_numpy(limit[part] - queries.norms[part] ** 2).to(score.device)
        query, place = ((2 * score.double() <= reach[:, None]) & score.isfinite()).nonzero().cpu().numpy().T
        sqdist = canonical_sqdist(torch.tensor(queries.x[part]).to(score.device), query, block.x, at[place])
        order = np.lexsort((sqdist, query))
        rank = rank_within(query[order])
        kept = rank < m
        out[part.start + query[order][kept], rank[kept]] = sqdist[order][kept]
    return out


def _merge(a: Floats, b: Floats) -> Floats:
    """Combine two results of `_near` or `_exact`."""
    return np.asarray(np.sort(np.concatenate([a, b], axis=1), axis=1)[:, : a.shape[1]])


def _mean(sqdist: Floats, width: Ints) -> Floats:
    """Return the mean distance over the first width_i of each row's squared distances, infinite where that is none.

    Summed column by column: the same bits for any number of rows.
    """
    total = np.zeros(len(width))
    for column in range(sqdist.shape[1]):
        total += np.sqrt(np.where(column < width, sqdist[:, column], 0.0))
    return np.where(width > 0, total / np.maximum(width, 1), np.inf)


class _Pack:
    """The eligible rows of some clusters, sorted by cluster and row, and the search for the most typical of them."""

    def __init__(self, shards: Shards, found: Members, neighbors: int, longest: float, taken: Ints) -> None:
        self.shards, self.found, self.neighbors, self.longest = shards, found, neighbors, longest
        order = np.lexsort((found.rows, found.cluster))
        order = order[found.eligible[order] & ~np.isin(found.rows[order], taken)]
        self.rows, self.cluster = found.rows[order], found.cluster[order]
        self.width = np.minimum(neighbors, np.bincount(found.cluster)[self.cluster] - 1)
        self.reach = np.empty(len(order))

    def _search(self, some: Ints, measure: Callable[..., Floats], *given: Floats) -> tuple[Queries, Floats]:
        """Return the queries and their smallest squared distances (q, neighbors), by `_near` or `_exact`."""
        x = self.shards.take(self.rows[some])
        queries = Queries(x.numpy(), self.rows[some], self.cluster[some], canonical_norms(x))
        nearest = np.full((len(some), self.neighbors), np.inf)
        for start in range(0, len(self.found.rows), MEMBER_ROWS):
            part = slice(start, start + MEMBER_ROWS)
            args = (queries, *given, self.found.rows[part], self.found.cluster[part], self.neighbors)
            nearest = _merge(nearest, self.shards.map(measure, *args, combine=_merge, at=self.found.numbers[part]))
        return queries, nearest

    def _bounds(self) -> tuple[Floats, Floats]:
        """Return bounds on every row's mean distance, from below and above; keep how far its neighbours may be."""
        lower, upper = np.empty(len(self.rows)), np.empty(len(self.rows))
        for some in _chunks(np.arange(len(self.rows))):
            queries, near = self._search(some, _near)
            width, error = self.width[some], 2 * self.shards.map(_error, queries.norms, self.longest, combine=np.maximum)
            lower[some] = _mean(np.maximum(near - error[:, None], 0), width) * (1 - 1e-12)
            upper[some] = _mean(near + error[:, None], width) * (1 + 1e-12)
            self.reach[some] = near[np.arange(len(some)), np.maximum(width - 1, 0)] + 2 * error
        return lower, upper

    def _bars(self, values: Floats, quota: Ints) -> tuple[Floats, Ints]:
        """Return (value, row) of the quota-th of each cluster's rows by (value, row), each (k,)."""
        order = np.lexsort((self.rows, values, self.cluster))
        last = order[rank_within(self.cluster[order]) == quota[self.cluster[order]] - 1]
        bar, row = np.full(len(quota), np.inf), np.full(len(quota), np.iinfo(np.int64).max)
        bar[self.cluster[last]], row[self.cluster[last]] = values[last], self.rows[last]
        return bar, row

    def typical(self, quota: Ints) -> tuple[Ints, Floats]:
        """Return the quota[c] rows of smallest mean distance of each cluster c, and these means, by cluster, best first.

        Equal means go to the smaller row.
        """
        lower, upper = self._bounds()
        mean = np.full(len(self.rows), np.inf)
        bar, _ = self._bars(upper, quota)
        queue = np.lexsort((self.rows, lower, self.cluster))
        queue = queue[lower[queue] <= bar[self.cluster[queue]]]
        while len(queue):
            first = rank_within(self.cluster[queue]) < quota[self.cluster[queue]] + WAVE
            for some in _chunks(queue[first]):
                _, exact = self._search(some, _exact, self.reach[some])
                mean[some] = _mean(exact, self.width[some])
            queue = queue[~first]
            bar, row = self._bars(mean, quota)
            floor, cluster = lower[queue], self.cluster[queue]
            queue = queue[(floor < bar[cluster]) | ((floor == bar[cluster]) & (self.rows[queue] < row[cluster]))]
        order = np.lexsort((self.rows, mean, self.cluster))
        best = order[rank_within(self.cluster[order]) < quota[self.cluster[order]]]
        return self.rows[best], mean[best]


def _chunks(some: Ints) -> list[Ints]:
    return [some[start : start + QUERY_ROWS] for start in range(0, len(some), QUERY_ROWS)]


def _longest(block: Block) -> float:
    return float(block.norms.max(initial=0.0))


def _search_clusters(
    shards: Shards, counts: Counts, quota: Ints, neighbors: int, found: dict[str, Any], taken: Ints
) -> Iterator[tuple[int, int, Ints, Floats]]:
    """Yield (done, of how many, rows, mean distances) group by group of clusters: quota[c] of each, by cluster, best first.

    `found` holds the `rows` and `means` of the groups that were done before; `taken` rows are left out.
    """
    groups = list(packs(np.flatnonzero(quota), counts.rows, PACK_ROWS))
    longest = max(shards.map(_longest))
    rows, means = found["rows"], found["means"]
    for done, group in enumerate(groups, start=1):
        if len(rows) < quota[: group[-1] + 1].sum():
            more = _Pack(shards, members(shards, group), neighbors, longest, taken).typical(quota)
            rows, means = np.concatenate([rows, more[0]]), np.concatenate([means, more[1]])
        yield done, len(groups), rows, means


def _on_shelves(quota: Ints, rows: Ints, means: Floats) -> list[Ranked]:
    """Return the means and rows of each cluster, of which quota[c] each stand there."""
    ends = np.cumsum(quota)
    return [(means[end - m : end], rows[end - m : end]) for end, m in zip(ends.tolist(), quota.tolist(), strict=True)]


def _by_turns(
    shards: Shards, counts: Counts, neighbors: int, filled: list[Ranked], request: Request
) -> tuple[Ints, Ints, Floats]:
    """Return the cluster, row and mean distance of each pick: in turn the cluster as `turns` says, its first row allowed.

    A cluster with none gets no more turns. `filled` are the rows found already of each cluster, best first.
    """

    def fetch(shelves: Ints, most: Ints, taken: Ints) -> list[Ranked]:
        wanted = np.zeros_like(counts.rows)
        wanted[shelves] = np.minimum(most, open_members(shards, len(wanted), taken)[shelves])
        nothing: dict[str, Any] = {"rows": taken[:0], "means": np.empty(0)}
        for _, _, rows, means in _search_clusters(shards, counts, wanted, neighbors, nothing, taken):
            nothing = {"rows": rows, "means": means}
        every = _on_shelves(wanted, nothing["rows"], nothing["means"])
        return [every[shelf] for shelf in shelves]

    due = np.array([len(rows) for _, rows in filled], dtype=np.int64)
    shelves = Shelves(shards, request, fetch, due, filled=filled)
    made: list[tuple[int, int, float]] = []
    for heap in _tiers(counts, counts.eligible):
        while heap and request.lacking(len(made)):
            covered, size, cluster, left = heap[0]
            found = shelves.take(cluster)
            if found is not None:
                made.append((cluster, *found))
            if found is None or left == 1:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (covered + 1, size, cluster, left - 1))
    clusters, rows, means = zip(*made, strict=True)
    return np.array(clusters), np.array(rows), np.array(means)


def typiclust(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Pick the most typical eligible row of the least covered cluster, the largest of several, again and again.

    min(budget + labelled, max_clusters) k-means clusters over the whole pool; typicality is 1 / the mean distance to the
    nearest min(neighbors, cluster size - 1) other rows of the cluster, eligible or not. `gain` is the typicality
    (infinite for a row whose neighbours are all the same as it; 0 for a row alone in its cluster).

    The rules of the paper, with the cases it leaves open: each turn goes to the cluster with the fewest labelled and
    picked rows, the largest of several (see `turns`); clusters of 5 or fewer rows are skipped unless no larger one has
    an eligible row left, because exactly `budget` rows are due. Deviations from the released code: it takes squared
    distances, among rows neither labelled nor picked before, from min(20, half of them) neighbours; it goes round the
    clusters in their first order however many labelled rows each has; and mini-batches make more than 50 clusters.
    """
    budget, nothing = request.budget, np.empty(0, dtype=np.int64)
    if budget == 0:
        yield Step(0, 0, nothing, np.empty(0))
        return
    k = min(budget + len(request.labeled), options.max_clusters)
    arrays: dict[str, Any] = dict(request.resume.arrays) if request.resume else {"rows": nothing, "means": np.empty(0)}
    fit = fit_centres(shards, k, options.iterations, request.seed, (SEED_KEY,), request.resume)
    for number, moved, centres in fit:
        arrays["centres"] = centres
        total = max(number, options.iterations + 1)
        yield Step(number, total, nothing, np.empty(0), f"{moved:,} rows moved", arrays=dict(arrays))
    counts = settle(shards, centres, request.labeled)
    quota = np.bincount(turns(counts, budget), minlength=k)
    if request.ledger.bound:
        quota = np.minimum(np.where(quota > 0, quota + SPARE_ROWS, 0), counts.eligible)
    for done, total, rows, means in _search_clusters(shards, counts, quota, options.neighbors, arrays, nothing):
        arrays = {"centres": centres, "rows": rows, "means": means}
        if done < total:
            note = f"{done} of {total} groups of clusters"
            steps = options.iterations + done, options.iterations + total
            yield Step(*steps, nothing, np.empty(0), note, arrays=arrays)
    filled = _on_shelves(quota, rows, means)
    found, aside = both_ways(request, partial(_by_turns, shards, counts, options.neighbors, filled))
    cluster, picks, distance = found
    with np.errstate(divide="ignore"):
        typicality = 1 / distance
    columns = {"cluster_size": counts.rows[cluster], "mean_distance": distance}
    steps = options.iterations + total, options.iterations + total
    arrays |= {UNCONDITIONAL: aside[1]} if aside else {}
    yield Step(*steps, picks, typicality, columns=columns, arrays=arrays)
