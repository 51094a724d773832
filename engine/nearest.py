"""Nearest centres and most similar rows: fast float32 products, settled by canonical values where they are too close.

Ties go to the smaller index (centres) or the smaller row (rows).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.canonical import canonical_dot, canonical_norms, canonical_sqdist, product_error

TILE_ELEMENTS = 1 << 21


"""Entries of a tile of the rows x centres product: the only part of that matrix that ever exists."""


Canonical = Callable[[torch.Tensor, Ints, torch.Tensor, Ints], Floats]


"""What is minimised, for pairs of rows: canonical_sqdist, or its like."""


def _settle(x: torch.Tensor, centres: torch.Tensor, row: Ints, centre: Ints, canonical: Canonical) -> tuple[Ints, Ints]:
    """Return the rows among the candidate pairs (ascending by row, then centre), and the canonical best centre of each."""
    value = canonical(x, row, centres, centre)
    contested, starts = np.unique(row, return_index=True)
    least = np.repeat(np.minimum.reduceat(value, starts), np.diff(np.append(starts, len(row))))
    winners = np.flatnonzero(value == least)
    _, first = np.unique(row[winners], return_index=True)
    return contested, centre[winners[first]]


def _distinct(centres: torch.Tensor) -> Ints:
    """Return the indices of the first occurrence of each distinct centre, ascending."""
    seen: dict[bytes, int] = {}
    for index, row in enumerate(centres.cpu().numpy()):
        seen.setdefault(row.tobytes(), index)
    return np.fromiter(seen.values(), dtype=np.int64, count=len(seen))


@dataclass(frozen=True)
class _Found:
    """What a search gives: the best centre of each row, and, if asked for, a lower bound on every other's score."""

    index: Ints
    others: Floats


