"""The feature matrix wherever it lives: in this process, or on Ray actors. A method can't tell which.

The only file of select that knows Ray. Blocks are the unit of work and of rounding, and results are combined by
associative functions, so the number of shards never shows in a result.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine import session
from engine.arrays import Floats, Ints
from engine.blocks import Block
from engine.canonical import rows_at
from engine.ledger import Ledger, Terms, close_block, reset_block
from engine.products import precision
from engine.reading import Reading, load_blocks
from engine.schema import BLOCK_ROWS, InputError, first_line
from engine.store import FeatureStore, part_vectors

RESTORE_TIMEOUT_S = 60.0
SETTLE_EVERY_S = 5.0


@dataclass(frozen=True)
class Request:
    """What a method is asked for: `budget` new rows, given the rows labelled already (ascending pool rows).

    `excluded` rows may not be picked either, but are not labelled. `resume` is the step to go on from: what the same
    run yielded before it was cut short, with nothing left in the blocks. `ledger` is the account of `terms`, what the picks
    must satisfy together: every pick is entered there. Where a sum is spent, `budget` is about how many picks it pays for.
    """

    budget: int
    seed: int
    labeled: Ints
    excluded: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    resume: Step | None = None
    terms: Terms | None = None
    ledger: Ledger = field(default_factory=Ledger)

    def lacking(self, made: int) -> int:
        """Return how many more picks are due after `made`, at most where a sum is spent; 0 at the end."""
        return self.ledger.at_most() if self.ledger.priced else self.budget - made

    def total(self, made: int) -> int:
        """Return how many picks there will be, as far as is known after `made`: no more than that at the end only."""
        if not self.ledger.priced:
            return self.budget
        return max(self.budget, made + 1) if self.lacking(made) else made


@dataclass(frozen=True)
class Step:
    """What a method yields after each round: where it is, and the picks so far, in pick order.

    `gains` says what each pick added, in the method's own measure (NaN where it has none); `columns` are the
    method's own columns of picks.parquet. `arrays` are the small driver-side arrays that the method needs to go on
    from here, beside picks and gains. The last step holds all picks.
    """

    number: int
    total: int
    picks: Ints
    gains: Floats
    note: str = ""
    objective: float | None = None
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


class LostShardError(RuntimeError):
    """A shard's actor died, and what methods kept there with it: `restore` makes it again."""


class Shards(Protocol):
    """n vectors of d floats in blocks, on which functions are run.

    An image has one vector, or several (its patterns): those stand together in one block, each under the image's row.
    """

    n: int
    d: int

    def take(self, rows: Ints) -> torch.Tensor:
        """Return the vectors of some pool rows in the order given, (m, d) float32; several an image, in their order."""

    def restore(self) -> None:
        """Make lost shards again, without what methods kept there."""

    def map(
        self, fn: Callable[..., Any], *args: Any, combine: Callable[[Any, Any], Any] | None = None, at: Ints | None = None
    ) -> Any:
        """Run fn(block, *args) on every block, or, with `at`, on blocks made of these vectors (0..n-1) alone.

        Returns the results in block order, or, with an associative `combine`, folded over the blocks of each shard
        and then in a tree over the shards.
        """


def _gather(blocks: list[Block], first: int, at: Ints) -> list[Block]:
    """Return blocks made of the vectors `at` that live here; `first` is the number of the first vector of all here."""
    x, rows, eligible = [], [], []
    for block in blocks:
        here = at[(at >= first) & (at < first + len(block.rows))] - first
        x.append(block.some(here))
        rows.append(block.rows[here])
        eligible.append(block.eligible[here])
        first += len(block.rows)
    every, numbers, mask = torch.cat(x), np.concatenate(rows), np.concatenate(eligible)
    cuts = range(0, max(1, len(numbers)), BLOCK_ROWS)
    return [Block(-1, every[c : c + BLOCK_ROWS], numbers[c : c + BLOCK_ROWS], mask[c : c + BLOCK_ROWS]) for c in cuts]


Call = tuple[Callable[..., Any], tuple[Any, ...], Callable[[Any, Any], Any] | None]
"""(function on a block, its other arguments, what combines two results or None)."""


def _run(blocks: list[Block], call: Call, asked: str, pool: ThreadPoolExecutor | None = None) -> Any:
    """Run a call on blocks; the list of results in their order, or their left fold. Products run in precision `asked`."""
    fn, args, combine = call

    def on(block: Block) -> Any:
        result = fn(block, *args)
        block.release()
        return result

    results: list[Any] = []
    with precision(asked):
        for result in pool.map(on, blocks) if pool else map(on, blocks):
            if combine and results:
                results[0] = combine(results[0], result)
            else:
                results.append(result)
    return results[0] if combine else results


Picked = list[tuple[Ints, torch.Tensor]]
"""(positions among the rows asked for, what was asked for) of the blocks that have some of them, one entry a block."""


