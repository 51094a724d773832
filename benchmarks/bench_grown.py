"""What does a grown pool cost, and what are picks worth that go on from former ones, beside picks made afresh?

    python benchmarks/bench_grown.py FIRST GROWN --test TEST [--budget 500] [--strategies coreset,kmeans,typiclust]

FIRST and GROWN are feature stores of a pool before and after it grew, GROWN by `embed --reuse FIRST`. Picks: `budget` of
FIRST, then as many of GROWN with the former ones labelled; beside twice as many of GROWN at once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from commands import begin, coresift, digits
from data import machine

from engine.evaluate import evaluate
from engine.select import select
from engine.store import FeatureStore
from engine.verbs import EvaluateOptions, SelectOptions


def chosen(features: str, out: Path, strategy: str, budget: int, labeled: Path | None = None) -> float:
    """Select; return the seconds it took, the store's opening included."""
    began = time.perf_counter()
    given = {"labeled": str(labeled) if labeled else None}
    select(SelectOptions(features=features, out=str(out), strategy=strategy, budget=str(budget), workers=0, **given))
    return time.perf_counter() - began


def ids(folder: Path) -> set[str]:
    """Return what a selection says is labelled: before it, and by it."""
    return {name for file in ("labeled_ids.txt", "ids.txt") for name in (folder / file).read_text().splitlines()}


def measured(features: str, folder: Path, test: str) -> dict[str, float]:
    """Return the figures of a selection and what was labelled before it."""
    options = EvaluateOptions(
        subject=features, selection=str(folder), test=test, metrics=("knn", "coverage"), neighbors=(1,), workers=0
    )
    return {found["metric"]: found["value"] for found in evaluate(options)}


def run(arguments: list[str]) -> None:
    """Run, print a table, and JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("first")
    parser.add_argument("grown")
    parser.add_argument("--test", required=True)
    parser.add_argument("--budget", type=int, default=500)
    parser.add_argument("--strategies", default="coreset,kmeans,typiclust")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    stores = {name: FeatureStore(uri) for name, uri in (("first", given.first), ("grown", given.grown))}
    embedding = {
        name: {"num_rows": store.num_rows, **{k: store.manifest["time"].get(k) for k in ("seconds_s", "num_reused", "stages")}}
        for name, store in stores.items()
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for strategy in given.strategies.split(","):
            place = Path(folder) / strategy
            seconds = {
                "first": chosen(given.first, place / "first", strategy, given.budget),
                "second": chosen(given.grown, place / "second", strategy, given.budget, place / "first"),
                "afresh": chosen(given.grown, place / "afresh", strategy, 2 * given.budget),
            }
            second, afresh = ids(place / "second"), ids(place / "afresh")
            for name in ("second", "afresh"):
                found = measured(given.grown, place / name, given.test)
                rows.append({"strategy": strategy, "picks": name, "seconds": round(seconds[name], 2), **found})
                rows[-1]["overlap"] = len(second & afresh) / len(afresh)
    names = ("mean_distance", "covering_radius", "knn_1")
    print("strategy     picks    s      overlap " + " ".join(f"{name:>16}" for name in names))
    for row in rows:
        figures = " ".join(f"{row.get(name, float('nan')):16.4f}" for name in names)
        print(f"{row['strategy']:12} {row['picks']:8} {row['seconds']:6.1f} {row['overlap']:7.3f} {figures}")
    print(json.dumps({"embedding": embedding, "selections": rows, "budget": given.budget, "machine": machine()}))


def quick(folder: Path) -> list[str]:
    """Return the arguments of a run on scikit-learn's digits: 1,200 of them, and then 1,497."""
    pool, test = digits(folder, 300)
    pq.write_table(pq.read_table(pool).slice(0, 1200), folder / "before.parquet")
    stores = [str(folder / name) for name in ("first", "grown", "held")]
    for file, store, more in zip(
        (str(folder / "before.parquet"), pool, test), stores, ((), ("--reuse", stores[0]), ()), strict=True
    ):
        coresift("embed", file, "--out", store, "--encoder", "pixels", "--workers", "0", *more)
    return [*stores[:2], "--test", stores[2], "--budget", "30", "--strategies", "coreset"]


if __name__ == "__main__":
    begin(run, quick)
