"""`activeft`: parametric selection (Xie et al., CVPR 2023), by the closed form of its gradient.

b free vectors T move so that the pool's rows come close to them while they repel one another; then each takes its most
similar row. With C = T / |T|, s_i = max_j x_i . C_j / tau, c_i its argmax and R_c = sum_j exp(C_j . C_c / tau), the
gradient needs from the pool only, for each vector, a weighted sum of rows and a sum of weights: the shape of a k-means
step. No autograd graph and no (n, b) matrix exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block, Ranked, among, fixed_point_scale, merge_smallest, smallest, vector_scale, weighted_sums
from engine.canonical import rows_at, single_thread
from engine.draws import random_keys, random_subset
from engine.nearest import merge_lists, top_similar
from engine.schema import Opt
from engine.select.picking import UNCONDITIONAL, Shelves, both_ways
from engine.select.shortlists import follow
from engine.shards import Request, Shards, Step

WHOLE_POOL = 100_000
START_KEY, BATCH_KEY = 11, 12
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
TILE_ROWS = 512
REACH = 6
"""Steps of the length of the last one after which the lists of `follow` may run out."""

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """Options of `activeft`."""

    steps: Annotated[int | None, Opt("Adam steps. Default: 300 on whole pools, 100 on batches.", min=0, max=1_000_000)] = None
    batch: Annotated[
        int | None, Opt("Rows in a step's seeded batch. Default: the whole pool up to 100,000 rows, else 100,000.", min=1)
    ] = None
    rate: Annotated[float, Opt("Adam's learning rate.", min=1e-9, max=10)] = 1e-3
    temperature: Annotated[float, Opt("tau.", min=1e-3, max=100)] = 0.07
    balance: Annotated[float, Opt("lambda, the weight of the repulsion.", min=0, max=1e6)] = 1.0
    objective: Annotated[str, Opt("The released code's loss, or the paper's equation.", choices=("released", "paper"))] = (
        "released"
    )


@dataclass(frozen=True)
class Pull:
    """What rows ask of the vectors: fixed-point sums of w_i x_i (b, d) and of w_i (b,), and of the loss."""

    rows: npt.NDArray[np.int64]
    weights: Ints
    loss: int


@dataclass(frozen=True)
class Scales:
    """Fixed-point scales of a pull's three sums."""

    rows: float
    weights: float
    loss: float


def _pull(block: Block, centres: Matrix, log_repulsion: Floats, tau: float, scales: Scales, reach: float) -> Pull:
    """Return the block's pull on the first len(log_repulsion) of the centres; the others are labelled, and fixed.

    w_i = lambda R_c / (exp(s_i) + lambda R_c), and the loss -(s_i - log(exp(s_i) + lambda R_c)); log_repulsion holds
    log(lambda R_c). A row whose most similar vector is labelled pulls nothing and adds no loss.
    """
    b = len(log_repulsion)
    index, product = follow(block, torch.tensor(centres), reach)
    free = index < b
    s, owner = product / tau, np.where(free, index, 0)
    gap = log_repulsion[owner] - s
    weight = np.where(free, np.exp(-np.logaddexp(0.0, -gap)), 0.0)
    loss = np.where(free, np.logaddexp(0.0, gap), 0.0)
    return Pull(
        weighted_sums(block.x, weight, owner, b, scales.rows),
        _integer_sums(weight, owner, b, scales.weights),
        int(np.rint(loss * scales.loss).astype(np.int64).sum()),
    )


def _integer_sums(values: Floats, group: Ints, groups: int, scale: float) -> Ints:
    out = np.zeros(groups, dtype=np.int64)
    np.add.at(out, group, np.rint(values * scale).astype(np.int64))
    return out


def _pull_plain(block: Block, centres: Matrix, b: int, tau: float, scales: Scales, reach: float) -> Pull:
    """The paper's first term: every row pulls its most similar vector with weight 1, and its loss is -s_i."""
    index, product = follow(block, torch.tensor(centres), reach)
    free = index < b
    weight, owner = free.astype(np.float64), np.where(free, index, 0)
    loss = np.where(free, -product / tau, 0.0)
    return Pull(
        weighted_sums(block.x, weight, owner, b, scales.rows),
        _integer_sums(weight, owner, b, scales.weights),
        int(np.rint(loss * scales.loss).astype(np.int64).sum()),
    )


def _add(a: Pull, b: Pull) -> Pull:
    return Pull(a.rows + b.rows, a.weights + b.weights, a.loss + b.loss)


