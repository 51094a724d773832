"""What are picks worth after training on them? Selects by several strategies, finetunes on each, tabulates the metrics.

    python benchmarks/bench_finetune.py POOL --test POOL --features DIR --out DIR --budget 500
        [--strategies random,kmeans,activeft] [--seeds 3] [--all] [--metrics top1] [--jobs 2] -- [finetune's own options]

Each selection and each training is a command of its own, as a user would type it, with the same seed for both; run
again it goes on where it stopped. FreeSel picks from `--patterns`, a feature store of the same pool. `--all` also trains
on the whole pool, with one seed. Last and best metric are those of the checkpoints' manifests: best is chosen on the
test set, as the papers do, so last is the honest one. Quality only: times are those of a machine that does `--jobs` runs
at once. Without arguments it trains a tiny network on scikit-learn's digits, so that it needs nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from commands import begin, coresift, digits, known_and_own


def trained(known: argparse.Namespace, own: list[str], name: str, seed: int) -> tuple[str, dict[str, Any]]:
    """Select by a strategy (or take all) and finetune; return the name and the checkpoint's manifest."""
    out = Path(known.out).absolute()
    picks, model = out / "selections" / f"{name}-{seed}", out / "checkpoints" / f"{name}-{seed}"
    if name != "all":
        features = known.patterns if name in ("freesel", "geal") else known.features
        coresift(
            *("select", features, "--strategy", name, "--budget", known.budget, "--seed", str(seed)),
            *("--out", str(picks), "--workers", "0", "--quiet"),
        )
    selection = "all" if name == "all" else str(picks)
    coresift(
        *("finetune", known.pool, "--selection", selection, "--test", known.test, "--seed", str(seed)),
        *("--out", str(model), "--quiet", *own),
    )
    manifest: dict[str, Any] = json.loads((model / "manifest.json").read_text())
    print(f"{name}, seed {seed}: " + ", ".join(f"{m} {v:.2f}" for m, v in values(manifest, known.metrics).items()), flush=True)
    return name, manifest


def values(manifest: dict[str, Any], wanted: list[str]) -> dict[str, float]:
    """Return the wanted metrics of a checkpoint after its last step, and the first of them at its best, by name."""
    last = {entry["metric"]: entry["value"] for entry in manifest["metrics"]}
    best = {entry["metric"]: entry["value"] for entry in (manifest["best"] or {}).get("metrics", [])}
    found = {name: last[name] for name in wanted}
    return found | {f"{name} (best)": best[name] for name in wanted[:1] if name in best}


def quick(folder: Path) -> list[str]:
    """Embed scikit-learn's digits; return the arguments for a small run."""
    pool, test = digits(folder, 597)
    features = str(folder / "features")
    coresift("embed", pool, "--out", features, "--encoder", "pixels", "--workers", "0", "--quiet")
    run = [pool, "--test", test, "--features", features, "--out", str(folder), "--budget", "100", "--seeds", "2", "--"]
    own = ["--task", "classify", "--model", "resnet18", "--weights", "random", "--image-size", "32"]
    options = ("epochs=15", "batch_size=25", "optimizer=adamw", "lr=0.003", "schedule=cosine", "crop=pad", "flip=false")
    return [*run, *own, *("--option=" + option for option in options), "--option=small_stem=true"]


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool")
    parser.add_argument("--test", required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--patterns")
    parser.add_argument("--out", required=True)
    parser.add_argument("--budget", required=True)
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=["random", "kmeans", "activeft"])
    parser.add_argument("--metrics", type=lambda text: text.split(","), default=["top1"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--all", action="store_true")
    known, own = known_and_own(parser, arguments)
    runs = [(name, seed) for seed in range(known.seeds) for name in known.strategies] + [("all", 0)] * known.all
    with ThreadPoolExecutor(known.jobs) as at_once:
        done = list(at_once.map(lambda run: trained(known, own, *run), runs))
    table: dict[str, dict[str, list[float]]] = {}
    for name, manifest in done:
        for metric, value in values(manifest, known.metrics).items():
            table.setdefault(name, {}).setdefault(metric, []).append(value)
    metrics = list(next(iter(table.values())))
    print(f"\n{known.budget} picks, {known.seeds} seeds, mean and standard deviation; {' '.join(own)}")
    print(f"{'trained on':<14}{'images':>8}" + "".join(f"{metric:>20}" for metric in metrics))
    for name, columns in table.items():
        images = next(manifest["num_images"] for other, manifest in done if other == name)
        cells = [f"{statistics.mean(v):.2f} +- {statistics.stdev(v) if len(v) > 1 else 0:.2f}" for v in columns.values()]
        print(f"{name:<14}{images:>8}" + "".join(f"{cell:>20}" for cell in cells))
    print(json.dumps({"budget": known.budget, "options": own, "runs": table}, sort_keys=True))


if __name__ == "__main__":
    begin(run, quick)
