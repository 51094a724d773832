"""Canonical distances: the same bits for any shape, thread count or company.

Float64, elementwise products summed over d by halving, no BLAS. What a fast float32 product cannot decide beyond its
own rounding error is settled by these, so picks don't depend on how the pool was cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from engine.arrays import Floats, Ints

CHUNK_ELEMENTS = 1 << 18


"""Elements of a temporary in the canonical arithmetic: small enough to stay in cache."""


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Run small driver-side products on one thread, so that they round alike wherever the driver runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_at(x: torch.Tensor, at: Ints) -> torch.Tensor:
    """Return some rows of x (n, d), (len(at), d); torch's indexing by an array takes four times as long."""
    return x.index_select(0, torch.from_numpy(at).to(x.device))


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
        diff = rows_at(a, i[part]).double().sub_(rows_at(b, j[part]).double())
        out[part] = _halve(diff.mul_(diff)).cpu().numpy()
    return out


def canonical_dot(a: torch.Tensor, i: Ints, b: torch.Tensor, j: Ints) -> Floats:
    """Return a[i] . b[j] for each pair (i[p], j[p]), in the canonical order; (p,) float64."""
    out = np.empty(len(i), dtype=np.float64)
    step = max(1, CHUNK_ELEMENTS // max(1, a.shape[1]))
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        product = rows_at(a, i[part]).double().mul_(rows_at(b, j[part]).double())
        out[part] = _halve(product).cpu().numpy()
    return out


def canonical_norms(x: torch.Tensor) -> Floats:
    """Return |x_i|, (r,) float64, from the canonical sum of squares."""
    out = np.empty(len(x), dtype=np.float64)
    step = max(1, CHUNK_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        values = x[start : start + step].double()
        out[start : start + step] = _halve(values.mul_(values)).cpu().numpy()
    return np.sqrt(out)


def normalize(x: torch.Tensor, norms: Floats | None = None) -> torch.Tensor:
    """Return rows of x (r, d) divided by their L2 norm (canonical, rounded to float32); zero rows stay zero.

    `norms` are the canonical norms, if they are known.
    """
    lengths = (canonical_norms(x) if norms is None else norms).astype(np.float32)
    lengths[lengths == 0] = 1.0
    return x / torch.from_numpy(lengths).to(x.device)[:, None]


def pairwise_sqdist(a: torch.Tensor) -> tuple[Floats, float]:
    """Return approximate squared distances among the rows of a (m, d), and a bound on their error.

    A float64 product, for a driver's few candidates; whoever needs a value that lives on takes the canonical one.
    """
    wide = a.double()
    squares = (wide * wide).sum(dim=1)
    product = torch.addmm(squares[None, :], wide, wide.T, alpha=-2).add_(squares[:, None])
    bound = 8 * (a.shape[1] + 4) * 2.0**-53 * float(squares.max()) + 1e-300 if len(a) else 0.0
    return product.clamp_(min=0).cpu().numpy(), bound
