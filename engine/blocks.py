"""The mathematics on one block of vectors.

Fast float32 products only decide what they can decide beyond their own rounding error. Whatever is closer than
that, and every distance that is kept, is settled by the *canonical* squared distance: float64, elementwise
products summed over d by halving, no BLAS. It is the same number on any thread count, for any shape, so picks
don't depend on how the pool was cut. Ties go to the smaller index (centres) or the smaller row (rows).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

UNIT_ROUNDOFF = 2.0**-24
CHUNK_ELEMENTS = 1 << 18
"""Elements of a temporary in the canonical arithmetic: small enough to stay in cache."""
TILE_ELEMENTS = 1 << 21
"""Entries of a tile of the rows x centres product: the only part of that matrix that ever exists."""


@dataclass
class Block:
    """A fixed range of pool rows, the unit of work and of rounding.

    `x` (r, d) float32; `rows` (r,) the pool row of each vector, ascending; `columns` the per-row columns that the
    method declared; `eligible` (r,) False for rows that may not be picked; `state` what a method keeps between
    rounds, lost when a shard is restarted.
    """

    index: int
    x: torch.Tensor
    rows: Ints
    eligible: Bools
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def norms(self) -> Floats:
        """The canonical L2 norm of each vector, (r,) float64."""
        return canonical_norms(self.x)


def _mix(z: Keys) -> Keys:
    """One round of the splitmix64 finaliser (Steele, Lea, Flood 2014), elementwise on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_keys(seed: int, step: tuple[int, ...], items: Ints) -> Keys:
    """Return one uint64 for each item (a row or a slot): a pure function of (seed, step, item)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.zeros(1, dtype=np.uint64)
        for word in (seed, *step):
            state = _mix(state + golden + np.uint64(word & 0xFFFFFFFFFFFFFFFF))
        return _mix(_mix(state + golden * (items.astype(np.uint64) + np.uint64(1))))


def random_uniform(seed: int, step: tuple[int, ...], items: Ints) -> Floats:
    """Return u(seed, step, item) in [0, 1) for each item, float64 with 53 random bits."""
    return (random_keys(seed, step, items) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _halve(values: torch.Tensor) -> torch.Tensor:
    """Sum a float64 (m, d) over d by adding halves, in place: an order fixed by d alone. Returns (m,)."""
    width = values.shape[1]
    while width > 1:
        half = width // 2
        values[:, :half] += values[:, half : 2 * half]
        if width % 2:
            values[:, 0] += values[:, width - 1]
        width = half
    return values[:, 0] if values.shape[1] else values.new_zeros(len(values))


def canonical_sqdist(a: torch.Tensor, i: Ints, b: torch.Tensor, j: Ints) -> Floats:
    """Return |a[i] - b[j]|^2 for each pair (i[p], j[p]); a (n, d), b (m, d) float32; result (p,) float64."""
    out = np.empty(len(i), dtype=np.float64)
    step = max(1, CHUNK_ELEMENTS // max(1, a.shape[1]))
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        diff = a[torch.from_numpy(i[part])].double().sub_(b[torch.from_numpy(j[part])].double())
        out[part] = _halve(diff.mul_(diff)).cpu().numpy()
    return out


def canonical_norms(x: torch.Tensor) -> Floats:
    """Return |x_i|, (r,) float64, from the canonical sum of squares."""
    rows = np.arange(len(x), dtype=np.int64)
    return np.sqrt(canonical_sqdist(x, rows, x.new_zeros((1, x.shape[1])), np.zeros_like(rows)))


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Return rows of x (r, d) divided by their L2 norm (canonical, rounded to float32); zero rows stay zero."""
    norms = canonical_norms(x)
    norms[norms == 0] = 1.0
    return x / torch.from_numpy(norms.astype(np.float32)).to(x.device)[:, None]


def product_error(d: int, norm_a: Floats | float, norm_b: float) -> Any:
    """Bound the error of 0.5|b|^2 - a.b when the product runs in float32 in any order of summation.

    The textbook bound for a length-d dot product, gamma_d |a||b| (Higham, Accuracy and Stability, 3.1), with four
    more roundings for the norm and the final difference, and a tenth on top.
    """
    return 1.1 * (d + 4) * UNIT_ROUNDOFF * (norm_a * norm_b + 0.5 * norm_b * norm_b) + 1e-37


def _settle(x: torch.Tensor, centres: torch.Tensor, contested: Ints, near: torch.Tensor) -> Ints:
    """Return the canonical nearest centre of each contested row among those marked in `near` (c, k)."""
    pairs = near.nonzero().cpu().numpy()
    distance = canonical_sqdist(x, contested[pairs[:, 0]], centres, pairs[:, 1])
    starts = np.searchsorted(pairs[:, 0], np.arange(len(contested)))
    least = np.minimum.reduceat(distance, starts)
    winners = np.flatnonzero(distance == least[pairs[:, 0]])
    _, first = np.unique(pairs[winners, 0], return_index=True)
    return np.asarray(pairs[winners[first], 1], dtype=np.int64)


