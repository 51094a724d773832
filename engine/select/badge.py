"""`badge`: images drawn by the distance of their gradient embeddings (Ash et al., ICLR 2020).

An image's gradient embedding is what its loss, with the likeliest class y for a label, would do to the last layer's
weights: (p - e_y) outer x, of probabilities p and features x. It is never made. Distances and norms of outer products
factorise: |a (x) x - b (x) z|^2 = |a|^2 |x|^2 + |b|^2 |z|^2 - 2 (a . b)(x . z), so two products of the factors do, and what
they can't decide is settled by canonical ones. D^2 is sampled in rounds of many picks, as in `seeding`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block
from engine.canonical import canonical_dot, rows_at
from engine.draws import random_uniform
from engine.nearest import TILE_ELEMENTS
from engine.products import score_error, scores
from engine.select.picking import draw
from engine.select.seeding import Walk, drawn, places_drawn
from engine.shards import Request, Shards, Step, close, take_predicted

CANDIDATES = 1024
"""Images that a round looks at, and by which distances are lowered at once."""
FIRST_KEY, BLOCK_DRAW, ACCEPT_DRAW, REST_KEY = 51, 52, 53, 54


@dataclass(frozen=True)
class Options:
    """It has none."""


def _squares(x: torch.Tensor) -> Floats:
    """Return |x_i|^2, (r,), the same bits as the canonical product of a row with itself."""
    every = np.arange(len(x), dtype=np.int64)
    return canonical_dot(x, every, x, every)


@dataclass(frozen=True)
class Gradients:
    """The factors of some images' gradient embeddings: `residual` p - e_y (m, classes), `x` (m, d), float32, side by side.

    `residual_square` and `x_square` (m,) are their canonical squared norms, `square` their product: the embedding's.
    """

    residual: torch.Tensor
    x: torch.Tensor
    residual_square: Floats
    x_square: Floats

    @classmethod
    def of(cls, probs: torch.Tensor, x: torch.Tensor) -> Gradients:
        """Return those of probabilities (m, classes) and features (m, d); of equally likely classes y is the first."""
        residual = probs.clone()
        residual[torch.arange(len(probs)), torch.from_numpy(probs.numpy().argmax(axis=1))] -= 1
        return cls(residual.to(x.device), x, _squares(residual), _squares(x))

    @property
    def square(self) -> Floats:
        """The squared norm of each embedding, (m,) float64."""
        return self.residual_square * self.x_square

    def to(self, device: torch.device) -> Gradients:
        """Return the same on a device."""
        return Gradients(self.residual.to(device), self.x.to(device), self.residual_square, self.x_square)

    def some(self, at: Ints) -> Gradients:
        """Return those at some places."""
        squares = self.residual_square[at], self.x_square[at]
        return Gradients(rows_at(self.residual, at), rows_at(self.x, at), *squares)


def _sqdist(a: Gradients, i: Ints, b: Gradients, j: Ints) -> Floats:
    """Return the canonical squared distance of each pair (i[p], j[p]), (p,) float64: exactly 0 between equal ones."""
    product = canonical_dot(a.residual, i, b.residual, j) * canonical_dot(a.x, i, b.x, j)
    return np.maximum(0.0, a.square[i] + b.square[j] - 2 * product)


def _error(mine: Gradients, new: Gradients) -> Floats:
    """Bound the error of 0.5 |g_j|^2 - (a_i . a_j)(x_i . x_j) in float32, from the bounds on its two products."""
    norms = [np.sqrt(values) for values in (mine.residual_square, mine.x_square)]
    largest = [float(np.sqrt(values.max())) for values in (new.residual_square, new.x_square)]
    widths = mine.residual.shape[1], mine.x.shape[1]
    of_residual, of_x = (score_error(d, norm, most) for d, norm, most in zip(widths, norms, largest, strict=True))
    products = [norm * most for norm, most in zip(norms, largest, strict=True)]
    rounded = 2.0**-22 * (products[0] * products[1] + largest[0] ** 2 * largest[1] ** 2)
    return np.asarray(1.1 * (products[0] * of_x + products[1] * of_residual + of_residual * of_x + rounded) + 1e-37)


def _nearest(mine: Gradients, new: Gradients, before: Floats) -> Floats:
    """Return the lower of `before` (r,) and the canonical squared distance to the nearest of some embeddings.

    The products are taken in tiles; canonical values only where these don't rule out that one is nearer.
    """
    half = torch.from_numpy((0.5 * new.square).astype(np.float32)).to(mine.x.device)
    nothing, error, out = torch.zeros_like(half), _error(mine, new), before.copy()
    limit = 0.5 * (before - mine.square) + error + 1e-12 * mine.square
    step = max(64, TILE_ELEMENTS // len(half))
    for start in range(0, len(before), step):
        part = slice(start, start + step)
        score = scores(nothing, mine.residual[part], new.residual).mul_(scores(nothing, mine.x[part], new.x))
        score = torch.sub(half, score, out=score)
        least = score.amin(dim=1).double().cpu().numpy()
        rows = np.flatnonzero(least <= limit[part])
        reach = torch.from_numpy(np.minimum(least[rows] + 2 * error[part][rows], limit[part][rows])).to(score.device)
        pairs = (rows_at(score, rows) <= reach[:, None]).nonzero().cpu().numpy()
        at = start + rows[pairs[:, 0]]
        np.minimum.at(out, at, _sqdist(mine, at, new, pairs[:, 1]))
    return out


def _state(block: Block) -> None:
    """Begin with no distance known."""
    if "sqdist" not in block.state:
        block.state["sqdist"] = np.full(len(block.rows), np.inf)
        block.state["open"] = block.eligible.copy()


def _lower(block: Block, new: Gradients, taken: Ints) -> None:
    """Lower distances by the embeddings of new images, and close those images."""
    _state(block)
    block.state["open"] &= block.eligible & ~np.isin(block.rows, taken)
    if len(block.rows):
        mine = Gradients.of(block.predicted("probs"), block.x)
        block.state["sqdist"] = _nearest(mine, new.to(block.x.device), block.state["sqdist"])


def _mass(block: Block) -> float:
    """Return the block's mass of squared distances."""
    block.state["cumulative"] = np.cumsum(np.where(block.state["open"], block.state["sqdist"], 0.0))
    return float(block.state["cumulative"][-1]) if len(block.rows) else 0.0