def _pick_out(block: Block, rows: Ints) -> Picked:
    """Return all vectors of the asked rows that live in this block."""
    first, end = np.searchsorted(block.rows, rows), np.searchsorted(block.rows, rows, side="right")
    counts = end - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    here: Ints = np.repeat(np.arange(len(rows), dtype=np.int64), counts)
    return [(here, block.some(np.repeat(first, counts) + within).cpu())] if len(here) else []


def _predicted(block: Block, rows: Ints, name: str) -> Picked:
    """Return the predictions of the asked rows that live in this block."""
    here = np.flatnonzero(np.isin(rows, block.rows))
    return [(here, block.predicted(name, np.searchsorted(block.rows, rows[here])))] if len(here) else []


def take_predicted(shards: Shards, rows: Ints, name: str) -> torch.Tensor:
    """Return a model's predictions `name` for some pool rows in the order given, (m, c) float32; a vector an image."""
    found: Picked = shards.map(_predicted, rows, name, combine=operator.add)
    order = np.argsort(np.concatenate([here for here, _ in found]), kind="stable")
    return rows_at(torch.cat([values for _, values in found]), order)


def take_patterns(shards: Shards, rows: Ints) -> tuple[torch.Tensor, Ints]:
    """Return all vectors of some pool rows, image after image in the order given, and each one's position in `rows`.

    (m, d) float32 and (m,), ascending; m is len(rows) where an image has one vector. Raises InputError for a row
    without any.
    """
    found: Picked = shards.map(_pick_out, rows, combine=operator.add)
    owner = np.concatenate([np.empty(0, np.int64), *(here for here, _ in found)])
    order = np.argsort(owner, kind="stable")
    missing = len(rows) - len(np.unique(owner))
    if missing:
        raise InputError(f"{missing} of {len(rows)} rows have no vector")
    every = torch.cat([torch.empty((0, shards.d)), *(x for _, x in found)])
    return rows_at(every, order), owner[order]


def close(shards: Shards, ledger: Ledger) -> None:
    """Make ineligible, in the blocks, what a ledger allows no more; picks are left as they are."""
    if ledger.bound:
        shards.map(close_block, ledger.closing())


class LocalShards:
    """All blocks in this process, worked on by as many threads as torch has, each with a block of its own."""

    def __init__(self, blocks: list[Block], d: int, asked: str = "float32") -> None:
        self.blocks = blocks
        self.n = sum(len(block.rows) for block in blocks)
        self.d = d
        self.asked = asked
        threads = min(torch.get_num_threads(), len(blocks))
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) if threads > 1 else None

    def take(self, rows: Ints) -> torch.Tensor:
        return take_patterns(self, rows)[0]

    def restore(self) -> None:
        """Nothing can be lost here that this process would survive."""

    def map(
        self, fn: Callable[..., Any], *args: Any, combine: Callable[[Any, Any], Any] | None = None, at: Ints | None = None
    ) -> Any:
        return _run(self.blocks if at is None else _gather(self.blocks, 0, at), (fn, args, combine), self.asked, self.pool)

    def close(self) -> None:
        """End the threads."""
        if self.pool:
            self.pool.shutdown()


