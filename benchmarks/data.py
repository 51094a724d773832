"""Vectors for the benchmarks: a feature store of the user's, or a made-up pool with clusters."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from engine.nearest import nearest_sqdist
from engine.reading import Reading, load_blocks
from engine.shards import LocalShards, from_array
from engine.store import FeatureStore


def clustered(n: int, d: int, seed: int = 0, spread: float = 0.7) -> np.ndarray:
    """Return n normalised vectors around 200 centres of unequal weight."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((200, d)).astype(np.float32)
    weights = rng.dirichlet(np.full(200, 0.8))
    x = centres[rng.choice(200, n, p=weights)] + spread * rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def inertia(shards: LocalShards, centres: np.ndarray) -> float:
    """Return the sum of squared distances to the nearest centre, each in float64."""
    at = torch.from_numpy(np.ascontiguousarray(centres, dtype=np.float32))
    return float(sum(shards.map(lambda block: nearest_sqdist(block.x, at)[1].sum())))


def load(uri: str | None, n: int = 20_000, d: int = 128, rows: int | None = None) -> tuple[np.ndarray, LocalShards]:
    """Return (vectors, shards) of a store, normalised, or its first `rows` in whole blocks; or of a made-up pool."""
    if uri is None:
        x = clustered(n, d)
        return x, from_array(x)
    store = FeatureStore(uri)
    blocks = store.num_blocks if rows is None else min(store.num_blocks, rows // store.block_rows)
    shards = LocalShards(load_blocks(store, range(blocks), Reading(True)), store.dim)
    return np.concatenate([block.x.numpy() for block in shards.blocks]), shards


def machine() -> dict[str, str | int]:
    """Return what a result must be read with: processor, CPUs, versions."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "faiss-gpu", "scikit-learn", "ray")}
    return {"cpu": names[0] if names else platform.machine(), "cpus": len(os.sched_getaffinity(0)), **versions}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else subprocess.run(["uname", "-m"], text=True).stdout.split()