def _draw(block: Block, owner: Ints, targets: Floats) -> tuple[Ints, Ints, Floats]:
    """Return (slots, rows, squared distances) of the draws that fell in this block."""
    slots, at = places_drawn(block, owner, targets)
    return slots, block.rows[at], block.state["sqdist"][at]


def _gradients(shards: Shards, rows: Ints) -> Gradients:
    """Return those of some pool rows, in the order given, in the host's memory."""
    return Gradients.of(take_predicted(shards, rows, "probs"), shards.take(rows))


def _pairwise(g: Gradients) -> tuple[Floats, float]:
    """Return approximate squared distances among some embeddings, and a bound on their error: float64 products."""
    residual, x, square = g.residual.double(), g.x.double(), torch.from_numpy(g.square)
    product = (residual @ residual.T).mul_(x @ x.T)
    sqdist = torch.add(square[:, None], square[None, :]).sub_(product, alpha=2).clamp_(min=0)
    terms = residual.shape[1] + x.shape[1] + 8
    return sqdist.numpy(), 8 * terms * 2.0**-53 * float(g.square.max()) + 1e-300


def _among(g: Gradients, slot: int, others: Ints) -> Floats:
    return _sqdist(g, np.full(len(others), slot, dtype=np.int64), g, others)


def _take(shards: Shards, request: Request, before: int, number: int) -> tuple[Ints, list[float]] | None:
    """Return the rows that a round draws and their distances when they were; None where all distances are zero."""
    seed = request.seed
    found = drawn(shards, np.array(shards.map(_mass)), _draw, CANDIDATES, seed, (BLOCK_DRAW, number))
    if found is None:
        return None
    rows, stale = found
    g = _gradients(shards, rows)
    walk = Walk(*_pairwise(g), partial(_among, g), stale)
    gains: list[float] = []
    for slot, u in enumerate(random_uniform(seed, (ACCEPT_DRAW, number), np.arange(len(rows), dtype=np.int64))):
        if not request.lacking(before + len(gains)):
            break
        if walk.passes(slot, float(u)) and request.ledger.takes(int(rows[slot])):
            gains.append(float(np.sqrt(walk.settled(slot))))
            walk.accept(slot)
    return rows[walk.accepted], gains


def badge(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Repeatedly draw an image with probability proportional to its squared distance; `gain` is the distance.

    It is that of its gradient embedding to the nearest one of an image picked or labelled. The first image is seeded and
    uniform (gain empty), unless there are labelled ones. Once every distance is zero the rest is seeded (gain 0). Smaller
    budgets are prefixes. x is what `select` gives: of length 1 by default; the paper's features are as they are
    (`--no-normalize`). Deviations from the released code: the first image is drawn as k-means++ does, which the paper names,
    where that code takes the largest embedding; and labelled images count, which it leaves out. A model that has fitted
    those has embeddings near zero for them.
    """
    last, nothing = request.resume, np.empty(0, dtype=np.int64)
    rows = last.picks if last else nothing
    gains: list[float] = last.gains.tolist() if last else []
    number = int(last.arrays["round"]) if last else 0
    if request.budget and not len(rows) and not len(request.labeled):
        rows, gains = draw(shards, request, (FIRST_KEY,), nothing, 1), [np.nan]
    new = np.concatenate([request.labeled, rows])
    while True:
        note, arrays = f"{number} rounds", {"round": np.array(number)}
        total = request.total(len(rows))
        yield Step(len(rows), total, rows, np.array(gains), note, arrays=arrays)
        if len(rows) == total:
            return
        close(shards, request.ledger)
        for start in range(0, len(new), CANDIDATES):
            chunk = new[start : start + CANDIDATES]
            shards.map(_lower, _gradients(shards, chunk), chunk)
        found = _take(shards, request, len(rows), number)
        if found is None:
            new = draw(shards, request, (REST_KEY,), rows)
            gains = gains + [0.0] * len(new)
        else:
            new, gains = found[0], gains + found[1]
        rows, number = np.concatenate([rows, new]), number + 1
