"""What quotas cost in coverage: an unbalanced pool, every strategy, with as many picks of each class and without conditions.

    python benchmarks/bench_constraints.py POOL.parquet [--unit 80] [--budget 200] [--seeds 3] [--strategies A,B]
        [--work DIR] -- OPTIONS OF EMBED

The pool has unit, 2 unit, 3 unit ... of the labelled images of each class of POOL; the label is the column that the quota is
on. Mean distance and covering radius are from a pool image to its nearest pick, on the normalised vectors. Strategies that
read probabilities get those of a logistic regression on as many random images as the budget. With --work everything is kept
there, and run again it goes on where it stopped. Without arguments: digits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from commands import begin, coresift, digits, known_and_own
from data import machine
from sklearn.linear_model import LogisticRegression

from engine.reading import Reading
from engine.schema import InputError, build_options
from engine.select import STRATEGIES, select
from engine.select.quality import distances
from engine.selections import open_selection
from engine.shards import open_local
from engine.store import FeatureStore
from engine.verbs import SelectOptions

LEFT_OUT = {"influence", "gradient_similarity", "stability", "uniform"}
"""Strategies that read scores of a trained network, or the label that the quota is on."""


def unbalanced(pool: str, unit: int, out: Path) -> str:
    """Write the first unit, 2 unit, ... images of the classes of a pool, by their order, as a pool of its own."""
    if out.exists():
        return str(out)
    table = pq.read_table(pool)
    labels = np.array(table["label"].to_pylist())
    _, codes = np.unique(labels, return_inverse=True)
    keep = [np.flatnonzero(codes == code)[: unit * (code + 1)] for code in range(codes.max() + 1)]
    pq.write_table(table.take(pa.array(np.sort(np.concatenate(keep)))), out)
    return str(out)


def probabilities(store: FeatureStore, count: int, out: Path) -> str:
    """Write what a logistic regression on `count` random images gives for all, as a store; return its folder."""
    if out.exists():
        return str(out)
    rows = np.random.default_rng(0).permutation(len(store.rows))[:count]
    x = store.vectors()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    model = LogisticRegression(C=10, max_iter=300).fit(x[rows], store.labels[rows])
    np.savez(out.with_suffix(".npz"), features=model.predict_proba(x).astype(np.float32), ids=np.array(store.ids(store.rows)))
    coresift("import", str(out.with_suffix(".npz")), "--out", str(out), "--holds", "probs")
    return str(out)


def picks_of(name: str, features: str, probs: str, budget: int, seed: int, quota: tuple[str, ...], out: Path) -> np.ndarray:
    """Return the picks of one run of `select`."""
    given: dict[str, Any] = {"features": features, "out": str(out), "strategy": name, "budget": str(budget), "seed": seed}
    if STRATEGIES[name].predictions:
        given["predictions"] = probs
    options = build_options(SelectOptions, {**given, "quota": quota, "workers": 0}, "select")
    select(options)
    return open_selection(str(out)).picks


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool")
    parser.add_argument("--unit", type=int, default=80)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=[n for n in STRATEGIES if n not in LEFT_OUT])
    parser.add_argument("--work", type=Path)
    given, own = known_and_own(parser, arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        coresift("embed", unbalanced(given.pool, given.unit, folder / "pool.parquet"), "--out", str(folder / "features"), *own)
        store = FeatureStore(str(folder / "features"))
        probs = probabilities(store, given.budget, folder / "probs")
        names = store.class_names or [str(code) for code in np.unique(store.labels)]
        counts = np.bincount(store.labels)
        each = given.budget // len(names)
        quota = ("label=" + ",".join(f"{name}:{each}" for name in names),)
        shards = open_local(store, Reading(True))
        rows = []
        print(f"{len(store.rows):,} images of {len(names)} classes, {counts.tolist()}; {each} picks of each class")
        print("strategy | mean distance, free | with the quota | radius, free | with quota | of a class, free")
        for name in given.strategies:
            found: dict[str, list[tuple[float, float]]] = {"free": [], "quota": []}
            spread = []
            for seed in range(given.seeds):
                for kind, conditions in (("free", ()), ("quota", quota)):
                    out = folder / f"{name}-{kind}-{seed}"
                    picks = picks_of(name, str(folder / "features"), probs, each * len(names), seed, conditions, out)
                    found[kind].append(distances(shards, picks))
                    made = np.bincount(store.labels[np.searchsorted(store.rows, picks)], minlength=len(names))
                    if kind == "quota":
                        assert made.tolist() == [each] * len(names), f"{name} missed the quota: {made.tolist()}"
                    else:
                        spread.append((int(made.min()), int(made.max())))
            mean = {kind: np.mean(values, axis=0) for kind, values in found.items()}
            row = {"strategy": name, "least": min(low for low, _ in spread), "most": max(high for _, high in spread)}
            for kind, (distance, radius) in mean.items():
                row |= {f"mean_distance_{kind}": round(float(distance), 4), f"covering_radius_{kind}": round(float(radius), 4)}
            rows.append(row)
            values = (row[f"{what}_{kind}"] for what in ("mean_distance", "covering_radius") for kind in ("free", "quota"))
            print(f"{name} | {' | '.join(f'{value:.4f}' for value in values)} | {row['least']} to {row['most']}", flush=True)
        message = ""
        try:
            asked = (f"label={names[0]}:{counts[0] + 20}",)
            picks_of("random", str(folder / "features"), probs, given.budget, 0, asked, folder / "infeasible")
        except InputError as error:
            message = str(error)
        print(f"--quota {asked[0]}: {message}")
    facts = {"pool": len(store.rows), "classes": counts.tolist(), "each": each, "seeds": given.seeds, "rows": rows}
    print(json.dumps({"benchmark": "constraints", **facts, "infeasible": message, **machine()}))


def quick(folder: Path) -> list[str]:
    pool, _ = digits(folder)
    return [pool, "--unit", "10", "--budget", "40", "--seeds", "1", "--", "--encoder", "pixels", "--workers", "0"]


if __name__ == "__main__":
    begin(run, quick)
