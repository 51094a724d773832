"""How much faster is batched core-set than one pick at a time, and are the picks the same?

    python benchmarks/bench_coreset.py [FEATURES] [--budget 1000] [--faiss-turns 21]

Rivals in the same run: one-at-a-time greedy in torch (a matrix-vector product a pick, float32), in float64 (the exact
reference, ten lines), and a loop that rebuilds a faiss index of the picks for every pick (timed at --faiss-turns sizes
of the index: its cost a pick only grows).
"""

from __future__ import annotations

import argparse
import json
import time

import faiss
import numpy as np
import torch
from data import load, machine

from engine.select.coreset import Options, coreset
from engine.shards import Request, prepare

NOTHING = np.empty(0, dtype=np.int64)


def exact(x: np.ndarray, first: int, budget: int) -> list[int]:
    wide = torch.from_numpy(x).double()
    nearest, picks = torch.full((len(x),), torch.inf, dtype=torch.float64), [first]
    while True:
        nearest = torch.minimum(nearest, ((wide - wide[picks[-1]]) ** 2).sum(dim=1))
        nearest[picks[-1]] = -1
        if len(picks) == budget:
            return picks
        picks.append(int(nearest.argmax()))


def greedy_float32(x: np.ndarray, first: int, budget: int) -> list[int]:
    pool = torch.from_numpy(x)
    squares = (pool * pool).sum(dim=1)
    nearest, picks = torch.full((len(x),), torch.inf), [first]
    while True:
        nearest = torch.minimum(nearest, squares + squares[picks[-1]] - 2 * (pool @ pool[picks[-1]]))
        if len(picks) == budget:
            return picks
        picks.append(int(nearest.argmax()))


def greedy_faiss(x: np.ndarray, picks: list[int], sizes: list[int]) -> tuple[float, float]:
    """Return the time of a loop that rebuilds a faiss index of the picks for every pick, and how often it picks the same.

    One turn of the loop at each of some sizes, the times between them by interpolation.
    """
    seconds, same = [], []
    for size in sizes:
        began = time.perf_counter()
        index = faiss.IndexFlatL2(x.shape[1])
        index.add(x[picks[:size]])
        distance, _ = index.search(x, 1)
        chosen = int(distance[:, 0].argmax())
        seconds.append(time.perf_counter() - began)
        same.append(chosen == picks[size])
    every = np.arange(1, len(picks))
    return float(np.interp(every, sizes, seconds).sum()), float(np.mean(same))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", nargs="?")
    parser.add_argument("--budget", type=int, default=500)
    parser.add_argument("--faiss-turns", type=int, default=21)
    options = parser.parse_args()
    x, shards = load(options.features)
    print(f"{len(x)} x {x.shape[1]}, {options.budget} picks, {machine()}")
    prepare(shards, NOTHING)
    began = time.perf_counter()
    *_, last = coreset(shards, Request(options.budget, 0, NOTHING), Options())
    ours_s = time.perf_counter() - began
    picks, first = last.picks.tolist(), int(last.picks[0])
    rows = [("coresift", ours_s, 1.0)]
    began = time.perf_counter()
    loose = greedy_float32(x, first, options.budget)
    rows.append(("torch, float32, one at a time", time.perf_counter() - began, float(np.mean(np.array(loose) == last.picks))))
    began = time.perf_counter()
    reference = exact(x, first, options.budget)
    rows.append(("float64, one at a time", time.perf_counter() - began, float(np.mean(np.array(reference) == last.picks))))
    sizes = np.unique(np.linspace(1, options.budget - 1, options.faiss_turns).astype(int)).tolist()
    faiss_s, agree = greedy_faiss(x, picks, sizes)
    rows.append((f"faiss index for every pick ({len(sizes)} turns, interpolated)", faiss_s, agree))
    print(f"{'':<52}{'seconds':>9}{'/ ours':>8}{'same picks':>12}")
    for name, seconds, share in rows:
        print(f"{name:<52}{seconds:>9.2f}{seconds / ours_s:>8.1f}{share:>11.1%}")
    print(f"rounds: {last.note}; identical to the float64 reference: {picks == reference}")
    print(
        json.dumps(
            {
                "rows": [{"method": n, "s": s, "ratio": s / ours_s, "same": q} for n, s, q in rows],
                "identical": picks == reference,
                "rounds": last.note,
                "machine": machine(),
            },
            sort_keys=True,
        )
    )


if __name__ == "__main__":
    main()
