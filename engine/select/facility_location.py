"""`facility_location`: greedy maximum of sum_i max over picks p of sim(i, p), on the k-nearest-neighbour graph.

Lazily, and in a few rounds (`columns`). Cost: n^2 d multiplications for the graph. By definition it takes
O(n * neighbors) memory, 20 bytes an edge, in the blocks; the driver holds three numbers a row, and the columns of a
round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from engine.arrays import Bools, Floats, Ints
from engine.blocks import Block, fixed_point_scale
from engine.canonical import canonical_dot, normalize
from engine.schema import Opt
from engine.select.columns import LazyGreedy, add_edges, settle
from engine.select.graph import neighbor_lists
from engine.select.picking import draw
from engine.shards import Request, Shards, Step

REST_KEY = 3005


@dataclass(frozen=True)
class Options:
    """Options of `facility_location`."""

    neighbors: Annotated[int, Opt("Nearest rows that can stand for a row; others count 0.", min=1, max=10_000)] = 50


def _rows(block: Block) -> tuple[Ints, Bools]:
    return block.rows, block.eligible


def _whole(similarity: Floats, unit: float) -> Ints:
    """Return similarities, 0 at least and 1 at most, in whole numbers of 1 / unit."""
    return np.rint(np.clip(similarity, 0, 1) * unit).astype(np.int64)


def _keep(block: Block, rows: Ints, neighbors: Ints, similarity: Floats, unit: float) -> None:
    """Keep what the lists say of this block's rows."""
    at = np.searchsorted(block.rows, rows)
    mine = at < len(block.rows)
    mine[mine] = block.rows[at[mine]] == rows[mine]
    owner = np.repeat(at[mine], neighbors.shape[1])
    add_edges(block, neighbors[mine].ravel(), owner, _whole(similarity[mine].ravel(), unit))


def _settle(block: Block, unit: float) -> None:
    """Add each row's similarity to itself; make the edges ready, nothing covered yet."""
    x, at = normalize(block.x, block.norms), np.arange(len(block.rows), dtype=np.int64)
    add_edges(block, block.rows, at, _whole(canonical_dot(x, at, x, at), unit))
    settle(block, np.zeros_like(at))


def _start(shards: Shards, request: Request) -> LazyGreedy:
    """Return the greedy over all rows, before it knows of any edge, with the picks that were made before a resume."""
    parts = shards.map(_rows)
    rows, eligible = np.concatenate([rows for rows, _ in parts]), np.concatenate([mask for _, mask in parts])
    gains = request.resume.arrays["units"] if request.resume else np.empty(0, dtype=np.int64)
    picks = request.resume.picks[: len(gains)] if request.resume else gains
    return LazyGreedy(shards, request, rows, eligible, picks, gains)


def facility_location(shards: Shards, request: Request, options: Options) -> Iterator[Step]:
    """Pick again and again the row that adds most to the pool's mean similarity to its most similar pick.

    sim(i, p) is the cosine similarity, at least 0, of row i and itself and each of its `neighbors` nearest other rows p,
    and 0 of all other pairs. Every row counts in the mean, eligible or not; labelled rows count as picked from the
    start; ties go to the smaller row. `gain` is what a pick adds to the mean, the objective the mean attained. Once no
    row adds anything, what is left of the budget follows a seeded permutation, with a gain of 0. Smaller budgets are
    prefixes. Similarities are rounded to multiples of 2^-62 n (or a power of two below twice that) and summed exactly.
    """
    nothing = np.empty(0, dtype=np.int64)
    if request.budget == 0:
        yield Step(0, 0, nothing, np.empty(0))
        return
    unit = fixed_point_scale(shards.n, 1.0)
    greedy = _start(shards, request)

    def step(number: int, rest: Ints, note: str) -> Step:
        picks, gains = np.concatenate([greedy.picks, rest]), np.concatenate([greedy.gains, np.zeros_like(rest)])
        scale = unit * shards.n
        return Step(
            number,
            request.total(len(picks)),
            picks,
            gains / scale,
            note,
            greedy.covered / scale,
            arrays={"units": greedy.gains},
        )

    done = 0
    for rows, lists, similarity in neighbor_lists(shards, greedy.rows, min(options.neighbors, max(1, shards.n - 1))):
        shards.map(_keep, rows, lists, similarity, unit)
        done += len(rows)
        yield step(0, nothing, f"neighbours of {done:,} of {shards.n:,} rows")
    shards.map(_settle, unit)
    greedy.measure(np.concatenate([request.labeled, greedy.picks]))
    rounds = 0
    while request.lacking(len(greedy.picks)) and greedy.advance():
        rounds += 1
        yield step(len(greedy.picks), nothing, f"{rounds} rounds")
    rest = draw(shards, request, (REST_KEY,), greedy.picks)
    yield step(len(greedy.picks) + len(rest), rest, f"{rounds} rounds")
