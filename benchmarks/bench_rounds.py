"""How many labels does a strategy save in rounds? Runs strategies x seeds of `coresift rounds`, then `coresift curves`.

    python benchmarks/bench_rounds.py SUBJECT --out DIR [--strategies random,entropy,margin] [--seeds 3] [--jobs 1]
        -- [rounds' own options: --start, --add, --rounds, --oracle, --test, ...]

Each run is a command of its own, as a user would type it; run again it goes on where it stopped. All runs of a seed begin with
the same labels. Quality only: times are those of a machine that does `--jobs` runs at once. Without arguments: a linear head on
scikit-learn's digits, so that it needs nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from commands import begin, coresift, digits, known_and_own


def rounds(known: argparse.Namespace, own: list[str], strategy: str, seed: int) -> str:
    """Run one strategy's rounds; return their folder."""
    folder, began = str(Path(known.out).absolute() / f"{strategy}-{seed}"), time.perf_counter()
    chosen = ["--strategy", strategy, "--seed", str(seed), "--out", folder]
    found = json.loads(coresift("rounds", known.subject, *chosen, "--quiet", "--json", *own))
    ends = ", ".join(f"{m['metric']} {m['value']:.4g}" for m in found["table"][-1]["metrics"][:2])
    print(f"{strategy}, seed {seed}: {ends}, {time.perf_counter() - began:.0f} s", flush=True)
    return folder


def quick(folder: Path) -> list[str]:
    """Embed scikit-learn's digits; return the arguments for a small run."""
    features = []
    for pool in digits(folder, 597):
        features.append(pool.removesuffix(".parquet"))
        coresift("embed", pool, "--out", features[-1], "--encoder", "pixels", "--workers", "0", "--quiet")
    own = ["--test", features[1], "--oracle", "column", "--start", "20", "--add", "20", "--rounds", "5"]
    return [features[0], "--out", str(folder / "rounds"), "--seeds", "2", "--", *own]


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject")
    parser.add_argument("--out", required=True)
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=["random", "entropy", "margin"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    known, own = known_and_own(parser, arguments)
    runs = [(name, seed) for seed in range(known.seeds) for name in known.strategies]
    with ThreadPoolExecutor(known.jobs) as at_once:
        folders = list(at_once.map(lambda one: rounds(known, own, *one), runs))
    out = str(Path(known.out).absolute() / "curves")
    baseline = "random" if "random" in known.strategies else "none"
    print(coresift("curves", *folders, "--out", out, "--baseline", baseline))
    manifest = json.loads((Path(out) / "manifest.json").read_text())
    print(json.dumps({"options": own, **{key: manifest[key] for key in ("metric", "table", "saved")}}, sort_keys=True))


if __name__ == "__main__":
    begin(run, quick)
