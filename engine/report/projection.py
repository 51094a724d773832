"""The pool in two dimensions, and in a few groups: of a seeded sample and the picks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.arrays import Ints
from engine.blocks import smallest
from engine.draws import random_keys
from engine.shards import Shards
from engine.store import FeatureStore

MAP_KEY = 31
COMPONENTS = 50
"""Principal components that t-SNE is given."""
PERPLEXITY = 30.0
GROUPS = 10
"""k-means clusters that the map's images are put into."""
SAID = {
    "tsne": "t-SNE (perplexity 30, from the first 50 principal components)",
    "pca": "the first two principal components",
}


@dataclass(frozen=True)
class Map:
    """Places (n, 2) of pool rows (n,) ascending, and the group of each, (n,), numbered by size from 0."""

    rows: Ints
    places: npt.NDArray[np.float64]
    groups: Ints


def sample_rows(store: FeatureStore, m: int, seed: int) -> Ints:
    """Return m pool rows that have a vector, or all, ascending: a function of (seed, row)."""
    _, rows = smallest(random_keys(seed, (MAP_KEY,), store.rows), store.rows, m)
    return np.sort(rows)


def _scaled(places: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return places moved to the middle and scaled so that the farthest coordinate is 1, to four decimals."""
    centred = places.astype(np.float64) - places.mean(axis=0)
    return np.asarray(np.round(centred / max(float(np.abs(centred).max(initial=0.0)), 1e-12), 4))


def project(x: npt.NDArray[np.float32], how: str, seed: int) -> npt.NDArray[np.float64]:
    """Return (n, 2) places of vectors (n, d), the same on every run: on one thread, as t-SNE's sums depend on their order."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(x) < 3 or float(np.ptp(x, axis=0).max(initial=0.0)) == 0:
        return np.stack([np.linspace(-1, 1, len(x)), np.zeros(len(x))], axis=1)
    with threadpool_limits(1):
        wanted = COMPONENTS if how == "tsne" else 2
        few = PCA(min(wanted, *x.shape), svd_solver="full", random_state=seed).fit_transform(x.astype(np.float64))
        if few.shape[1] < 2:
            few = np.concatenate([few, np.zeros((len(x), 1))], axis=1)
        if how == "pca" or len(x) < 6:
            return _scaled(few[:, :2])
        scale = few.std(axis=0)[0] or 1.0
        start = few[:, :2] / scale * 1e-4
        found = TSNE(2, perplexity=min(PERPLEXITY, (len(x) - 1) / 3), init=start, random_state=seed, learning_rate="auto")
        places: npt.NDArray[np.float32] = found.fit_transform(few)
        return _scaled(places)


def group(x: npt.NDArray[np.float32], seed: int) -> Ints:
    """Return the k-means cluster of each vector, (n,), the largest first: at most GROUPS, ten vectors each on average."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    k = min(GROUPS, max(1, len(x) // 10), len(np.unique(x, axis=0)))
    with threadpool_limits(1):
        found = KMeans(k, n_init=4, random_state=seed).fit_predict(x)
    order = np.argsort(-np.bincount(found, minlength=k), kind="stable")
    rank = np.empty(k, dtype=np.int64)
    rank[order] = np.arange(k)
    return np.asarray(rank[found], dtype=np.int64)


def map_of(shards: Shards, rows: Ints, how: str, seed: int) -> Map:
    """Return the map of some ascending pool rows."""
    x = shards.take(rows).numpy()
    return Map(rows, project(x, how, seed), group(x, seed))
