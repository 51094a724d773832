"""The feature matrix wherever it lives: in this process, or on Ray actors. A method can't tell which.

The only file of select that knows Ray. Blocks are the unit of work and of rounding, and results are combined by
associative functions, so the number of shards never shows in a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.blocks import Block, Floats, Ints, normalize
from engine.schema import InputError
from engine.store import FeatureStore, labels_numpy, vectors_numpy

MEMORY_SHARE = 0.5
"""Share of this machine's free memory that features may take before they go to the cluster."""


@dataclass(frozen=True)
class Request:
    """What a method is asked for: `budget` new rows, given the rows labelled already (ascending pool rows)."""

    budget: int
    seed: int
    labeled: Ints


@dataclass(frozen=True)
class Step:
    """What a method yields after each round: where it is, and the picks so far, in pick order.

    `gains` says what each pick added, in the method's own measure (NaN where it has none); `columns` are the
    method's own columns of picks.parquet. The last step holds all picks.
    """

    number: int
    total: int
    picks: Ints
    gains: Floats
    note: str = ""
    objective: float | None = None
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


class Shards(Protocol):
    """n vectors of d floats in blocks, on which functions are run."""

    n: int
    d: int

    def take(self, rows: Ints) -> torch.Tensor:
        """Return the vectors of some pool rows in the order given, (m, d) float32."""

    def map(self, fn: Callable[..., Any], *args: Any, combine: Callable[[Any, Any], Any] | None = None) -> Any:
        """Run fn(block, *args) on every block.

        Returns the results in block order, or, with an associative `combine`, folded over the blocks of each shard
        and then in a tree over the shards.
        """


def load_block(store: FeatureStore, index: int, normalized: bool, columns: Iterable[str]) -> Block:
    """Read one block of a store into memory as float32."""
    table = store.read_block(index, ["row", store.column, *columns])
    x = torch.from_numpy(vectors_numpy(table[store.column]).astype(np.float32))
    extra = {name: labels_numpy(table[name]) for name in columns}
    rows = np.array(table["row"].to_numpy(), dtype=np.int64)
    return Block(index, normalize(x) if normalized else x, rows, np.ones(len(rows), dtype=np.bool_), extra)


def _run(blocks: list[Block], fn: Callable[..., Any], args: tuple[Any, ...], combine: Callable[[Any, Any], Any] | None) -> Any:
    """Run fn over blocks; the list of results, or their left fold."""
    if combine is None:
        return [fn(block, *args) for block in blocks]
    folded = fn(blocks[0], *args)
    for block in blocks[1:]:
        folded = combine(folded, fn(block, *args))
    return folded


def _pick_out(block: Block, rows: Ints) -> tuple[Ints, torch.Tensor]:
    """Return (positions in `rows`, their vectors) of the asked rows that live in this block."""
    at = np.searchsorted(block.rows, rows)
    at[at == len(block.rows)] = 0
    here = np.flatnonzero(block.rows[at] == rows) if len(block.rows) else np.empty(0, dtype=np.int64)
    return here, block.x[torch.from_numpy(at[here])]


def _assemble(shards: Shards, rows: Ints) -> torch.Tensor:
    out = torch.empty((len(rows), shards.d), dtype=torch.float32)
    found = 0
    for here, x in shards.map(_pick_out, rows):
        out[torch.from_numpy(here)] = x
        found += len(here)
    if found != len(rows):
        raise InputError(f"{len(rows) - found} of {len(rows)} rows have no vector")
    return out


def _reset(block: Block, excluded: Ints) -> None:
    block.state.clear()
    block.eligible = ~np.isin(block.rows, excluded)


def _first_bad(block: Block) -> int:
    """Return the first row of the block whose vector is not finite, or -1."""
    bad = ~torch.isfinite(block.x).all(dim=1).numpy()
    return int(block.rows[bad][0]) if bad.any() else -1