def _unit(t: Floats) -> tuple[Matrix, Floats]:
    """Return C = T / |T| as float32, and |T|."""
    norms = np.sqrt((t * t).sum(axis=1))
    norms[norms == 0] = 1.0
    return (t / norms[:, None]).astype(np.float32), norms


def repulsion(centres: Matrix, b: int, tau: float) -> tuple[Floats, Floats]:
    """Return log R_c (b,) and m_c = sum_j exp(C_j . C_c / tau) C_j / R_c (b, d): all vectors j, the self term included.

    The first b vectors are the free ones, c; the C_j side is a constant (it is detached in the released code). Products
    and powers are float32, one thread a tile, so that they round alike for any number of threads.
    """
    every = torch.from_numpy(centres)
    log_r, mean = np.empty(b), np.empty((b, centres.shape[1]))

    def tile(start: int) -> None:
        part = slice(start, min(start + TILE_ROWS, b))
        powers = every[part] @ every.T
        largest = powers.amax(dim=1, keepdim=True)
        powers.sub_(largest).div_(tau).exp_()
        total = powers.sum(dim=1, dtype=torch.float64).numpy()
        log_r[part] = np.log(total) + largest[:, 0].double().numpy() / tau
        mean[part] = (powers @ every).numpy() / total[:, None]

    threads = min(torch.get_num_threads(), -(-b // TILE_ROWS))
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(tile, range(0, b, TILE_ROWS)))
    return log_r, mean


def released_gradient(centres: Matrix, pull: Pull, mean: Floats, rows: int, tau: float, scales: Scales) -> Floats:
    """Return dloss/dC (b, d): -1/(n tau) (sum w_i x_i - (sum w_i) m_c)."""
    weights = pull.weights / scales.weights
    return -(pull.rows / scales.rows - weights[:, None] * mean) / (rows * tau)


def paper_repulsion(centres: Matrix, b: int, tau: float, balance: float) -> tuple[float, Floats]:
    """Return lambda mean_j log sum_{k != j} exp(C_j . C_k / tau) over the free j, and its gradient, both sides."""
    every = torch.from_numpy(centres)
    log_r = np.empty(b)
    gradient = np.zeros((b, centres.shape[1]))
    if len(centres) == 1:
        return 0.0, gradient
    with single_thread():
        for start in range(0, b, TILE_ROWS):
            stop = min(start + TILE_ROWS, b)
            dots = (every[start:stop] @ every.T).double() / tau
            dots[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
            log_r[start:stop] = torch.logsumexp(dots, dim=1).numpy()
            share = torch.softmax(dots, dim=1)
            gradient[start:stop] += (share @ every.double()).numpy()
            gradient += (share[:, :b].T @ every[start:stop].double()).numpy()
    return balance * float(log_r.mean()), balance / (b * tau) * gradient


@dataclass
class _Adam:
    """Adam (Kingma & Ba 2015) in float64 on the driver: b x d numbers."""

    t: Floats
    mean: Floats
    square: Floats
    step: int = 0

    def move(self, gradient: Floats, rate: float) -> None:
        self.step += 1
        self.mean = BETA1 * self.mean + (1 - BETA1) * gradient
        self.square = BETA2 * self.square + (1 - BETA2) * gradient * gradient
        unbiased = self.mean / (1 - BETA1**self.step)
        self.t = self.t - rate * unbiased / (np.sqrt(self.square / (1 - BETA2**self.step)) + EPSILON)


def _start_key(block: Block, seed: int, m: int) -> Ranked:
    rows = block.rows[block.eligible]
    return smallest(random_keys(seed, (START_KEY,), rows), rows, m)


def _largest(block: Block) -> float:
    return float(block.norms.max(initial=0.0))


def objective(
    shards: Shards, centres: Matrix, b: int, options: Options, scales: Scales, at: Ints | None, reach: float = 0.0
) -> tuple[float, Floats]:
    """Return the loss and dloss/dC (b, d) for the free vectors, over all rows or those `at`; `reach` is that of `follow`."""
    rows = shards.n if at is None else len(at)
    tau = options.temperature
    if options.objective == "paper":
        pull = shards.map(_pull_plain, centres, b, tau, scales, reach, combine=_add, at=at)
        repel, gradient = paper_repulsion(centres, b, tau, options.balance)
        return pull.loss / scales.loss / rows + repel, gradient - pull.rows / scales.rows / (rows * tau)
    log_r, mean = repulsion(centres, b, tau)
    with np.errstate(divide="ignore"):
        log_r = log_r + np.log(options.balance)
    pull = shards.map(_pull, centres, log_r, tau, scales, reach, combine=_add, at=at)
    return pull.loss / scales.loss / rows, released_gradient(centres, pull, mean, rows, tau, scales)


def _lists(block: Block, centres: Matrix, taken: Ints, m: int) -> tuple[Floats, Ints]:
    keep = np.flatnonzero(block.eligible & ~among(block.rows, taken))
    return top_similar(rows_at(block.x, keep), block.rows[keep], torch.tensor(centres), m, block.norms[keep])


def snap(shards: Shards, centres: Matrix, request: Request, width: int = 8) -> tuple[Ints, Floats]:
    """Give each vector, in index order, its most similar allowed row not yet taken; return rows and products.

    Each vector has a shelf of its `width` best rows, or a few more. Where a sum is spent, they go round as often as it lasts.
    """
    every = np.arange(len(centres), dtype=np.int64)

    def fetch(shelves: Ints, most: Ints, taken: Ints) -> list[Ranked]:
        values, rows = shards.map(_lists, centres[shelves], np.sort(taken), int(most.max()), combine=merge_lists)
        return [(some[found >= 0], found[found >= 0]) for some, found in zip(values, rows, strict=True)]

    shelves = Shelves(shards, request, fetch, np.ones_like(every), spare=width - 1)
    rows, products = np.empty(0, dtype=np.int64), np.empty(0)
    while request.lacking(len(rows)):
        found, some = shelves.take_all(every)
        rows, products = np.concatenate([rows, found[found >= 0]]), np.concatenate([products, some[found >= 0]])
        shelves.due[:] = 1
    return rows, products


def activeft(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Move b vectors by Adam on the ActiveFT loss, then snap each to a row. `gain` is its similarity to that row.

    b seeded eligible rows to start from; 300 steps on the whole pool up to 100,000 rows, else 100 steps on fresh
    seeded batches of 100,000 (the released code's CIFAR and ImageNet modes). Labelled rows are fixed vectors that
    repel, and take the rows nearest to them. The default objective is the released code's; `objective=paper` is the
    paper's equation 6. Picks are in vector order.
    """
    b, nothing = request.budget, np.empty(0, dtype=np.int64)
    if b == 0:
        yield Step(0, 0, nothing, np.empty(0))
        return
    batch = options.batch or (WHOLE_POOL if shards.n > WHOLE_POOL else None)
    whole = batch is None or batch >= shards.n
    total = options.steps if options.steps is not None else (300 if whole else 100)
    rows_a_step = shards.n if whole or batch is None else batch
    _, start = shards.map(_start_key, request.seed, b, combine=partial(merge_smallest, b))
    labeled = shards.take(request.labeled).numpy()
    t = shards.take(start).numpy().astype(np.float64)
    adam = _Adam(t, np.zeros_like(t), np.zeros_like(t))
    if request.resume is not None:
        kept = request.resume.arrays
        adam = _Adam(kept["t"], kept["mean"], kept["square"], request.resume.number)
    largest = max(shards.map(_largest))
    bound = (1 + largest) / options.temperature + np.log(b + len(labeled)) + abs(np.log(options.balance or 1.0))
    scales = Scales(
        vector_scale(rows_a_step, largest),
        fixed_point_scale(rows_a_step, 1.0),
        fixed_point_scale(rows_a_step, bound),
    )
    free, way = _unit(adam.t)[0], options.rate * float(np.sqrt(shards.d))
    for step in range(adam.step, total):
        before = free
        free, norms = _unit(adam.t)
        way = float(np.linalg.norm(free - before, axis=1).max()) or way
        at = None if whole else random_subset(shards.n, rows_a_step, request.seed, (BATCH_KEY, step))
        reach = REACH * way if whole else 0.0
        loss, gradient = objective(shards, np.concatenate([free, labeled]), b, options, scales, at, reach)
        along = (gradient * free).sum(axis=1, keepdims=True)
        adam.move((gradient - along * free) / norms[:, None], options.rate)
        arrays = {"t": adam.t, "mean": adam.mean, "square": adam.square}
        yield Step(step + 1, total + 1, nothing, np.empty(0), "", loss, arrays=arrays)
    free, _ = _unit(adam.t)
    (picks, products), aside = both_ways(request, partial(snap, shards, free))
    last = {UNCONDITIONAL: aside[0]} if aside else {}
    yield Step(total + 1, total + 1, picks, products, columns={"similarity": products}, arrays=last)
