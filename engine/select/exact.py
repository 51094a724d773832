"""Products of vectors that are exact, and so the same bits for any shape, order of summation or number of threads.

A float64 product rounds nothing when its factors are whole numbers and every partial sum stays below 2^53. So vectors
are rounded to multiples of a power of two, coarse enough for that and finer than float32 sees whole vectors. What is
exact are the products of the rounded vectors.
"""

from __future__ import annotations

import math

import torch

from engine.blocks import Block

BITS = 25.5
"""A rounded vector is at most 2^BITS steps long: products stay within 2^51 steps^2, squared distances within 2^53."""


def norm_of_longest(block: Block) -> float:
    """Return the largest canonical L2 norm in a block: `largest` of `exact_step` is the maximum over all blocks."""
    return float(block.norms.max(initial=0.0))


def exact_step(largest: float, d: int) -> float:
    """Return the power of two to whose multiples vectors of d floats and norms up to `largest` are rounded.

    At most largest * 2^-24.5, a little more above a million dimensions.
    """
    if largest <= 0:
        return 1.0
    return 2.0 ** math.ceil(math.log2(largest / (2.0**BITS - math.sqrt(d))) + 1e-9)


def quantize(x: torch.Tensor, step: float) -> torch.Tensor:
    """Return x (n, d) rounded to multiples of `step`, float64: each entry is off by at most step / 2."""
    return (x.to(torch.float64) / step).round_().mul_(step)


def exact_products(a: torch.Tensor, b: torch.Tensor, step: float) -> torch.Tensor:
    """Return the dot products (n, m) float64 of the rows of a (n, d) and b (m, d), both rounded to multiples of `step`.

    Exact: each is a whole number of step^2, and any partial sum of it too, below 2^53 by Cauchy and Schwarz. They differ
    from those of the vectors themselves by at most sqrt(d) * step * largest + d * step^2 / 4; as a rule by about half of
    step * largest, which is at most 2^-25.5 * largest^2.
    """
    return quantize(a, step) @ quantize(b, step).T


def exact_sqdist(a: torch.Tensor, b: torch.Tensor, step: float) -> torch.Tensor:
    """Return |a_i - b_j|^2 (n, m) float64 for the rows of a and b rounded to multiples of `step`, exactly."""
    a, b = quantize(a, step), quantize(b, step)
    squares = (b * b).sum(dim=1)
    return torch.addmm(squares, a, b.T, alpha=-2).add_((a * a).sum(dim=1)[:, None])
