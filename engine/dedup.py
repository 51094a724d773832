"""`dedup`: which images are near copies of others, an exclusion list to give to `select` (SemDeDup, Abbas et al. 2023).

The pool is clustered, and within a cluster one image of every group of near copies is kept. Copies on two sides of a
border between clusters are not found: the method's own approximation; with one cluster it is exact. Fast products decide
similarities beyond their rounding error, canonical ones the rest, so the list is the same on any number of shards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from engine.arrays import Bools, Floats, Ints
from engine.blocks import Block
from engine.canonical import canonical_dot, canonical_norms, rows_at, single_thread
from engine.folders import Claim, digest_of, publish
from engine.nearest import TILE_ELEMENTS
from engine.placement import open_shards
from engine.places import Place
from engine.products import score_error, scores
from engine.runner import ATTEMPTS
from engine.schema import InputError, Progress, RunError, no_progress, result_options
from engine.select.clusters import fit_centres, members, packs, settle
from engine.select.lloyd import Matrix
from engine.shards import LostShardError, Shards, prepare
from engine.store import FeatureStore, table_bytes
from engine.verbs import DedupOptions

SEED_KEY = 2021
HEAD_ROWS = 2048
"""Rows among which the driver looks for copies at once."""
MEMBER_ROWS = 65536
"""Rows compared with the kept ones at once, on the shards."""
EXACT_ROWS = 8192
"""Pools up to this size are one cluster by default."""
NORM_ERROR = 1e-6
"""More than the norm of a normalised float32 vector differs from 1."""

NOTHING: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Copies:
    """Rows that are near copies, (m,): their pool rows, the kept row each is a copy of, and their cosine similarity."""

    rows: Ints
    kept: Ints
    similarity: Floats


def join(parts: list[Copies]) -> Copies:
    """Return several results as one, in row order."""
    rows = np.concatenate([NOTHING, *(part.rows for part in parts)])
    order = np.argsort(rows)
    kept = np.concatenate([NOTHING, *(part.kept for part in parts)])
    similarity = np.concatenate([np.empty(0), *(part.similarity for part in parts)])
    return Copies(rows[order], kept[order], similarity[order])


def default_clusters(n: int) -> int:
    """Return how many clusters n rows make: 1 up to 8192 rows, else the root of n / 20.

    That is where 20 Lloyd steps cost as much as the comparisons within clusters.
    """
    return 1 if n <= EXACT_ROWS else round((n / 20) ** 0.5)


def cosine(a: torch.Tensor, i: Ints, b: torch.Tensor, j: Ints) -> Floats:
    """Return the canonical cosine similarity of a[i] and b[j] for each pair, at most 1; a vector of zeros has 0."""
    lengths = _norms(a, i) * _norms(b, j)
    return np.minimum(canonical_dot(a, i, b, j) / np.where(lengths > 0, lengths, 1.0), 1.0)


def _norms(a: torch.Tensor, i: Ints) -> Floats:
    some, back = np.unique(i, return_inverse=True)
    return canonical_norms(rows_at(a, some))[back]


def similar(a: torch.Tensor, b: torch.Tensor, eps: float) -> Bools:
    """Return which pairs of normalised vectors have a cosine similarity above 1 - eps, (len(a), len(b))."""
    bar = 1 - eps
    margin = score_error(a.shape[1], 1 + NORM_ERROR, 1 + NORM_ERROR) + 3 * NORM_ERROR
    score = scores(a.new_zeros(len(b)), a, b).neg_()
    found: Bools = (score > bar).cpu().numpy()
    i, j = ((score - bar).abs() <= margin).nonzero().cpu().numpy().T
    step = max(1, TILE_ELEMENTS // max(1, a.shape[1]))
    for start in range(0, len(i), step):
        some, others = i[start : start + step], j[start : start + step]
        found[some, others] = cosine(a, some, b, others) > bar
    return found


def leaders(x: torch.Tensor, group: Ints, eps: float) -> Ints:
    """Return for each vector, in order, the first kept vector of its group that it is a copy of; -1 where it is kept.

    A vector is kept unless a kept one before it is within eps. So copies of copies don't merge: of A ~ B ~ C, with A and
    C not alike, B goes and A and C stay. `group` (m,) is sorted.
    """
    leader = np.full(len(x), -1, dtype=np.int64)
    for first, last in zip(*_runs(group), strict=True):
        mine = x[first:last]
        close = np.triu(np.concatenate([similar(part, mine, eps) for part in _pieces(mine, len(mine))]), 1)
        for place in np.flatnonzero(close.any(axis=1)):
            if leader[first + place] < 0:
                copies = first + np.flatnonzero(close[place])
                leader[copies[leader[copies] < 0]] = first + place
    return leader


def _pieces(x: torch.Tensor, width: int) -> list[torch.Tensor]:
    """Return the rows of x in pieces that make a tile with `width` others; one, of no rows, where x has none."""
    step = max(1, TILE_ELEMENTS // max(1, width))
    return [x[start : start + step] for start in range(0, max(1, len(x)), step)]


def _runs(group: Ints) -> tuple[Ints, Ints]:
    """Return where each run of equal values begins and ends."""
    starts = np.flatnonzero(np.diff(group, prepend=group[:1] - 1))
    return starts, np.append(starts[1:], len(group))


def _follow(block: Block, kept: Matrix, eps: float) -> tuple[Ints, Ints, Floats]:
    """Return (pool row, place of the first kept vector it is a copy of, similarity) of the block's copies of kept ones."""
    x, leading = block.x, torch.tensor(kept).to(block.x.device)
    copy, leader = [], []
    for piece in _pieces(x, len(kept)):
        close = similar(piece, leading, eps)
        copy.append(close.any(axis=1))
        leader.append(close[copy[-1]].argmax(axis=1))
    places, first = np.flatnonzero(np.concatenate(copy)), np.concatenate(leader)
    return block.rows[places], first, cosine(x, places, leading, first)