class _Shard:
    """The actor: a contiguous run of blocks."""

    def __init__(self, uri: str, indices: list[int], reading: Reading) -> None:
        torch.set_num_threads(1)
        store = FeatureStore(uri)
        self.blocks, self.asked = load_blocks(store, indices, reading), reading.precision
        self.first = sum(part_vectors(p) for p in store.manifest["parts"] if p["start"] < indices[0] * store.block_rows)

    def run(self, call: tuple[Any, ...]) -> Any:
        fn, args, combine, at = call
        blocks = self.blocks if at is None else _gather(self.blocks, self.first, at)
        return _run(blocks, (fn, args, combine), self.asked)

    def fold(self, combine: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
        return combine(a, b)

    def pid(self) -> int:
        return os.getpid()


def _share(of: int, workers: int) -> float:
    """Return what each of `workers` actors asks for of something that there is `of`, so that as many as must share one can.

    In hundredths: no remainder of it is left on any node.
    """
    return max(0.01, int(100 / max(1, -(-workers // max(1, of)))) / 100)


class RayShards:
    """Blocks on `workers` Ray actors, contiguous and as even as can be; results meet in a tree, not on the driver.

    The actors share `cpus` CPUs of the cluster, and its `gpus` where they work on CUDA. Those that find no room wait for it.
    """

    def __init__(self, store: FeatureStore, workers: int, cpus: int, reading: Reading, gpus: int = 0) -> None:
        self.n, self.d = store.num_patterns, store.dim if reading.vectors else 0
        self.uri, self.reading = store.place.absolute, reading
        workers = min(workers, store.num_blocks)
        self.runs = [run.tolist() for run in np.array_split(np.arange(store.num_blocks), workers)]
        self.shares = self._shares(cpus, gpus)
        self.has = session.size()
        self.actors = [self._start(run) for run in self.runs]
        self._settle()

    def _shares(self, cpus: int, gpus: int) -> tuple[float, float]:
        """Return the CPUs and GPUs that each actor asks for where there are so many."""
        workers = len(self.runs)
        return _share(cpus, workers), _share(gpus, workers) if self.reading.device == "cuda" else 0.0

    def _start(self, run: list[int]) -> Any:
        import ray

        num_cpus, num_gpus = self.shares
        return ray.remote(_Shard).options(num_cpus=num_cpus, num_gpus=num_gpus).remote(self.uri, run, self.reading)

    def _settle(self) -> None:
        """Wait until the actors have their places, for nodes that come, too.

        Where the cluster has become smaller and none says that it grows again, all are made again with smaller shares. What
        goes wrong in an actor is for those to find who call it.
        """
        import ray

        with session.waiting():
            waiting = [actor.pid.remote() for actor in self.actors]
            while waiting:
                _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=SETTLE_EVERY_S)
                had, self.has = self.has, session.size()
                lost = self.has.cpus < had.cpus or self.has.gpus < had.gpus
                if waiting and lost and self.has.cpus and (self.has.gpus or not self.shares[1]):
                    self.close()
                    self.shares = self._shares(self.has.cpus, self.has.gpus)
                    self.actors = [self._start(run) for run in self.runs]
                    waiting = [actor.pid.remote() for actor in self.actors]

    def take(self, rows: Ints) -> torch.Tensor:
        return take_patterns(self, rows)[0]

    def map(
        self, fn: Callable[..., Any], *args: Any, combine: Callable[[Any, Any], Any] | None = None, at: Ints | None = None
    ) -> Any:
        import ray

        call = ray.put((fn, args, combine, at))
        results = [actor.run.remote(call) for actor in self.actors]
        if combine is None:
            return [result for shard in self._get(results) for result in shard]
        folders = list(self.actors)
        while len(results) > 1:
            pairs = range(0, len(results) - 1, 2)
            odd = results[-1:] if len(results) % 2 else []
            results = [folders[i].fold.remote(combine, results[i], results[i + 1]) for i in pairs] + odd
            folders = folders[::2]
        return self._get(results[0])

    def _get(self, results: Any) -> Any:
        """Return results; raises LostShardError where an actor, or what it had made, is gone."""
        import ray
        from ray.exceptions import ObjectLostError, RayActorError

        try:
            return ray.get(results)
        except (RayActorError, ObjectLostError) as error:
            raise LostShardError(first_line(error)) from error

    def restore(self) -> None:
        """Start the actors that don't answer again, on any node; they read their blocks anew."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        for index, actor in enumerate(self.actors):
            try:
                ray.get(actor.pid.remote(), timeout=RESTORE_TIMEOUT_S)
            except (RayActorError, GetTimeoutError):
                ray.kill(actor)
                self.actors[index] = self._start(self.runs[index])
        self._settle()

    def close(self) -> None:
        """Give the actors' CPUs and memory back."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


def open_local(store: FeatureStore, reading: Reading) -> LocalShards:
    """Open a whole store in this process."""
    blocks = load_blocks(store, range(store.num_blocks), reading)
    return LocalShards(blocks, store.dim if reading.vectors else 0, reading.precision)


def from_array(
    x: npt.NDArray[np.float32],
    labels: Ints | None = None,
    block_rows: int = 8192,
    rows: Ints | None = None,
    predictions: dict[str, npt.NDArray[np.float32]] | None = None,
) -> LocalShards:
    """Return an array (n, d) as shards in this process, as it is (not normalised).

    `rows` (n,) are the vectors' pool rows, ascending, an image's several vectors under one row; 0..n-1 without them.
    `labels` and `predictions` (`Block.predictions`) are indexed by pool row.
    """
    numbers: Ints = np.arange(len(x), dtype=np.int64) if rows is None else rows
    last = int(numbers[-1]) if len(numbers) else 0
    blocks = []
    for index, start in enumerate(range(0, last + 1, block_rows)):
        low, high = np.searchsorted(numbers, [start, start + block_rows])
        part, mine = torch.from_numpy(np.array(x[low:high], dtype=np.float32)), numbers[low:high]
        columns = {} if labels is None else {"label": labels[mine]}
        block = Block(index, part, mine, np.ones(len(part), dtype=np.bool_), columns)
        block.predictions |= {name: torch.from_numpy(values[mine]) for name, values in (predictions or {}).items()}
        blocks.append(block)
    return LocalShards(blocks, x.shape[1])


def prepare(shards: Shards, excluded: Ints, terms: Terms | None = None) -> None:
    """Make shards ready for a fresh run: no state left, and `excluded` rows not eligible; the others are those of `terms`."""
    shards.map(reset_block, excluded, replace(terms, network=None) if terms else None)
