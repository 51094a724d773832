"""How many rounds does D^2 seeding by rejection take, and how much faster is it than drawing one row at a time?

    python benchmarks/bench_seeding.py [FEATURES] [--k 1000] [--seeds 3]

The rival, in the same run with the same threads: a matrix-vector product in float32, a minimum, a cumulative sum and a
draw for every centre. Both sample the same distribution; quality is the potential, the sum of squared distances to the
nearest seed (mean over the seeds).
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from data import inertia, load, machine

from engine.select.seeding import d2_seeds
from engine.shards import prepare

NOTHING = np.empty(0, dtype=np.int64)


def one_at_a_time(x: torch.Tensor, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    squares, picks = (x * x).sum(dim=1), [int(rng.integers(len(x)))]
    nearest = torch.full((len(x),), torch.inf)
    while True:
        latest = picks[-1]
        nearest = torch.minimum(nearest, (squares + squares[latest] - 2 * (x @ x[latest])).clamp_(min=0))
        if len(picks) == k:
            return np.array(picks)
        mass = nearest.double().cumsum(0)
        picks.append(int(torch.searchsorted(mass, rng.random() * mass[-1].item(), right=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", nargs="?")
    parser.add_argument("--k", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    x, shards = load(options.features)
    pool = torch.from_numpy(x)
    print(f"{len(x)} x {x.shape[1]}, k = {options.k}, {machine()}")
    found: dict[str, list[tuple[float, float]]] = {"coresift": [], "one at a time": []}
    rounds = []
    for seed in range(options.seeds):
        prepare(shards, NOTHING)
        began = time.perf_counter()
        picks, number = d2_seeds(shards, options.k, seed, (0,))
        found["coresift"].append((time.perf_counter() - began, inertia(shards, x[picks])))
        rounds.append(number)
        began = time.perf_counter()
        picks = one_at_a_time(pool, options.k, seed)
        found["one at a time"].append((time.perf_counter() - began, inertia(shards, x[picks])))
    means = {name: np.array(values).mean(axis=0) for name, values in found.items()}
    for name, (seconds, value) in means.items():
        print(f"{name:<16}{seconds:>8.2f} s   potential {value:.1f}")
    ratio = means["one at a time"][0] / means["coresift"][0]
    print(f"{ratio:.1f} times as fast, in {rounds} rounds; the first assignment of k-means comes with it")
    print(json.dumps({"s": {n: v[0] for n, v in means.items()}, "rounds": rounds, "ratio": ratio, "machine": machine()}))


if __name__ == "__main__":
    main()
