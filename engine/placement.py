"""Where a store's vectors are worked on: in this process or on actors, on a CPU or a GPU, in how much memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from engine import session
from engine.checks import check_finite, check_predictions
from engine.reading import Reading, size_bytes
from engine.schema import InputError, parse_bytes
from engine.shards import LocalShards, RayShards, Shards, open_local
from engine.store import FeatureStore

MEMORY_SHARE = 0.5
"""Share of the free memory that vectors may take: before they go to the cluster, and before they are streamed."""


def free_bytes(device: str = "cpu") -> float:
    """Return this machine's free memory, or that of its GPU."""
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    import psutil

    return float(psutil.virtual_memory().available)


def fits(*stores: FeatureStore | None) -> bool:
    """Return whether the features of some stores, as float32, take less than half of this machine's free memory."""
    return sum(size_bytes(store) for store in stores if store) < MEMORY_SHARE * free_bytes()


def _device(asked: str, there: int, where: str) -> str:
    """Return the torch device to work on, given the number of GPUs there; raises InputError for a GPU that is not."""
    if asked == "cuda" and not there:
        raise InputError(f"--device 'cuda': {where} has no CUDA device that torch can use; pass auto or cpu")
    return "cuda" if there and asked != "cpu" else "cpu"


def _on_cluster(asked: str, workers: int | None) -> tuple[str, int, session.Size]:
    """Return (device, workers, what they share) on the connected cluster; raises InputError for a GPU that can't be there.

    Where nothing is up yet and nobody says what can be, each worker is meant to have a CPU, or GPU, of its own.
    """
    most, up = session.most(), session.now()
    has = most or up
    coming = most is None and not up.cpus
    device = asked if coming and asked == "cuda" else _device(asked, has.gpus, "the cluster")
    workers = workers or (has.gpus if device == "cuda" else has.cpus) or 1
    return device, workers, session.Size(has.cpus or workers, has.gpus or workers)


@contextlib.contextmanager
def open_shards(
    store: FeatureStore,
    options: Any,
    normalized: bool,
    columns: tuple[str, ...],
    predictions: FeatureStore | None = None,
    vectors: bool = True,
) -> Iterator[Shards]:
    """Open the store's vectors as shards, and close them at the end of the block, whatever ends it.

    `predictions` is the store of what a model gave for the same images; without `vectors` it is all that is read.

    `options` has `workers`, `address`, `memory_per_shard`, `device`, `precision`. In this process for `workers` 0, or None
    when the vectors fit its memory; else on Ray actors, by default one a GPU, or one a CPU. Raises InputError when a vector
    is not finite, predictions can't be, or the device is not there.
    """
    limit = parse_bytes(options.memory_per_shard)
    shards: LocalShards | RayShards
    aside = predictions.place.absolute if predictions else None
    if options.workers == 0 or (options.workers is None and fits(store if vectors else None, predictions)):
        import torch

        device = _device(options.device, torch.cuda.device_count() if torch.cuda.is_available() else 0, "this machine")
        share = MEMORY_SHARE * free_bytes(device)
        shards = open_local(store, Reading(normalized, columns, limit or share, device, options.precision, aside, vectors))
    else:
        session.connect(options.address)
        device, workers, has = _on_cluster(options.device, options.workers)
        share = MEMORY_SHARE * free_bytes() / min(workers, has.cpus)
        reading = Reading(normalized, columns, limit or share, device, options.precision, aside, vectors)
        shards = RayShards(store, workers, has.cpus, reading, has.gpus)
    try:
        check_finite(shards, store.place.uri)
        if predictions:
            check_predictions(shards, predictions.place.uri)
        yield shards
    finally:
        shards.close()
