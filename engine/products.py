"""Fast products, in the precision asked for, and how far they can be off.

A product only decides what is settled already: whoever uses it takes canonical values for everything within its error.
So another precision changes the time a selection takes, never its picks.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Floats, Ints

ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8}
"""What rounding a factor to this format does to it, relatively; products are summed in float32 in any of them."""

PAIRS = 1 << 16
"""Listed products that a GPU takes at once."""

_asked = "float32"


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Run products in this process in the named precision, one of ROUNDOFF.

    tf32 is a format of CUDA devices; on a CPU it is float32 with the wider margins. bf16 on a CPU rounds the factors and
    is no faster.
    """
    global _asked
    before, tf32 = _asked, torch.backends.cuda.matmul.allow_tf32
    _asked, torch.backends.cuda.matmul.allow_tf32 = name, name == "tf32"
    try:
        yield
    finally:
        _asked, torch.backends.cuda.matmul.allow_tf32 = before, tf32


def scores(offset: torch.Tensor, x: torch.Tensor, c: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return offset - x . c, (r, k) float32, for rows x (r, d) and c (k, d) float32 and an offset (k,)."""
    if _asked != "bf16":
        product = torch.mm(x, c.T, out=out)  # addmm would first spread the offset over the tile, which takes longer
        return torch.sub(offset, product, out=product)
    a, b = x.to(torch.bfloat16), c.to(torch.bfloat16)
    product = torch.mm(a, b.T, out_dtype=torch.float32) if x.is_cuda else torch.mm(a.float(), b.float().T)
    return torch.sub(offset, product, out=out)


with warnings.catch_warnings():  # torch says once a process that these are in beta
    warnings.simplefilter("ignore")
    torch.zeros((1, 1)).to_sparse_csr()


def listed_products(x: torch.Tensor, c: torch.Tensor, starts: Ints, columns: Ints) -> npt.NDArray[np.float32]:
    """Return x_i . c_j, (p,) float32, for row i of x (r, d) and each j of columns[starts[i]:starts[i + 1]], rows of c."""
    at = torch.from_numpy(columns).to(x.device)
    if x.is_cuda:
        row = torch.from_numpy(np.repeat(np.arange(len(x)), np.diff(starts))).to(x.device)
        out = np.empty(len(columns), dtype=np.float32)
        for start in range(0, len(columns), PAIRS):
            part = slice(start, start + PAIRS)
            out[part] = (x[row[part]] * c[at[part]]).sum(dim=1).cpu().numpy()
        return out
    size, nothing = (len(x), len(c)), x.new_zeros(len(columns))
    pairs = torch.sparse_csr_tensor(torch.from_numpy(starts), at, nothing, size, check_invariants=False)
    products: npt.NDArray[np.float32] = torch.sparse.sampled_addmm(pairs, x, c.T, beta=0.0).values().numpy()
    return products


def score_error(d: int, norm_x: Floats | float, norm_c: float) -> Any:
    """Bound the error of 0.5 |c|^2 - x . c, or of x . c, in the precision that is set, in any order of summation.

    For the factors' roundings u (2 + u) |x||c|; for the sum the textbook bound gamma_d |x||c| of a dot product of d
    terms (Higham, Accuracy and Stability, 3.1), with four more roundings for the norm and the last difference; and a
    tenth on top.
    """
    unit, u = ROUNDOFF["float32"], ROUNDOFF[_asked]
    factors = u * (2 + u) * norm_x * norm_c if u > unit else 0.0
    return 1.1 * ((d + 4) * unit * (norm_x * norm_c + 0.5 * norm_c * norm_c) + factors) + 1e-37