def copies_among(shards: Shards, clusters: Ints, eps: float) -> Iterator[Copies]:
    """Yield the near copies within each of some clusters, piece by piece; `settle` comes first.

    Rows come in order of their distance to the cluster's centre, the farthest first (of equally far ones the smaller
    row): the released code's default, which keeps what is least like the rest. The driver compares HEAD_ROWS of them with
    one another; what it keeps is then compared, on the shards, with the rows after these.
    """
    found = members(shards, clusters)
    order = np.lexsort((found.rows, -found.sqdist, found.cluster))
    numbers, rows, group = found.numbers[order], found.rows[order], found.cluster[order]
    while len(rows):
        x = shards.take(rows[:HEAD_ROWS])
        with single_thread():
            leader = leaders(x, group[:HEAD_ROWS], eps)
        copy = np.flatnonzero(leader >= 0)
        yield Copies(rows[copy], rows[leader[copy]], cosine(x, copy, x, leader[copy]))
        kept = np.flatnonzero(leader < 0)
        kept_rows, vectors = rows[kept], x[torch.from_numpy(kept)].numpy()
        numbers, rows, group = numbers[HEAD_ROWS:], rows[HEAD_ROWS:], group[HEAD_ROWS:]
        gone = [NOTHING]
        for at in np.split(np.sort(numbers), range(MEMBER_ROWS, len(numbers), MEMBER_ROWS)) if len(numbers) else ():
            for copies, first, similarity in shards.map(_follow, vectors, eps, at=at):
                gone.append(copies)
                yield Copies(copies, kept_rows[first], similarity)
        stays = ~np.isin(rows, np.concatenate(gone))
        numbers, rows, group = numbers[stays], rows[stays], group[stays]


def find_copies(
    shards: Shards, clusters: int, eps: float, iterations: int, seed: int, progress: Progress = no_progress
) -> Copies:
    """Return the near copies among all rows of shards with normalised vectors, in row order."""
    prepare(shards, NOTHING)
    for fitted in fit_centres(shards, clusters, iterations, seed, (SEED_KEY,)):
        step, moved, _ = fitted
        progress("cluster", step, iterations, f"{moved:,} rows moved")
    counts = settle(shards, fitted[2], NOTHING)
    parts: list[Copies] = []
    done = 0
    for group in packs(np.flatnonzero(counts.rows), counts.rows, HEAD_ROWS):
        parts += copies_among(shards, group, eps)
        done += int(counts.rows[group].sum())
        progress("dedup", done, shards.n, f"{sum(len(part.rows) for part in parts):,} near copies")
    return join(parts)


def _persist(shards: Shards, work: Callable[[], Copies]) -> Copies:
    """Return what `work` returns; where a shard is lost, make it again and start over. Raises RunError after ATTEMPTS."""
    for _ in range(ATTEMPTS):
        try:
            return work()
        except LostShardError:
            shards.restore()
    raise RunError(f"shards were lost {ATTEMPTS} times in a row: run the same command again")


def _write(place: Place, store: FeatureStore, copies: Copies, facts: dict[str, Any]) -> dict[str, Any]:
    ids = store.ids(copies.rows)
    columns: dict[str, npt.NDArray[Any]] = {"kept_row": copies.kept, "similarity": copies.similarity}
    table = pa.table({"row": copies.rows, "id": pa.array(ids, pa.string()), **columns})
    data = table_bytes(table)
    place.at("excluded.parquet").write(data)
    place.at("ids.txt").write("".join(f"{name}\n" for name in ids).encode())
    place.at("indices.json").write(json.dumps(copies.rows.tolist()).encode())
    counts = {"num_rows": store.num_rows, "num_vectors": store.num_vectors, "num_excluded": len(ids)}
    counts["num_kept"] = store.num_vectors - len(ids)
    return publish(place, {"features": store.place.uri, **counts, "digest": digest_of(data.to_pybytes()), **facts})


def dedup(options: DedupOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Find the near copies of a feature store and publish them as a folder of kind "dedup"; return its manifest.

    excluded.parquet (row, id, kept_row, similarity) in row order; ids.txt and indices.json, the excluded images' ids and
    pool rows, as `select --exclude` takes them. Raises InputError for unusable input.
    """
    store = FeatureStore.of_vectors(options.features)
    if store.vectors_per_image > 1:
        raise InputError(f"{store.place.uri} has several vectors an image (patterns): dedup takes one")
    clusters = default_clusters(store.num_vectors) if options.clusters is None else options.clusters
    if clusters > store.num_vectors:
        raise InputError(f"option clusters is {clusters}: {store.place.uri} has {store.num_vectors} vectors")
    inputs, place = {"features": store.digest}, Place(options.out)
    claim = Claim.of(place, "dedup", inputs, result_options(options), options.overwrite, [options.features])
    published = claim.published()
    if published is not None:
        return published
    with open_shards(store, options, True, ()) as shards:
        claim.take()
        began = time.perf_counter()
        copies = _persist(
            shards, lambda: find_copies(shards, clusters, options.eps, options.iterations, options.seed, progress)
        )
    seconds = round(time.perf_counter() - began, 3)
    return _write(place, store, copies, {"num_clusters": clusters, "time": {"seconds_s": seconds}})
