"""Near copies by their vectors (SemDeDup, Abbas et al. 2023).

The pool is clustered, and within a cluster one image of every group of near copies is kept. Copies on two sides of a
border between clusters are not found: the method's own approximation; with one cluster it is exact. Fast products decide
similarities beyond their rounding error, canonical ones the rest, so the list is the same on any number of shards.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from engine.arrays import Bools, Floats, Ints
from engine.blocks import Block
from engine.canonical import canonical_dot, canonical_norms, rows_at, single_thread
from engine.copies import NOTHING, Copies
from engine.nearest import TILE_ELEMENTS
from engine.products import score_error, scores
from engine.schema import Progress, no_progress
from engine.select.clusters import fit_centres, members, packs, settle
from engine.select.lloyd import Matrix
from engine.shards import Shards, prepare

SEED_KEY = 2021
HEAD_ROWS = 2048
"""Rows among which the driver looks for copies at once."""
MEMBER_ROWS = 65536
"""Rows compared with the kept ones at once, on the shards."""
EXACT_ROWS = 8192
"""Pools up to this size are one cluster by default."""
NORM_ERROR = 1e-6
"""More than the norm of a normalised float32 vector differs from 1."""


def join(parts: list[Copies]) -> Copies:
    """Return several results as one, in row order."""
    rows = np.concatenate([NOTHING, *(part.rows for part in parts)])
    order = np.argsort(rows)
    kept = np.concatenate([NOTHING, *(part.kept for part in parts)])
    similarity = np.concatenate([np.empty(0), *(part.similarity for part in parts if part.similarity is not None)])
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


def leaders(x: torch.Tensor, group: Ints, eps: float, always: Bools | None = None) -> Ints:
    """Return for each vector, in order, the first kept vector of its group that it is a copy of; -1 where it is kept.

    A vector is kept unless a kept one before it is within eps. So copies of copies don't merge: of A ~ B ~ C, with A and
    C not alike, B goes and A and C stay. Those that `always` (m,) names are kept. `group` (m,) is sorted.
    """
    leader = np.full(len(x), -1, dtype=np.int64)
    for first, last in zip(*_runs(group), strict=True):
        mine = x[first:last]
        close = np.triu(np.concatenate([similar(part, mine, eps) for part in pieces(mine, len(mine))]), 1)
        if always is not None:
            close[:, always[first:last]] = False
        for place in np.flatnonzero(close.any(axis=1)):
            if leader[first + place] < 0:
                copies = first + np.flatnonzero(close[place])
                leader[copies[leader[copies] < 0]] = first + place
    return leader


def pieces(x: torch.Tensor, width: int) -> list[torch.Tensor]:
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
    for piece in pieces(x, len(kept)):
        close = similar(piece, leading, eps)
        copy.append(close.any(axis=1))
        leader.append(close[copy[-1]].argmax(axis=1))
    places, first = np.flatnonzero(np.concatenate(copy)), np.concatenate(leader)
    return block.rows[places], first, cosine(x, places, leading, first)


def copies_among(shards: Shards, clusters: Ints, eps: float) -> Iterator[Copies]:
    """Yield the near copies within each of some clusters, piece by piece; `settle` comes first.

    Rows come in order of their distance to the cluster's centre, the farthest first (of equally far ones the smaller
    row): the released code's default, which keeps what is least like the rest. Those that are not eligible come before
    all others, and are kept. The driver compares HEAD_ROWS of them with one another; what it keeps is then compared, on
    the shards, with the rows after these.
    """
    found = members(shards, clusters)
    order = np.lexsort((found.rows, -found.sqdist, found.eligible, found.cluster))
    numbers, rows, group = found.numbers[order], found.rows[order], found.cluster[order]
    always = ~found.eligible[order]
    while len(rows):
        x = shards.take(rows[:HEAD_ROWS])
        with single_thread():
            leader = leaders(x, group[:HEAD_ROWS], eps, always[:HEAD_ROWS])
        copy = np.flatnonzero(leader >= 0)
        yield Copies(rows[copy], rows[leader[copy]], cosine(x, copy, x, leader[copy]))
        kept = np.flatnonzero(leader < 0)
        kept_rows, vectors = rows[kept], x[torch.from_numpy(kept)].numpy()
        numbers, rows, group, always = numbers[HEAD_ROWS:], rows[HEAD_ROWS:], group[HEAD_ROWS:], always[HEAD_ROWS:]
        gone, waiting = [NOTHING], np.sort(numbers[~always])
        for at in np.split(waiting, range(MEMBER_ROWS, len(waiting), MEMBER_ROWS)) if len(waiting) else ():
            for copies, first, similarity in shards.map(_follow, vectors, eps, at=at):
                gone.append(copies)
                yield Copies(copies, kept_rows[first], similarity)
        stays = ~np.isin(rows, np.concatenate(gone))
        numbers, rows, group, always = numbers[stays], rows[stays], group[stays], always[stays]


def find_copies(
    shards: Shards,
    clusters: int,
    eps: float,
    iterations: int,
    seed: int,
    progress: Progress = no_progress,
    labeled: Ints = NOTHING,
) -> Copies:
    """Return the near copies among all rows of shards with normalised vectors, in row order; `labeled` rows are kept."""
    prepare(shards, labeled)
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
