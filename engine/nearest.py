"""Nearest centres and most similar rows: fast float32 products, settled by canonical values where they are too close.

Ties go to the smaller index (centres) or the smaller row (rows).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.canonical import canonical_dot, canonical_norms, canonical_sqdist, rows_at
from engine.products import score_error, scores

TILE_ELEMENTS = 1 << 21


"""Entries of a tile of the rows x centres product: the only part of that matrix that ever exists."""


SLACK = 1 + 1e-9
"""Widens every bound by far more than float64 rounds."""


SPARE = 8
"""Entries looked at beyond the m largest, for those that are too close to the m-th."""


Canonical = Callable[[torch.Tensor, Ints, torch.Tensor, Ints], Floats]


"""What is minimised, for pairs of rows: canonical_sqdist, or its like."""


def settle(x: torch.Tensor, c: torch.Tensor, row: Ints, column: Ints, canonical: Canonical) -> Ints:
    """Return the canonical best column of each row among candidate pairs (ascending by row), a column for each row there.

    Equal ones go to the smaller column.
    """
    value = canonical(x, row, c, column)
    order = np.lexsort((column, value, row))
    _, first = np.unique(row[order], return_index=True)
    return column[order[first]]


@dataclass(frozen=True)
class Centres:
    """Distinct centres ready for products, as columns of a tile.

    `kept` (m,) says which of all k centres a column is, `column` (k,) each centre's column, of equal ones the first's;
    `half` (m,) holds half the squared norms, `largest` is the largest norm.
    """

    c: torch.Tensor
    kept: Ints
    column: Ints
    half: torch.Tensor
    largest: float

    @classmethod
    def of(cls, centres: torch.Tensor) -> Centres:
        """Make centres (k, d) float32 ready."""
        norms = canonical_norms(centres)
        first = _first_of_equals(centres, norms)
        kept, column = np.unique(first, return_inverse=True)
        half = torch.from_numpy((0.5 * norms[kept] ** 2).astype(np.float32)).to(centres.device)
        c = centres if len(kept) == len(centres) else rows_at(centres, kept)
        return cls(c, kept, column, half, float(norms.max(initial=0.0)))

    def to(self, device: torch.device) -> Centres:
        """Return the same on a device."""
        return replace(self, c=self.c.to(device), half=self.half.to(device))

    def some(self, columns: Ints) -> Centres:
        """Return some of the columns (m,), ascending, as centres of their own; `column` is then of no use."""
        half = self.half[torch.from_numpy(columns)]
        return replace(self, c=rows_at(self.c, columns), kept=self.kept[columns], half=half)


def _first_of_equals(centres: torch.Tensor, norms: Floats) -> Ints:
    """Return for each centre (k, d) the index of the first one equal to it; equal ones have equal norms (k,)."""
    first = np.arange(len(norms), dtype=np.int64)
    _, back, counts = np.unique(norms, return_inverse=True, return_counts=True)
    seen: dict[bytes, int] = {}
    for index in np.flatnonzero(counts[back] > 1).tolist():
        first[index] = seen.setdefault(centres[index].cpu().numpy().tobytes(), index)
    return first


@dataclass(frozen=True)
class Found:
    """What a search gives for each row: its best column, that one's score, the least score of the other columns.

    (r,) int64, float32, float32; scores are off by the product's error.
    """

    column: Ints
    best: torch.Tensor
    second: torch.Tensor


def _first_and_second(score: torch.Tensor) -> tuple[Ints, torch.Tensor, torch.Tensor]:
    """Return each row's column of least score, that score, and the least of the others, each (r,).

    `score` (r, k) is left with infinity in that column.
    """
    # torch's own argmin takes ten times as long on a CPU
    at = score.argmin(dim=1) if score.is_cuda else torch.from_numpy(score.numpy().argmin(axis=1))
    best = score.gather(1, at[:, None])
    score.scatter_(1, at[:, None], torch.inf)
    return at.cpu().numpy(), best[:, 0], score.amin(dim=1)


def search(
    x: torch.Tensor,
    centres: Centres,
    offset: torch.Tensor,
    margin: torch.Tensor,
    canonical: Canonical,
    limit: torch.Tensor | None = None,
) -> Found:
    """Find for each row the column that minimises offset - x . c, settled by `canonical` within `margin` of the best.

    One matrix product; no (r, k) matrix is kept, only tiles. Rows whose best score is above `limit` (r,) aren't settled.
    """
    m = len(centres.c)
    column, best, second = np.empty(len(x), dtype=np.int64), x.new_empty(len(x)), x.new_empty(len(x))
    step = min(len(x), max(64, TILE_ELEMENTS // m)) or 1
    tile = x.new_empty((step, m))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        score = scores(offset, x[part], centres.c, out=tile[: len(x) - start])
        found, least, following = _first_and_second(score)
        close = following <= least + margin[part]
        contested = (close if limit is None else close & (least <= limit[part])).nonzero()[:, 0]
        if len(contested):
            at = torch.from_numpy(found).to(x.device)[contested]
            again = score[contested].scatter_(1, at[:, None], least[contested, None])
            pairs = (again <= (least[contested] + margin[part][contested])[:, None]).nonzero().cpu().numpy()
            rows = contested.cpu().numpy()
            found[rows] = settle(x[part], centres.c, rows[pairs[:, 0]], pairs[:, 1], canonical)
            at = torch.from_numpy(found).to(x.device)[contested, None]
            least[contested] = again.gather(1, at)[:, 0]
            following[contested] = again.scatter_(1, at, torch.inf).amin(dim=1)
        column[part], best[part], second[part] = found, least, following
    return Found(column, best, second)


def nearest(x: torch.Tensor, centres: torch.Tensor, norms: Floats | None = None) -> Ints:
    """Return the index of the nearest centre of each row, (r,) int64; equal distances go to the smaller index.

    x (r, d), centres (k, d) float32, k >= 1; `norms` are x's canonical norms if they are known. The answer is the one
    that canonical distances give.
    """
    ready = Centres.of(centres).to(x.device)
    error = score_error(x.shape[1], canonical_norms(x) if norms is None else norms, ready.largest)
    return ready.kept[search(x, ready, ready.half, margin_of(error, x), canonical_sqdist).column]


def sqdist_bound(score: torch.Tensor, error: Floats, norms: Floats) -> Floats:
    """Return the squared distance that a score 0.5|c|^2 - x . c stands for, with what `error` may add; less, if negative.

    All (r,), float64: a bound on the squared distance, by a little more than float64 rounds.
    """
    square = norms * norms
    bound = 2 * (score.double().cpu().numpy() + error) + square + np.sign(error) * 1e-12 * square
    return np.asarray(np.maximum(0.0, bound))


def distance_bound(score: torch.Tensor, error: Floats, norms: Floats) -> Floats:
    """Return the root of `sqdist_bound`."""
    return np.sqrt(sqdist_bound(score, error, norms))


@dataclass(frozen=True)
class Nearer:
    """The rows (m,) of a block to which some centre is nearer than before: that centre, and the canonical squared distance.

    For all rows, lower bounds on the distance to the nearest of these centres and to the others, (r,).
    """

    rows: Ints
    index: Ints
    sqdist: Floats
    least: Floats
    others: Floats


def _within(x: torch.Tensor, ready: Centres, norms: Floats, error: Floats, before: Floats) -> tuple[Ints, Found]:
    """Return the rows that may have a centre at less than the squared distance `before` (r,), and what the search found."""
    square = norms * norms
    limit = np.nextafter((0.5 * (before - square) + 1.001 * error + 1e-12 * square).astype(np.float32), np.float32(np.inf))
    reach = torch.from_numpy(limit).to(x.device)
    found = search(x, ready, ready.half, margin_of(error, x), canonical_sqdist, reach)
    return (found.best <= reach).nonzero()[:, 0].cpu().numpy(), found


def nearer_bounds(x: torch.Tensor, centres: Centres, norms: Floats, before: Floats) -> tuple[Ints, Ints, Floats, Floats]:
    """Return the rows of x (r, d) that may have a centre at less than the squared distance `before` (r,).

    And for each of them (m,) its nearest centre, as a row of `centres.c`, and a lower and an upper bound on the squared
    distance to it. `norms` (r,) are the canonical norms.
    """
    ready = centres.to(x.device)
    error = score_error(x.shape[1], norms, ready.largest)
    rows, found = _within(x, ready, norms, error, before)
    score = found.best[torch.from_numpy(rows)]
    lower, upper = (sqdist_bound(score, sign * error[rows], norms[rows]) for sign in (-1, 1))
    return rows, found.column[rows], lower, upper


def nearer(x: torch.Tensor, centres: Centres, norms: Floats, before: Floats) -> Nearer:
    """Return which rows x (r, d) have a centre at less than the squared distance `before` (r,), and their nearest one.

    Canonical values are taken only where the product does not rule that out. `norms` (r,) are the canonical norms.
    """
    ready = centres.to(x.device)
    error = score_error(x.shape[1], norms, ready.largest)
    rows, found = _within(x, ready, norms, error, before)
    column = found.column[rows]
    sqdist = canonical_sqdist(x, rows, ready.c, column)
    closer = sqdist < before[rows]
    bounds = (distance_bound(score, -error, norms) for score in (found.best, found.second))
    return Nearer(rows[closer], ready.kept[column[closer]], sqdist[closer], *bounds)


def margin_of(error: Floats, x: torch.Tensor) -> torch.Tensor:
    """Return twice a bound on the error of a score, as float32 rounded up, beside x."""
    return torch.from_numpy(2.0002 * error).to(torch.float32).to(x.device)


def negative_dot(a: torch.Tensor, i: Ints, b: torch.Tensor, j: Ints) -> Floats:
    """Return -a[i] . b[j] for each pair, canonical: what is minimised where the largest product is wanted."""
    return -canonical_dot(a, i, b, j)


def most_similar_index(x: torch.Tensor, centres: torch.Tensor, norms: Floats) -> Ints:
    """Return the index of the centre of largest canonical dot product with each row, (r,); of equal ones the smallest."""
    ready = Centres.of(centres).to(x.device)
    error = score_error(x.shape[1], norms, ready.largest)
    return ready.kept[search(x, ready, torch.zeros_like(ready.half), margin_of(error, x), negative_dot).column]


def most_similar(x: torch.Tensor, centres: torch.Tensor, norms: Floats) -> tuple[Ints, Floats]:
    """Return `most_similar_index` and the canonical products with those, (r,) float64.

    As `nearest`, for vectors that need not have one length; `norms` (r,) are x's canonical norms.
    """
    index = most_similar_index(x, centres, norms)
    return index, canonical_dot(x, np.arange(len(x), dtype=np.int64), centres.to(x.device), index)


Lists = tuple[Floats, Ints]


"""For each of k vectors the m best rows in order: products (k, m), -inf beyond the last; rows (k, m), -1 there."""


def _candidates(score: torch.Tensor, m: int, margin: torch.Tensor) -> Ints:
    """Return the entries (row, column) within `margin` (q,) of the m-th largest of their row, (p, 2), ascending by row."""
    width = min(m + SPARE, score.shape[1])
    top = score.topk(width, dim=1)
    floor = (top.values[:, m - 1] - margin)[:, None]
    inside = top.values >= floor
    more = inside.all(dim=1) if width < score.shape[1] else inside.new_zeros(len(score))
    row, place = (inside & ~more[:, None]).nonzero().T
    found = torch.stack([row, top.indices[row, place]], dim=1)
    if more.any():  # so many are close that the list may have missed some
        rows = more.nonzero()[:, 0]
        wide = (score[rows] >= floor[rows]).nonzero()
        found = torch.cat([found, torch.stack([rows[wide[:, 0]], wide[:, 1]], dim=1)])
    pairs = found.cpu().numpy()
    return np.asarray(pairs[np.argsort(pairs[:, 0], kind="stable")])


def top_similar(x: torch.Tensor, rows: Ints, centres: torch.Tensor, m: int, norms: Floats) -> Lists:
    """Return for each centre the m rows of largest canonical dot product, in order; equal ones go to the smaller row.

    x (r, d) with pool rows `rows` (r,) and canonical norms (r,); centres (k, d).
    """
    k = len(centres)
    values, found = np.full((k, m), -np.inf), np.full((k, m), -1, dtype=np.int64)
    if len(x) == 0:
        return values, found
    largest = float(norms.max())
    step = max(1, TILE_ELEMENTS // len(x))
    for start in range(0, k, step):
        part = centres[start : start + step].to(x.device)
        error = score_error(x.shape[1], canonical_norms(part), largest)
        score = scores(x.new_zeros(len(x)), part, x).neg_()
        pairs = _candidates(score, min(m, len(x)), margin_of(error, part))
        exact = canonical_dot(part, pairs[:, 0], x, pairs[:, 1])
        order = np.lexsort((rows[pairs[:, 1]], -exact, pairs[:, 0]))
        owner = pairs[order, 0]
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        kept = rank < m
        values[start + owner[kept], rank[kept]] = exact[order][kept]
        found[start + owner[kept], rank[kept]] = rows[pairs[order, 1]][kept]
    return values, found


def merge_lists(a: Lists, b: Lists) -> Lists:
    """Combine two results of `top_similar` for the same vectors."""
    m = a[0].shape[1]
    values, rows = np.concatenate([a[0], b[0]], axis=1), np.concatenate([a[1], b[1]], axis=1)
    order = np.lexsort((rows, -values), axis=1)[:, :m]
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(rows, order, axis=1)


def nearest_sqdist(x: torch.Tensor, centres: torch.Tensor, norms: Floats | None = None) -> tuple[Ints, Floats]:
    """Return `nearest` and the canonical squared distance to it, (r,) float64."""
    index = nearest(x, centres, norms)
    return index, canonical_sqdist(x, np.arange(len(x), dtype=np.int64), centres.to(x.device), index)
