"""How long does `kmeans` take to where faiss.Kmeans ends, and how good is its end beside faiss's and scikit-learn's?

    python benchmarks/bench_kmeans.py [FEATURES] [--k 100,1000] [--iterations 20] [--neighbors 20] [--rivals faiss,sklearn]
        [--rows 1000000] [--modes d2,random]

Same vectors, same k, the same number of Lloyd steps, one start each, no subsampling, all threads. `reached` is when a
step of ours first has an inertia no higher than the first rival's last one, D^2 seeding included; `seconds` is the whole
method, with the exact last assignment and the picks (fit/train for the rivals). Inertias at the end are computed here, in
float64, from the centres each ended with. With --neighbors, the approximate mode too; `near` is when that first has an
inertia at most 0.5 % above the first rival's.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import faiss
import numpy as np
from data import inertia, load, machine
from sklearn.cluster import KMeans

from engine.select.kmeans import Options, kmeans
from engine.shards import LocalShards, Request, prepare

NOTHING = np.empty(0, dtype=np.int64)


def ours(shards: LocalShards, k: int, options: Options, goal: float) -> dict[str, float]:
    """Run `kmeans`; return its time, when it reached the goal and came within 0.5 % of it (nan: never), its inertia."""
    prepare(shards, NOTHING)
    began, reached, near = time.perf_counter(), np.nan, np.nan
    for step in kmeans(shards, Request(k, 0, NOTHING), options):
        now, value = time.perf_counter() - began, step.objective or np.inf
        reached = now if np.isnan(reached) and value <= goal else reached
        near = now if np.isnan(near) and value <= 1.005 * goal else near
    seconds = time.perf_counter() - began
    return {"s": seconds, "reached_s": reached, "near_s": near, "inertia": float(step.objective or 0)}


def theirs_faiss(x: np.ndarray, k: int, iterations: int) -> np.ndarray:
    model = faiss.Kmeans(x.shape[1], k, niter=iterations, nredo=1, seed=0, max_points_per_centroid=10**9)
    model.train(x)
    return np.asarray(model.centroids)


def theirs_sklearn(x: np.ndarray, k: int, iterations: int) -> np.ndarray:
    model = KMeans(k, init="k-means++", n_init=1, max_iter=iterations, tol=0.0, random_state=0, algorithm="lloyd")
    return np.asarray(model.fit(x).cluster_centers_)


RIVALS = {"faiss": theirs_faiss, "sklearn": theirs_sklearn}


def tell(k: int, name: str, runs: dict[str, dict[str, float]]) -> None:
    """Print the line of one run, beside the first one."""
    first, run = next(iter(runs.values())), runs[name]
    reached = run.get("reached_s", run["s"])
    there = "its inertia not reached" if np.isnan(reached) else f"{first['s'] / reached:.2f} to its inertia"
    times = f"{first['s'] / run['s']:.2f} x as fast, {there}"
    print(f"{k:>6} {name:<28}{run['s']:>9.2f}{reached:>9.2f}{run.get('near_s', run['s']):>9.2f}", end="")
    print(f"{run['inertia']:>14.2f}   {times}, inertia {run['inertia'] / first['inertia']:.4f}", flush=True)


def main() -> None:
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    warnings.simplefilter("ignore", ConvergenceWarning)  # twenty steps are the point
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", nargs="?")
    parser.add_argument("--k", default="100,1000")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--neighbors", type=int)
    parser.add_argument("--rows", type=int, help="of the store, the first so many, in whole blocks")
    parser.add_argument("--modes", default="d2,random")
    parser.add_argument("--rivals", default="faiss,sklearn")
    given = parser.parse_args()
    x, shards = load(given.features, rows=given.rows)
    print(f"{len(x)} x {x.shape[1]}, {given.iterations} steps, {machine()}")
    print(f"{'k':>6} {'method':<28}{'seconds':>9}{'reached':>9}{'near':>9}{'inertia':>14}   beside the first of k", flush=True)
    results = []
    for k in (int(part) for part in given.k.split(",")):
        runs: dict[str, dict[str, float]] = {}
        for name in filter(None, given.rivals.split(",")):
            began = time.perf_counter()
            centres = RIVALS[name](x, k, given.iterations)
            seconds = time.perf_counter() - began
            runs[name] = {"s": seconds, "inertia": inertia(shards, centres)}
            tell(k, name, runs)
        goal = next((run["inertia"] for run in runs.values()), 0.0)
        exact = Options(restarts=1, iterations=given.iterations)
        modes = {f"{name} seeding": replace(exact, seeding=name) for name in filter(None, given.modes.split(","))}
        if given.neighbors:
            modes[f"neighbors={given.neighbors}"] = replace(exact, neighbors=given.neighbors)
        for name, options in modes.items():
            runs[f"coresift, {name}"] = ours(shards, k, options, goal)
            tell(k, f"coresift, {name}", runs)
        results += [{"k": k, "method": name, **run} for name, run in runs.items()]
    print(json.dumps({"results": results, "machine": machine()}, sort_keys=True))


if __name__ == "__main__":
    main()
