"""What a selection costs: the method's own steps measured at small sizes, and scaled by what they do.

Each strategy says in what its work grows (`GROWTH`): rows times centres for a product, rows for what is done once a row and
step, and so on. Seconds of shards and of the driver are measured apart, at a few sizes, and a non-negative least-squares fit
gives what each kind of work costs. The number of floats is that of the real vectors, so nothing is said of its growth.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.arrays import Ints
from engine.canonical import normalize
from engine.checks import check_finite
from engine.runner import run_method
from engine.schema import Progress, no_progress
from engine.select import STRATEGIES, strategy_options
from engine.shards import LocalShards, Request, from_array, take_patterns
from jobs.traffic import CANDIDATES, LEGS, Size
from jobs.work import Work

NOTHING = np.empty(0, dtype=np.int64)
STEPS = ("_first", "_next", "_pull", "_pull_plain")
"""Functions that run once in every iteration of the strategies that iterate."""
CHECK = "_first_bad"
"""Runs once, before a method."""
FEW_STEPS = 12
LARGE, SMALL = (16384, 8192), (4096, 2048)
"""Rows at which a strategy is measured; the small ones where work grows with their square."""
MOST_PICKS, SEVERAL_ROUNDS = 512, 2048
"""Picks of the largest measurement; more where a round takes a thousand, or the driver compares picks with one another."""
SHARE = 0.8
"""Of the difference of two other vectors, that is added to one to make one more like it."""

Features = Callable[[Size, float], tuple[float, ...]]
"""(size, iterations) -> amounts of work."""


def _plain(size: Size, steps: float) -> tuple[float, ...]:
    return (float(size.n),)


def _clustered(size: Size, steps: float) -> tuple[float, ...]:
    return (size.n * size.clusters * (steps + 1), size.n * (steps + 1))


def _typical(size: Size, steps: float) -> tuple[float, ...]:
    return (*_clustered(size, steps), size.n * size.n / size.clusters)


def _moved(size: Size, steps: float) -> tuple[float, ...]:
    batch = size.options.get("batch") or (100_000 if size.n > 100_000 else size.n)
    rows = min(size.n, batch)
    return (rows * size.b * steps, rows * steps)


def _picked(size: Size, steps: float) -> tuple[float, ...]:
    return (float(size.n) * size.b, float(size.n))


def _candidates(size: Size, steps: float) -> tuple[float, ...]:
    return (size.n * min(size.n, int(size.options.get("candidates", 20_000))), size.n * size.b)


def _graph(size: Size, steps: float) -> tuple[float, ...]:
    return (float(size.n) * size.n, size.n * size.b)


def _driver(size: Size, steps: float) -> tuple[float, ...]:
    return (float(size.b), 1.0)


def _driver_centres(size: Size, steps: float) -> tuple[float, ...]:
    return (size.clusters * (steps + 1), steps + 1)


def _driver_tree(size: Size, steps: float) -> tuple[float, ...]:
    return (*_driver_centres(size, steps), float(size.clusters) ** 2)


def _driver_repulsion(size: Size, steps: float) -> tuple[float, ...]:
    return (float(size.b) * size.b * steps, size.b * steps)


def _driver_rows(size: Size, steps: float) -> tuple[float, ...]:
    return (float(size.n), float(size.b))


@dataclass(frozen=True)
class Growth:
    """In what the seconds of a strategy's shards and of its driver grow; `few` are options of its measurements.

    The functions `once` run after the iterations, and grow in n b and n.
    """

    shards: Features
    driver: Features = _driver
    once: tuple[str, ...] = ()
    rows: tuple[int, ...] = LARGE
    few: dict[str, Any] = field(default_factory=dict)
    picks: int = MOST_PICKS


GROWTH: dict[str, Growth] = {
    "kmeans": Growth(_clustered, _driver_centres, few={"restarts": 1}),
    "hierarchical": Growth(_clustered, _driver_tree),
    "typiclust": Growth(_typical, _driver_centres, rows=SMALL),
    "activeft": Growth(_moved, _driver_repulsion, ("_lists",), picks=SEVERAL_ROUNDS, few={"steps": FEW_STEPS}),
    "coreset": Growth(_picked),
    "freesel": Growth(_picked, picks=SEVERAL_ROUNDS),
    "badge": Growth(_picked, picks=SEVERAL_ROUNDS),
    "maxherding": Growth(_candidates, rows=SMALL),
    "probcover": Growth(_candidates, rows=SMALL),
    "facility_location": Growth(_graph, _driver_rows, rows=SMALL),
}
"""The others look at every row once."""
PLAIN = Growth(_plain)


class Metered(LocalShards):
    """Shards in this process that note how long blocks take, by the CPU, and how often they are asked for what."""

    def __init__(self, local: LocalShards) -> None:
        super().__init__(local.blocks, local.d)
        self.seconds, self.calls = defaultdict[str, float](float), Counter[str]()

    def take(self, rows: Ints) -> torch.Tensor:
        """As the shards do."""
        return take_patterns(self, rows)[0]

    def map(
        self, fn: Callable[..., Any], *args: Any, combine: Callable[[Any, Any], Any] | None = None, at: Ints | None = None
    ) -> Any:
        """As the shards do."""
        began = time.process_time()
        result = super().map(fn, *args, combine=combine, at=at)
        name = getattr(fn, "__name__", getattr(getattr(fn, "func", fn), "__name__", ""))
        self.seconds[name] += time.process_time() - began
        self.calls[name] += 1
        return result


@dataclass(frozen=True)
class Point:
    """One measurement: n vectors, b picks; CPU seconds of shards (`once_s`: before and after the iterations) and driver;
    calls, and iterations that were done.
    """

    n: int
    b: int
    shard_s: float
    once_s: float
    driver_s: float
    calls: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """A strategy's measurements at vectors of d floats, on one thread."""

    strategy: str
    d: int
    options: dict[str, Any]
    points: tuple[Point, ...]