class LocalShards:
    """All blocks in this process."""

    def __init__(self, blocks: list[Block], d: int) -> None:
        self.blocks = blocks
        self.n = sum(len(block.rows) for block in blocks)
        self.d = d

    def take(self, rows: Ints) -> torch.Tensor:
        return _assemble(self, rows)

    def map(self, fn: Callable[..., Any], *args: Any, combine: Callable[[Any, Any], Any] | None = None) -> Any:
        return _run(self.blocks, fn, args, combine)


class _Shard:
    """The actor: a contiguous run of blocks."""

    def __init__(self, uri: str, indices: list[int], normalized: bool, columns: list[str]) -> None:
        torch.set_num_threads(1)
        store = FeatureStore(uri)
        self.blocks = [load_block(store, index, normalized, columns) for index in indices]

    def run(self, call: tuple[Any, ...]) -> Any:
        fn, args, combine = call
        return _run(self.blocks, fn, args, combine)

    def fold(self, combine: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
        return combine(a, b)


class RayShards:
    """Blocks on `workers` Ray actors, contiguous and as even as can be; results meet in a tree, not on the driver."""

    def __init__(self, store: FeatureStore, workers: int, cpus: int, normalized: bool, columns: list[str]) -> None:
        import ray

        self.n, self.d = store.num_vectors, store.dim
        workers = min(workers, store.num_blocks)
        share = 1.0 if workers <= cpus else int(100 * cpus / workers) / 100
        actor = ray.remote(_Shard).options(num_cpus=max(share, 0.01))
        runs = [run.tolist() for run in np.array_split(np.arange(store.num_blocks), workers)]
        self.actors = [actor.remote(store.place.absolute, run, normalized, columns) for run in runs]

    def take(self, rows: Ints) -> torch.Tensor:
        return _assemble(self, rows)

    def map(self, fn: Callable[..., Any], *args: Any, combine: Callable[[Any, Any], Any] | None = None) -> Any:
        import ray

        call = ray.put((fn, args, combine))
        results = [actor.run.remote(call) for actor in self.actors]
        if combine is None:
            return [result for shard in ray.get(results) for result in shard]
        folders = list(self.actors)
        while len(results) > 1:
            pairs = range(0, len(results) - 1, 2)
            odd = results[-1:] if len(results) % 2 else []
            results = [folders[i].fold.remote(combine, results[i], results[i + 1]) for i in pairs] + odd
            folders = folders[::2]
        return ray.get(results[0])

    def close(self) -> None:
        """Give the actors' CPUs and memory back."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


def fits(store: FeatureStore) -> bool:
    """Return whether the features, as float32, take less than half of this machine's free memory."""
    import psutil

    return bool(4 * store.num_vectors * store.dim < MEMORY_SHARE * psutil.virtual_memory().available)


def open_local(store: FeatureStore, normalized: bool, columns: Iterable[str]) -> LocalShards:
    """Read a whole store into this process."""
    names = list(columns)
    return LocalShards([load_block(store, index, normalized, names) for index in range(store.num_blocks)], store.dim)


def from_array(x: npt.NDArray[np.float32], labels: Ints | None = None, block_rows: int = 8192) -> LocalShards:
    """Return an array (n, d) as shards in this process, rows 0..n-1, as it is (not normalised)."""
    blocks = []
    for index, start in enumerate(range(0, max(len(x), 1), block_rows)):
        part = torch.from_numpy(np.array(x[start : start + block_rows], dtype=np.float32))
        rows = np.arange(start, start + len(part), dtype=np.int64)
        columns = {} if labels is None else {"label": labels[start : start + len(part)]}
        blocks.append(Block(index, part, rows, np.ones(len(part), dtype=np.bool_), columns))
    return LocalShards(blocks, x.shape[1])


def prepare(shards: Shards, excluded: Ints) -> None:
    """Make shards ready for a fresh run: no state left, and `excluded` rows not eligible."""
    shards.map(_reset, excluded)


def check_finite(shards: Shards, uri: str) -> None:
    """Raise InputError naming the first row whose vector has a NaN or an infinity."""
    bad = [row for row in shards.map(_first_bad) if row >= 0]
    if bad:
        raise InputError(f"{uri}: the vector of row {bad[0]} holds a NaN or an infinity: embed or import it again")
