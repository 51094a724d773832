"""Do the images that `freesel` picks cover a pool's patterns better than random ones?

    python benchmarks/bench_freesel.py [POOL] [--weights FILE] [--backbone mobilenetv2_100] [--budgets 10,30] [--seeds 5]

Embeds the pool with the `patterns` encoder, picks, and measures the cosine distance of every pattern of the pool to the
nearest pattern of a picked image: its mean (and the standard deviation over the seeds) and its largest. Random picks are
the rival.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from commands import digits
from data import machine

from engine.draws import random_subset
from engine.embed import embed
from engine.nearest import nearest_sqdist
from engine.reading import Reading
from engine.runner import run_method
from engine.select.freesel import Options, freesel
from engine.shards import LocalShards, Request, open_local
from engine.store import FeatureStore
from engine.verbs import EmbedOptions

NOTHING = np.empty(0, dtype=np.int64)


def coverage(shards: LocalShards, picks: np.ndarray) -> tuple[float, float]:
    """Return the mean and the largest 1 - cos over all patterns, each to its nearest picked one."""
    centres = shards.take(picks)
    distances = np.concatenate([0.5 * nearest_sqdist(block.x, centres)[1] for block in shards.blocks])
    return float(distances.mean()), float(distances.max())


def picks_of(method: str, shards: LocalShards, images: np.ndarray, budget: int, seed: int) -> np.ndarray:
    if method == "random":
        return images[random_subset(len(images), budget, seed, ())]
    return run_method(freesel, shards, Request(budget, seed, NOTHING), Options(sampling=method)).picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", nargs="?", help="default: scikit-learn's digits, with random weights at 64 px")
    parser.add_argument("--weights", default="hub")
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--model-option", action="append", default=[])
    parser.add_argument("--mean-std", type=float, default=None, help="pixel mean and std, if not the model's own")
    parser.add_argument("--num-patterns", type=int, default=5)
    parser.add_argument("--budgets", default="10,30")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    pixel = None if options.mean_std is None else (options.mean_std,)
    with tempfile.TemporaryDirectory() as folder:
        given = EmbedOptions(
            pool=options.pool or digits(Path(folder))[0],
            out=f"{folder}/features",
            encoder="patterns",
            backbone=options.backbone,
            weights=options.weights if options.pool else "random",
            image_size=None if options.pool else 64,
            model_option=tuple(options.model_option),
            mean=pixel,
            std=pixel,
            num_patterns=options.num_patterns,
            workers=0,
        )
        embed(given)
        store = FeatureStore(given.out)
        shards, images = open_local(store, Reading(True)), store.rows
        print(f"{len(images)} images, {shards.n} patterns x {shards.d}, {options.seeds} seeds, {machine()}")
        titles = f"{'mean distance':>14}{'std':>9}{'/ random':>10}{'largest':>9}{'/ random':>10}{'seconds':>9}"
        print(f"{'budget':>7} {'picks by':<14}{titles}")
        results = []
        for budget in (int(part) for part in options.budgets.split(",")):
            base: np.ndarray | None = None
            for method, name in (("random", "random"), ("d2", "freesel, d2"), ("fds", "freesel, fds")):
                began = time.perf_counter()
                picked = [picks_of(method, shards, images, budget, seed) for seed in range(options.seeds)]
                seconds = (time.perf_counter() - began) / options.seeds
                values = np.array([coverage(shards, picks) for picks in picked])
                (mean, largest), std = values.mean(axis=0).tolist(), float(values[:, 0].std(ddof=1))
                base = np.array([mean, largest]) if base is None else base
                ratio, largest_ratio = (np.array([mean, largest]) / base).tolist()
                print(
                    f"{budget:>7} {name:<14}{mean:>14.5f}{std:>9.5f}{ratio:>10.3f}"
                    f"{largest:>9.4f}{largest_ratio:>10.3f}{seconds:>9.3f}",
                    flush=True,
                )
                entry = {"budget": budget, "method": name, "mean": mean, "std": std, "ratio": ratio, "s": seconds}
                results.append({**entry, "largest": largest, "largest_ratio": largest_ratio})
    print(json.dumps({"results": results, "machine": machine()}, sort_keys=True))


if __name__ == "__main__":
    main()