def _distinct(centres: torch.Tensor) -> Ints:
    """Return the indices of the first occurrence of each distinct centre, ascending."""
    seen: dict[bytes, int] = {}
    for index, row in enumerate(centres.cpu().numpy()):
        seen.setdefault(row.tobytes(), index)
    return np.fromiter(seen.values(), dtype=np.int64, count=len(seen))


def nearest(x: torch.Tensor, centres: torch.Tensor, norms: Floats | None = None) -> Ints:
    """Return the index of the nearest centre of each row, (r,) int64; equal distances go to the smaller index.

    x (r, d), centres (k, d) float32, k >= 1; `norms` are x's canonical norms if they are known. One matrix
    product; entries within its error bound of the best are settled by canonical distances, so the answer is the
    canonical one. No (r, k) matrix is kept, only tiles.
    """
    kept = _distinct(centres)
    c = centres[torch.from_numpy(kept)] if len(kept) < len(centres) else centres
    norm_c = canonical_norms(c)
    half = torch.from_numpy((0.5 * norm_c * norm_c).astype(np.float32)).to(x.device)
    error = product_error(x.shape[1], canonical_norms(x) if norms is None else norms, float(norm_c.max(initial=0.0)))
    margin = torch.from_numpy(2.0 * error).to(torch.float32).mul_(1.0001).to(x.device)
    out = np.empty(len(x), dtype=np.int64)
    step = min(len(x), max(64, TILE_ELEMENTS // len(c))) or 1
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        score = torch.addmm(half, x[part], c.T, alpha=-1)
        best, index = score.min(dim=1)
        near = score <= (best + margin[part])[:, None]
        found = index.cpu().numpy()
        contested = np.flatnonzero((near.sum(dim=1) > 1).cpu().numpy())
        if len(contested):
            found[contested] = _settle(x[part], c, contested, near[torch.from_numpy(contested)])
        out[part] = found
    return kept[out]


def nearest_sqdist(x: torch.Tensor, centres: torch.Tensor, norms: Floats | None = None) -> tuple[Ints, Floats]:
    """Return `nearest` and the canonical squared distance to it, (r,) float64."""
    index = nearest(x, centres, norms)
    return index, canonical_sqdist(x, np.arange(len(x), dtype=np.int64), centres, index)


def pairwise_sqdist(a: torch.Tensor) -> tuple[Floats, float]:
    """Return approximate squared distances among the rows of a (m, d), and a bound on their error.

    A float64 product, for a driver's few candidates; whoever needs a value that lives on takes the canonical one.
    """
    wide = a.double()
    squares = (wide * wide).sum(dim=1)
    product = torch.addmm(squares[None, :], wide, wide.T, alpha=-2).add_(squares[:, None])
    bound = 8 * (a.shape[1] + 4) * 2.0**-53 * float(squares.max()) + 1e-300 if len(a) else 0.0
    return product.clamp_(min=0).cpu().numpy(), bound


Ranked = tuple[npt.NDArray[Any], Ints]


def smallest(keys: npt.NDArray[Any], rows: Ints, m: int) -> Ranked:
    """Return the m smallest (key, row) pairs in order: keys (m,), rows (m,). Ties go to the smaller row."""
    if len(keys) > 4 * m and m:
        reach = np.partition(keys, m - 1)[m - 1]
        near = np.flatnonzero(keys <= reach)
        keys, rows = keys[near], rows[near]
    order = np.lexsort((rows, keys))[:m]
    return keys[order], rows[order]


def merge_smallest(m: int, a: Ranked, b: Ranked) -> Ranked:
    """Combine two results of `smallest` into the m smallest of both."""
    return smallest(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]), m)


def fixed_point_scale(count: int, largest: float) -> float:
    """Return the power of two by which values up to `largest` are scaled so that `count` of them sum in int64.

    count * largest * scale < 2^62. Returns 1 where everything is zero.
    """
    if largest <= 0 or count <= 0:
        return 1.0
    return float(2.0 ** np.floor(62 - np.log2(count) - np.log2(largest) - 1e-9))


def fixed_point_sums(x: torch.Tensor, rows: Ints, group: Ints, groups: int, scale: float) -> npt.NDArray[np.int64]:
    """Return the int64 sums of round(x[rows] * scale) over the rows of each group, (groups, d).

    Integer addition is associative: the sums are exact whatever the order, the blocks or the shards.
    """
    out = torch.zeros((groups, x.shape[1]), dtype=torch.int64)
    step = max(1, CHUNK_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = x[torch.from_numpy(rows[part])].double().mul_(scale).round_().to(torch.int64).cpu()
        out.index_add_(0, torch.from_numpy(group[part]), values)
    return out.numpy()
