"""Whitened vectors, whose cosine tells copies of an image from images of the same kind (Jegou & Chum, ECCV 2012)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.arrays import Floats, Ints
from engine.canonical import single_thread
from engine.draws import random_keys
from engine.shards import Shards

SAMPLE_ROWS = 8192
"""Vectors whose mean and covariance stand for the pool's."""
MOST_DIMS = 256
ROWS_PER_DIM = 16
"""Vectors of the sample for each dimension kept: fewer would be fitted one by one."""
LEAST_DIMS = 16
"""With fewer, vectors of other images agree by chance, so that nothing is said of them: all cosines are 0."""
LEAST_VARIANCE = 1e-6
"""Of the largest; directions with less are noise."""
SEED_KEY = (2012,)
PAIRS = 4096
"""Pairs that are compared at a time."""

Whiten = Callable[[torch.Tensor], torch.Tensor]
"""(m, d) float32 -> (m, k) float64 of length 1, or 0."""
Cosines = Callable[[Ints, Ints], Floats]
"""(pool rows, pool rows that they are compared with) -> the cosine of each pair."""


def whitening(shards: Shards, rows: Ints, seed: int) -> Whiten:
    """Return what whitens vectors, by a seeded sample of `rows`.

    They are centred, and projected to the k directions of largest variance, each scaled to variance 1.
    """
    sample = np.sort(rows[np.argsort(random_keys(seed, SEED_KEY, rows), kind="stable")[:SAMPLE_ROWS]])
    x = shards.take(sample).double()
    with single_thread():
        mean = x.mean(dim=0)
        centred = x - mean
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(x))
    dims = min(MOST_DIMS, x.shape[1], len(x) // ROWS_PER_DIM)
    if dims < LEAST_DIMS:
        return lambda vectors: torch.zeros((len(vectors), 1), dtype=torch.float64)
    kept = variance[-dims:] > LEAST_VARIANCE * variance[-1]
    scaled = directions[:, -dims:][:, kept] / variance[-dims:][kept].sqrt()
    return lambda vectors: torch.nn.functional.normalize((vectors.double() - mean) @ scaled)


def whitened_cosines(shards: Shards, others: Shards, whiten: Whiten) -> Cosines:
    """Return what measures the cosines of whitened vectors of rows of `shards` and rows of `others`, pair by pair."""

    def cosines(rows: Ints, with_rows: Ints) -> Floats:
        out = np.empty(len(rows))
        for start in range(0, len(rows), PAIRS):
            piece = slice(start, start + PAIRS)
            sides = []
            for of, wanted in ((shards, rows[piece]), (others, with_rows[piece])):
                some, back = np.unique(wanted, return_inverse=True)
                with single_thread():
                    sides.append(whiten(of.take(some)).numpy()[back])
            out[piece] = (sides[0] * sides[1]).sum(axis=1)
        return out

    return cosines