def alike(x: npt.NDArray[np.float32], n: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return n vectors like some: x_i + SHARE (x_j - x_k), normalised. They have the directions that the given ones have."""
    rng = np.random.default_rng(seed)
    i, j, k = rng.integers(0, len(x), (3, n))
    made = x[i] + np.float32(SHARE) * rng.random((n, 1), dtype=np.float32) * (x[j] - x[k])
    norms = np.linalg.norm(made, axis=1, keepdims=True)
    return np.asarray(made / np.where(norms > 0, norms, 1), dtype=np.float32)


def _shards(strategy: str, x: npt.NDArray[np.float32], each: int) -> LocalShards:
    """Return shards of vectors, `each` of an image, with what the strategy reads beside them made up."""
    row = STRATEGIES[strategy]
    images = len(x) // each
    rng = np.random.default_rng(1)
    predictions: dict[str, npt.NDArray[np.float32]] = {}
    if "probs" in row.predictions:
        drawn = rng.exponential(size=(images, 10)).astype(np.float32)
        predictions["probs"] = drawn / drawn.sum(axis=1, keepdims=True)
    elif row.predictions:
        predictions[row.predictions[0]] = rng.random((images, 1), dtype=np.float32)
    labels = rng.integers(0, 10, images) if row.columns else None
    rows = np.repeat(np.arange(images, dtype=np.int64), each)
    return from_array(x[: images * each], labels, rows=rows, predictions=predictions)


def measure(
    strategy: str,
    given: dict[str, Any],
    x: npt.NDArray[np.float32],
    most: Size,
    each: int = 1,
    progress: Progress = no_progress,
) -> Measured:
    """Run a strategy with options `given` on vectors like x at a few sizes below `most`; one thread."""
    growth = GROWTH.get(strategy, PLAIN)
    large, small = (min(most.n, rows) for rows in growth.rows)
    picks = max(1, min(most.b, growth.picks, large // 4))
    fewer = max(1, picks // 4)
    sizes = sorted({(small, fewer), (large, fewer), (large, picks), (small, min(picks, small))})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    points = []
    try:
        for done, (n, b) in enumerate(sizes):
            progress("probe", done, len(sizes), f"{strategy}, {n:,} vectors, {b:,} picks")
            points.append(_point(strategy, {**given, **growth.few}, alike(x, n), b, each, growth.once))
    finally:
        torch.set_num_threads(threads)
    return Measured(strategy, x.shape[1], filled(strategy, given), tuple(points))


def filled(strategy: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return a strategy's options with every default; raises InputError for what is none of them."""
    _, _, options = strategy_options(strategy, given)
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


def _point(
    strategy: str, given: dict[str, Any], x: npt.NDArray[np.float32], b: int, each: int, once: tuple[str, ...] = ()
) -> Point:
    _, method, options = strategy_options(strategy, given)
    shards = Metered(_shards(strategy, x, each))
    before = time.process_time()
    for block in shards.blocks:
        normalize(block.x, block.norms)
    check_finite(shards, "")
    began = time.process_time()
    run_method(method, shards, Request(b, 0, NOTHING), options)
    spent = time.process_time() - began
    steps = sum(shards.calls[name] for name in STEPS)
    whole = sum(seconds for name, seconds in shards.seconds.items() if name != CHECK)
    last = sum(shards.seconds[name] for name in once)
    opened = began - before
    return Point(len(x), b, whole - last, last + opened, spent - whole, shards.calls.total() - 1, steps)


def _fit(features: list[tuple[float, ...]], seconds: list[float]) -> npt.NDArray[np.float64]:
    """Return what each kind of work costs, none less than 0, by the least relative errors."""
    from scipy.optimize import nnls

    a, y = np.array(features, dtype=np.float64), np.maximum(np.array(seconds), 1e-6)
    scale = a.max(axis=0)
    found, _ = nnls(a / scale / y[:, None], np.ones(len(y)))
    return np.asarray(found / scale)


def iterations(strategy: str, options: dict[str, Any], n: int) -> float:
    """Return the iterations that a strategy makes at most, all restarts together; 0 where it does not iterate."""
    if strategy == "activeft":
        batch = options.get("batch") or (100_000 if n > 100_000 else n)
        return float(options["steps"] if options["steps"] is not None else 300 if batch >= n else 100)
    return float(options.get("iterations", 0))


def calls_of(found: Measured, b: int) -> float:
    """Return the calls at b picks, iterations aside: a line through the measurements of most rows.

    A round picks from a thousand candidates at most, so there are no fewer than that asks for.
    """
    most = max(point.n for point in found.points)
    by_b = {point.b: point.calls - point.steps for point in found.points if point.n == most}
    (low, few), (high, many) = min(by_b.items()), max(by_b.items())
    slope = max(0.0, (many - few) / (high - low)) if high > low else 0.0
    rounds = 2 / CANDIDATES if GROWTH.get(found.strategy, PLAIN).shards is not _plain else 0.0
    return many + max(slope, rounds) * max(0, b - high)


def work_of(found: Measured, n: int, b: int, shards: int = 64) -> Work:
    """Return what a selection of b from n vectors takes, its messages those of so many shards."""
    growth = GROWTH.get(found.strategy, PLAIN)
    few = {**found.options, **growth.few}
    sizes = [(Size(p.n, p.b, found.d, 1, few), float(p.steps)) for p in found.points]
    whole = Size(n, b, found.d, shards, found.options)
    steps, again = iterations(found.strategy, found.options, n), int(found.options.get("restarts", 1))
    seconds = []
    for features, spent in ((growth.shards, "shard_s"), (growth.driver, "driver_s"), (_picked, "once_s")):
        costs = _fit([features(*size) for size in sizes], [getattr(point, spent) for point in found.points])
        seconds.append(again * float(np.dot(costs, features(whole, steps))))
    calls = again * (calls_of(found, b) + steps)
    legs = LEGS[found.strategy](whole)
    down, up = max(leg.down for leg in legs), max(leg.up for leg in legs)
    return Work(
        seconds[0] + seconds[2] / again,
        whole.blocks,
        driver_s=seconds[1],
        rounds=calls,
        down=calls * down,
        up=calls * up,
        piece="blocks",
        threads=torch.get_num_threads(),
    )
