"""Is `kmeans` as good and as fast as faiss.Kmeans and scikit-learn's KMeans?

    python benchmarks/bench_kmeans.py [FEATURES] [--k 100,1000] [--iterations 20]

Same vectors, same k, the same number of Lloyd steps, one start each, no subsampling, all threads. Every inertia is
computed here, in float64, from the centres that each ended with. Our time is the whole method: seeding, steps, the
exact final assignment and the picks; theirs is fit/train.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import faiss
import numpy as np
from data import load, machine
from sklearn.cluster import KMeans

from engine.select.kmeans import Options, kmeans
from engine.shards import LocalShards, Request, prepare

NOTHING = np.empty(0, dtype=np.int64)


def inertia(x: np.ndarray, centres: np.ndarray) -> float:
    """Return the sum of squared distances to the nearest centre, in float64, a chunk at a time."""
    wide, total = centres.astype(np.float64), 0.0
    squares = (wide**2).sum(axis=1)
    for start in range(0, len(x), 4096):
        part = x[start : start + 4096].astype(np.float64)
        total += float(((part**2).sum(axis=1) + (squares - 2 * part @ wide.T).min(axis=1)).sum())
    return total


def ours(shards: LocalShards, k: int, iterations: int, seeding: str) -> float:
    prepare(shards, NOTHING)
    options = Options(restarts=1, iterations=iterations, seeding=seeding)
    *_, last = kmeans(shards, Request(k, 0, NOTHING), options)
    return float(last.objective or 0)


def theirs_faiss(x: np.ndarray, k: int, iterations: int) -> float:
    model = faiss.Kmeans(x.shape[1], k, niter=iterations, nredo=1, seed=0, max_points_per_centroid=10**9)
    model.train(x)
    return inertia(x, model.centroids)


def theirs_sklearn(x: np.ndarray, k: int, iterations: int) -> float:
    model = KMeans(k, init="k-means++", n_init=1, max_iter=iterations, tol=0.0, random_state=0, algorithm="lloyd")
    return inertia(x, model.fit(x).cluster_centers_)


def timed(run: Callable[[], float]) -> tuple[float, float]:
    began = time.perf_counter()
    value = run()
    return time.perf_counter() - began, value


def main() -> None:
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    warnings.simplefilter("ignore", ConvergenceWarning)  # twenty steps are the point
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", nargs="?")
    parser.add_argument("--k", default="100,1000")
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args()
    x, shards = load(options.features)
    print(f"{len(x)} x {x.shape[1]}, {options.iterations} steps, {machine()}")
    print(f"{'k':>6} {'method':<28}{'seconds':>9}{'/ faiss':>9}{'inertia':>14}{'/ faiss':>9}")
    results = []
    for k in (int(part) for part in options.k.split(",")):
        faiss_s, faiss_inertia = timed(lambda k=k: theirs_faiss(x, k, options.iterations))
        runs = {
            "faiss.Kmeans": (faiss_s, faiss_inertia),
            "coresift, d2 seeding": timed(lambda k=k: ours(shards, k, options.iterations, "d2")),
            "coresift, random seeding": timed(lambda k=k: ours(shards, k, options.iterations, "random")),
            "scikit-learn, k-means++": timed(lambda k=k: theirs_sklearn(x, k, options.iterations)),
        }
        for name, (seconds, value) in runs.items():
            ratios = seconds / faiss_s, value / faiss_inertia
            print(f"{k:>6} {name:<28}{seconds:>9.2f}{ratios[0]:>9.2f}{value:>14.2f}{ratios[1]:>9.4f}", flush=True)
            results.append(
                {"k": k, "method": name, "s": seconds, "inertia": value, "s_ratio": ratios[0], "inertia_ratio": ratios[1]}
            )
    print(json.dumps({"results": results, "machine": machine()}, sort_keys=True))


if __name__ == "__main__":
    main()