def _search(
    x: torch.Tensor,
    c: torch.Tensor,
    offset: torch.Tensor,
    margin: torch.Tensor,
    canonical: Canonical,
    want_others: bool = False,
) -> _Found:
    """Find for each row the index that minimises offset - x . c, settled by `canonical` within `margin` of the best.

    One matrix product; no (r, k) matrix is kept, only tiles.
    """
    out, others = np.empty(len(x), dtype=np.int64), np.full(len(x) if want_others else 0, np.inf)
    step = min(len(x), max(64, TILE_ELEMENTS // len(c))) or 1
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        score = torch.addmm(offset, x[part], c.T, alpha=-1)
        floor = score.amin(dim=1) + margin[part]
        row, centre = (score <= floor[:, None]).nonzero().cpu().numpy().T
        count = np.bincount(row, minlength=len(score))
        found = centre[np.cumsum(count) - count]
        if len(row) > len(score):
            open_pairs = count[row] > 1
            contested, settled = _settle(x[part], c, row[open_pairs], centre[open_pairs], canonical)
            found[contested] = settled
        out[part] = found
        if want_others and len(c) > 1:
            score.scatter_(1, torch.from_numpy(found).to(x.device)[:, None], torch.inf)
            others[part] = (score.amin(dim=1).double() - margin[part].double()).cpu().numpy()
    return _Found(out, others)


@dataclass(frozen=True)
class _Centres:
    """Distinct centres ready for a product: where each stands among all, half their squared norms, the largest norm."""

    kept: Ints
    c: torch.Tensor
    half: torch.Tensor
    largest: float


def _ready(centres: torch.Tensor, device: torch.device) -> _Centres:
    kept = _distinct(centres)
    c = (centres[torch.from_numpy(kept)] if len(kept) < len(centres) else centres).to(device)
    norms = canonical_norms(c)
    half = torch.from_numpy((0.5 * norms * norms).astype(np.float32)).to(device)
    return _Centres(kept, c, half, float(norms.max(initial=0.0)))


def nearest(x: torch.Tensor, centres: torch.Tensor, norms: Floats | None = None) -> Ints:
    """Return the index of the nearest centre of each row, (r,) int64; equal distances go to the smaller index.

    x (r, d), centres (k, d) float32, k >= 1; `norms` are x's canonical norms if they are known. The answer is the one
    that canonical distances give.
    """
    ready = _ready(centres, x.device)
    error = product_error(x.shape[1], canonical_norms(x) if norms is None else norms, ready.largest)
    return ready.kept[_search(x, ready.c, ready.half, _margin(error, x), canonical_sqdist).index]


def nearest_and_bound(x: torch.Tensor, centres: torch.Tensor, norms: Floats) -> tuple[Ints, Floats]:
    """Return `nearest` and a lower bound on each row's distance to every centre but that one, (r,) float64.

    The bound is 0 for all rows where two centres are equal: then the other one may be as near.
    """
    ready = _ready(centres, x.device)
    margin = _margin(product_error(x.shape[1], norms, ready.largest), x)
    found = _search(x, ready.c, ready.half, margin, canonical_sqdist, want_others=True)
    if len(ready.kept) < len(centres):
        return ready.kept[found.index], np.zeros(len(x))
    return found.index, _distance_below(found.others, norms)


def _distance_below(score: Floats, norms: Floats) -> Floats:
    """Return a distance that a lower bound on 0.5|c|^2 - x . c stands for, a little below it."""
    return np.sqrt(np.maximum(0.0, (2 * score + norms * norms) * (1 - 1e-12) - 1e-15 * norms * norms))


def distance_to_others(x: torch.Tensor, centres: torch.Tensor, norms: Floats, own: Ints) -> Floats:
    """Return a lower bound on each row's distance to the nearest of some centres, (r,) float64, its own left out.

    `own` (r,) is the index of a row's own centre among these, -1 where it is not one of them.
    """
    c = centres.to(x.device)
    norm_c = canonical_norms(c)
    half = torch.from_numpy((0.5 * norm_c * norm_c).astype(np.float32)).to(x.device)
    error = product_error(x.shape[1], norms, float(norm_c.max(initial=0.0)))
    out = np.empty(len(x))
    step = min(len(x), max(64, TILE_ELEMENTS // len(c))) or 1
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        score = torch.addmm(half, x[part], c.T, alpha=-1)
        mine = np.flatnonzero(own[part] >= 0)
        score[torch.from_numpy(mine), torch.from_numpy(own[part][mine])] = torch.inf
        out[part] = score.amin(dim=1).double().cpu().numpy()
    return _distance_below(out - error, norms)


def _margin(error: Floats, x: torch.Tensor) -> torch.Tensor:
    """Return twice a bound on the error of a score, as float32 rounded up, beside x."""
    return torch.from_numpy(2.0002 * error).to(torch.float32).to(x.device)


def _negative_dot(a: torch.Tensor, i: Ints, b: torch.Tensor, j: Ints) -> Floats:
    return -canonical_dot(a, i, b, j)


def most_similar(x: torch.Tensor, centres: torch.Tensor, norms: Floats | None = None) -> tuple[Ints, Floats]:
    """Return the index of the centre of largest dot product with each row, (r,), and that canonical product, (r,).

    Equal products go to the smaller index. As `nearest`, for vectors that need not have one length.
    """
    ready = _ready(centres, x.device)
    error = product_error(x.shape[1], canonical_norms(x) if norms is None else norms, ready.largest)
    found = _search(x, ready.c, torch.zeros_like(ready.half), _margin(error, x), _negative_dot)
    index = ready.kept[found.index]
    return index, canonical_dot(x, np.arange(len(x), dtype=np.int64), centres.to(x.device), index)


Lists = tuple[Floats, Ints]


"""For each of k vectors the m best rows in order: products (k, m), -inf beyond the last; rows (k, m), -1 there."""


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
        part = centres[start : start + step]
        error = product_error(x.shape[1], canonical_norms(part), largest)
        score = part @ x.T
        floor = score.topk(min(m, len(x)), dim=1).values[:, -1] - _margin(error, x)
        pairs = (score >= floor[:, None]).nonzero().cpu().numpy()
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
    return index, canonical_sqdist(x, np.arange(len(x), dtype=np.int64), centres, index)
