"""What a selection sends: messages and bytes of each kind of step, as functions of its size. `tests/test_messages.py` counts.

A step is one `Shards.map`: the call goes to every node once and is read by each of its shards; results fold in each shard
and then in a tree over the shards, so that the driver gets one of them, or (not `folded`) go to the driver from all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.schema import BLOCK_ROWS

CANDIDATES = 1024
"""Rows that a round of `coreset`, `freesel`, `badge` and of D^2 seeding brings to the driver."""
ENVELOPE = 1500
"""Bytes of a message that are about it: names, shapes, types."""


@dataclass(frozen=True)
class Size:
    """How large a selection is: n vectors of d floats, b picks, on so many shards; `options` are the strategy's own."""

    n: int
    b: int
    d: int
    shards: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    classes: int = 1000

    @property
    def blocks(self) -> int:
        """The blocks of the pool."""
        return -(-self.n // BLOCK_ROWS)

    @property
    def clusters(self) -> int:
        """The clusters of a strategy that clusters the whole pool."""
        levels = self.options.get("levels")
        if "leaf" in self.options:
            return int(levels[0]) if levels else max(1, min(max(self.b, 1000), self.n // 50))
        return min(self.b, int(self.options.get("max_clusters", self.b)))


@dataclass(frozen=True)
class Leg:
    """One kind of step: the function that runs on blocks, the bytes of its call, the most that a shard answers."""

    function: str
    down: float
    up: float
    folded: bool = True


def _centres(k: float, d: int) -> float:
    """Return the bytes of k centres ready for products: vectors, halves of squared norms, two numbers each."""
    return k * (4 * d + 20)


def _per_block(size: Size) -> float:
    """Return the bytes of one float of every block of a shard."""
    return 9 * -(-size.blocks // size.shards)


def _drawn(size: Size, down: float, function: str = "_lower") -> tuple[Leg, ...]:
    """The rounds of D^2 sampling: what was taken goes down, then masses of blocks, draws and their vectors come up."""
    return (
        Leg(function, down, 24 if function == "_lower" else _per_block(size), folded=False),
        Leg("_draw", 16 * CANDIDATES, 24 * CANDIDATES),
        Leg("_pick_out", 8 * CANDIDATES, CANDIDATES * (4 * size.d + 450)),
    )


def _lloyd(size: Size) -> tuple[Leg, ...]:
    """k-means: seeds, then a step an iteration, of which only clusters that change come up."""
    k, seeds = size.clusters, min(size.clusters, CANDIDATES)
    down, up = _centres(k, size.d), k * (8 * size.d + 16) + 900
    return (*_drawn(size, _centres(seeds, size.d), "_mass"), Leg("_first", down, up), Leg("_next", down + 16 * k, up))


def _kmeans(size: Size) -> tuple[Leg, ...]:
    k = size.clusters
    return (*_lloyd(size), Leg("_summarise", _centres(k, size.d) + 16 * k, 24 * k))


def _hierarchical(size: Size) -> tuple[Leg, ...]:
    k = size.clusters
    return (*_lloyd(size), Leg("_settle", 4 * k * size.d, 24 * k), Leg("_choose", 8 * k, 32 * size.b))


def _typiclust(size: Size) -> tuple[Leg, ...]:
    k, queries, members, near = size.clusters, 4096, 65536, int(size.options.get("neighbors", 20))
    found = max(8192, 2 * size.n // k)
    searched = queries * (4 * size.d + 24) + 16 * min(members, found) + 8 * min(members, found)
    return (
        *(leg for leg in _lloyd(size) if leg.function != "_pick_out"),
        Leg("_settle", 4 * k * size.d, 24 * k),
        Leg("_members", 8 * k, 33 * found, folded=False),
        Leg("_pick_out", 8 * queries, queries * (4 * size.d + 450)),
        Leg("_near", searched, 8 * near * queries),
        Leg("_exact", searched + 8 * queries, 8 * near * queries),
    )


def _coreset(size: Size) -> tuple[Leg, ...]:
    m = int(size.options.get("candidates", CANDIDATES))
    picks = min(size.b, m)
    return (
        Leg("_farthest_first", _centres(picks, size.d) + 8 * picks, 16 * (m + 1)),
        Leg("_pick_out", 8 * m, m * (4 * size.d + 450)),
    )


def _activeft(size: Size) -> tuple[Leg, ...]:
    vectors = 4 * size.b * size.d
    batch = size.options.get("batch") or (100_000 if size.n > 100_000 else None)
    rows = 8 * batch if batch is not None and batch < size.n else 0
    return (Leg("_pull", vectors + 8 * size.b + rows, size.b * (8 * size.d + 8)), Leg("_lists", vectors, 128 * size.b))


def _freesel(size: Size) -> tuple[Leg, ...]:
    return _drawn(size, min(size.b, CANDIDATES) * (4 * size.d + 28))


def _badge(size: Size) -> tuple[Leg, ...]:
    return _drawn(size, min(size.b, CANDIDATES) * (4 * size.d + 4 * size.classes + 24))


def _greedy(size: Size) -> tuple[Leg, ...]:
    """The end of a lazy greedy: what each row would add, once, and the columns of a round's candidates."""
    return (Leg("_columns", 8 * 2 * CANDIDATES, 32 * (1 << 20), folded=False),)


def _maxherding(size: Size) -> tuple[Leg, ...]:
    most = min(int(size.options.get("candidates", 20_000)), size.n, 2048)
    return (Leg("measure", 4 * size.d * (most + 1), 16 * (most + 1)), *_greedy(size))


def _facility_location(size: Size) -> tuple[Leg, ...]:
    queries, near = min(4096, size.n), int(size.options.get("neighbors", 50))
    share = -(-size.n // size.shards)
    return (
        Leg("_rows", 0, 9 * share + 400 * -(-size.blocks // size.shards), folded=False),
        Leg("_lists", 4 * size.d * queries, 16 * (near + 1) * queries),
        Leg("_keep", queries * (8 + 16 * near), 8, folded=False),
        Leg("_worth", 8 * size.b, 24 * min(size.n, share * (near + 1)) + 600 * size.blocks, folded=False),
        *_greedy(size),
    )


def _first(size: Size) -> tuple[Leg, ...]:
    """The first b of an order: keys and rows."""
    return (Leg("_lowest_keys", 0, 16 * size.b),)


def _ranked(size: Size) -> tuple[Leg, ...]:
    return (Leg("_largest", 0, 16 * size.b),)


LEGS: dict[str, Callable[[Size], tuple[Leg, ...]]] = {
    "random": _first,
    "uniform": lambda size: (Leg("_lowest_keys_by_class", 8 * size.classes, 16 * size.b + 300 * size.classes),),
    "kmeans": _kmeans,
    "hierarchical": _hierarchical,
    "typiclust": _typiclust,
    "coreset": _coreset,
    "activeft": _activeft,
    "freesel": _freesel,
    "badge": _badge,
    "maxherding": _maxherding,
    "probcover": _maxherding,
    "facility_location": _facility_location,
    **dict.fromkeys(("entropy", "margin", "least_confidence", "influence", "gradient_similarity", "stability"), _ranked),
}
"""The kinds of steps of every strategy that weigh anything."""


def driver_bytes(strategy: str, size: Size) -> float:
    """Return what a strategy holds on the driver at its largest, beside the libraries: its own arrays and one answer."""
    k, d, m = size.clusters, size.d, CANDIDATES
    answer = max(leg.up * (1 if leg.folded else size.shards) for leg in LEGS[strategy](size))
    own = {
        "activeft": 72 * size.b * d + 2048 * size.b,
        "kmeans": 40 * k * d,
        "hierarchical": 40 * k * d,
        "typiclust": 40 * k * d + 64 * max(8192, size.n // k),
        "maxherding": 4 * d * min(size.n, 20_000),
        "probcover": 4 * d * min(size.n, 20_000),
        "facility_location": 25 * size.n,
    }
    return own.get(strategy, m * m * 16 + 16 * m * d) + answer + 64 * size.b


STATE_BYTES = {
    "kmeans": 40,
    "hierarchical": 40,
    "typiclust": 64,
    "coreset": 26,
    "activeft": 400,
    "freesel": 17,
    "badge": 17,
    "maxherding": 16,
    "probcover": 16,
}
"""What a strategy keeps for each row between steps, beside its vector; that of `facility_location` is its graph."""
ROW_BYTES = 25
"""Number, norm and mask of a row."""


def row_bytes(strategy: str, size: Size) -> float:
    """Return what a shard holds for each row beside its vector."""
    edges = 28 * int(size.options.get("neighbors", 50)) if strategy == "facility_location" else 0
    dense = 4 * size.d if strategy in ("maxherding", "probcover") else 0
    return ROW_BYTES + STATE_BYTES.get(strategy, 0) + edges + dense
