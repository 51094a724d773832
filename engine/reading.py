"""How a store's blocks come into memory: vectors held or read on every use, normalised or not, with what goes with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.blocks import Block
from engine.canonical import canonical_norms, normalize
from engine.schema import InputError
from engine.store import DETECTIONS, PROBS, SCORES, FeatureStore, labels_numpy, part_vectors, vector_counts, vectors_numpy

PREDICTED = {PROBS: "probs", DETECTIONS: "score"} | {name: name for name in SCORES}
"""The columns of a store that hold what a model gave, and what a block calls what it reads of them."""


@dataclass(frozen=True)
class Reading:
    """How a store is read, and where its vectors are worked on.

    Normalised or not, with which columns; how many bytes of vectors a shard may hold; on which torch device, and in which
    precision products are taken there (`products.precision`). `predictions` is the store, it may be the same, of what a
    model gave for the images; without `vectors` a block's have no floats, (r, 0), and nothing is held.
    """

    normalized: bool
    columns: tuple[str, ...] = ()
    memory_bytes: float = np.inf
    device: str = "cpu"
    precision: str = "float32"
    predictions: str | None = None
    vectors: bool = True


class StoredVectors:
    """The vectors of one block, read from its store's mapped files on every use; only their norms stay."""

    def __init__(self, store: FeatureStore, index: int, normalized: bool, device: str) -> None:
        self.store, self.index, self.normalized, self.device = store, index, normalized, device
        self.norms: Floats | None = None

    def read(self, at: Ints | None = None) -> torch.Tensor:
        """Return the vectors at some places, or all, (m, d) float32, on the device."""
        stored = vectors_numpy(self.store.read_block(self.index, [self.store.column])[self.store.column])
        some = stored.copy() if at is None else stored[at]
        x = torch.from_numpy(some).to(self.device).float()  # torch's conversion takes a tenth of numpy's time
        if not self.normalized:
            return x
        if at is not None:
            return normalize(x)
        if self.norms is None:
            self.norms = canonical_norms(x)
        return normalize(x, self.norms)


class StoredPredictions:
    """What a model gave for some pool rows (r,), read from its store's mapped files on every use.

    (r, classes) probabilities, or (r, k) scores of the boxes, NaN beyond an image's last one, or (r, 1), NaN for an image
    that has no score; float32, in the host's memory.
    """

    def __init__(self, store: FeatureStore, rows: Ints) -> None:
        self.store, self.rows = store, rows

    def read(self, at: Ints | None = None) -> torch.Tensor:
        """Return the predictions at some places, or all."""
        rows = self.rows if at is None else self.rows[at]
        return torch.from_numpy(self.store.scores(rows) if self.store.column == DETECTIONS else self.store.vectors(rows))


def load_block(store: FeatureStore, index: int, reading: Reading, predictions: FeatureStore | None, held: bool) -> Block:
    """Return one block of a store; vectors and predictions as float32 in memory (`held`), or read on every use."""
    several = store.vectors_per_image > 1 and reading.vectors
    table = store.read_block(index, ["row", *reading.columns, *([store.column] if several else [])])
    rows = np.array(table["row"].to_numpy(), dtype=np.int64)
    columns = {name: labels_numpy(table[name]) for name in reading.columns}
    if several:
        counts = vector_counts(table[store.column])
        rows, columns = np.repeat(rows, counts), {name: np.repeat(values, counts) for name, values in columns.items()}
    data: torch.Tensor | StoredVectors = torch.empty((len(rows), 0), device=reading.device)
    if reading.vectors:
        stored = StoredVectors(store, index, reading.normalized, reading.device)
        data = stored.read() if held else stored
    block = Block(index, data, rows, np.ones(len(rows), dtype=np.bool_), columns)
    if predictions is not None:
        given = StoredPredictions(predictions, rows)
        block.predictions[PREDICTED[predictions.column]] = given.read() if held else given
    return block


def size_bytes(store: FeatureStore, parts: list[dict[str, Any]] | None = None) -> int:
    """Return what a store's vectors or boxes, or those of some of its parts, take as float32."""
    given = store.manifest["parts"] if parts is None else parts
    return 4 * store.dim * sum(int(part.get("num_detections", part_vectors(part))) for part in given)


def load_blocks(store: FeatureStore, indices: Iterable[int], reading: Reading) -> list[Block]:
    """Return blocks of a store: their vectors in memory if they fit the reading's budget, else read on every use."""
    numbers = list(indices)
    predictions = FeatureStore(reading.predictions) if reading.predictions else None
    low, high = numbers[0] * store.block_rows, (numbers[-1] + 1) * store.block_rows
    size = 0
    for of in (store, predictions) if predictions else (store,):
        size += size_bytes(of, [part for part in of.manifest["parts"] if low <= part["start"] < high])
    room = min(reading.memory_bytes, torch.cuda.mem_get_info()[0] / 2) if reading.device == "cuda" else reading.memory_bytes
    held = reading.vectors and size <= room
    return [load_block(store, index, reading, predictions, held) for index in numbers]


def check_same_pool(store: FeatureStore, given: FeatureStore) -> None:
    """Raise InputError where predictions are of another pool than the features, or lack one of their rows."""
    of, other = (s.manifest["inputs"].get("pool", {}).get("digest") for s in (store, given))
    what = f"--predictions {given.place.uri} and {store.place.uri} are not of the same pool"
    if of and other and of != other:
        raise InputError(f"{what}: they were made from other images; predict the pool that was embedded")
    lacking = store.rows[~np.isin(store.rows, given.rows)]
    if len(lacking):
        raise InputError(f"{what}: {len(lacking)} rows have features and no predictions, the first is {lacking[0]}")
    for index in range(store.num_blocks):
        table = store.read_block(index, ["row", "id"])
        if index < given.num_blocks and table.equals(given.read_block(index, ["row", "id"])):
            continue
        rows = table["row"].to_numpy()
        for row, mine, theirs in zip(rows, table["id"].to_pylist(), given.ids(rows), strict=True):
            if mine != theirs:
                raise InputError(f"{what}: row {row} has the id {mine!r} in the features and {theirs!r} there")
