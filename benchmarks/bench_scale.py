"""Does the memory of a selection stay bounded, and its time grow with n as a straight line?

    python benchmarks/bench_scale.py STORE [--rows 1,2,5,10] [--strategies kmeans,coreset,activeft]
        [--memory-per-shard 1GiB]

STORE is one of make_store.py. Each run selects from the first so many million rows (a store whose parts are links to the
parts of STORE), in a process of its own. Memory is the peak over that process and its children of anonymous and shared
memory, sampled; mapped files are not counted. The straight line is that of CPU time, which other work on the machine
disturbs less, and for activeft that of the snap's time. kmeans: k = 1000, 5 steps, 1 restart; coreset: b = 1000; activeft:
b = 1000, batches of 100,000 (its steps don't grow with n, so they are few except at the full size; the snap is timed
apart).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from data import machine

from engine.folders import begin
from engine.places import Place
from engine.store import FeatureStore, publish_features

FEW_STEPS = 10
RUN = """
import json, sys, time
from engine.verbs import SelectOptions
from engine.select import select
marks = []
def progress(stage, done, total, note):
    marks.append((time.perf_counter(), done, total))
began = time.perf_counter()
select(SelectOptions(**json.loads(sys.argv[1])), progress)
print(json.dumps({"began": began, "ended": time.perf_counter(), "marks": marks}))
"""


def head(store: FeatureStore, rows: int, out: Path) -> Path:
    """Publish a store of the first rows of another, its parts linked."""
    parts = [part for part in store.manifest["parts"] if part["stop"] <= rows]
    place = Place(str(out))
    begin(place, "features", {}, {"rows": rows}, overwrite=False)
    (out / "parts").mkdir(exist_ok=True)
    for part in parts:
        os.link(Path(store.place.path) / "parts" / part["name"], out / "parts" / part["name"])
    names = ("num_rejected", "dim", "dtype", "class_names", "column", "pool", "encoder")
    facts = {name: store.manifest[name] for name in names}
    publish_features(place, parts, {**facts, "num_rows": parts[-1]["stop"]})
    return out


def memory_bytes(process: psutil.Process) -> int:
    """Return the anonymous and shared memory of a process and its children."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
        except FileNotFoundError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return total


def run(options: dict[str, object]) -> dict[str, float]:
    """Select in a fresh process; return its times and the peak of its memory."""
    process = subprocess.Popen([sys.executable, "-c", RUN, json.dumps(options)], stdout=subprocess.PIPE, text=True)
    watched, peak, cpu_s = psutil.Process(process.pid), 0, 0.0
    while process.poll() is None:
        peak = max(peak, memory_bytes(watched))
        times = watched.cpu_times()
        cpu_s = max(cpu_s, times.user + times.system)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"the run of {options['strategy']} failed")
    facts = json.loads(process.stdout.read().splitlines()[-1]) if process.stdout else {}
    marks = facts["marks"]
    return {
        "s": facts["ended"] - facts["began"],
        "cpu_s": cpu_s,
        "peak_gib": peak / 2**30,
        "last_step_s": marks[-1][0] - marks[-2][0] if len(marks) > 1 else 0.0,
    }


def options_of(strategy: str, full: bool) -> list[str]:
    if strategy == "kmeans":
        return ["restarts=1", "iterations=5"]
    return ["batch=100000", f"steps={100 if full else FEW_STEPS}"] if strategy == "activeft" else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("--rows", default="1,2,5,10", help="millions")
    parser.add_argument("--strategies", default="kmeans,coreset,activeft")
    parser.add_argument("--memory-per-shard", default="1GiB")
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    store, sizes = FeatureStore(given.store), [float(part) for part in given.rows.split(",")]
    print(f"{given.store}: {store.num_rows:,} x {store.dim} {store.manifest['dtype']}, {machine()}")
    print(f"{'strategy':<10}{'rows':>12}{'s':>9}{'cpu s':>9}{'last step s':>13}{'peak GiB':>10}", flush=True)
    results = []
    with tempfile.TemporaryDirectory(dir=Path(given.store).parent) as folder:
        heads = {size: head(store, int(size * 1e6), Path(folder) / f"{size}m") for size in sizes}
        for strategy in given.strategies.split(","):
            for size in sizes:
                fixed = {"features": str(heads[size]), "out": f"{folder}/{strategy}-{size}", "strategy": strategy}
                how = {"workers": given.workers, "memory_per_shard": given.memory_per_shard, "budget": "1000"}
                found = run({**fixed, **how, "option": options_of(strategy, size == max(sizes))})
                rows = FeatureStore(str(heads[size])).num_rows
                results.append({"strategy": strategy, "rows": rows, **found})
                print(
                    f"{strategy:<10}{rows:>12,}{found['s']:>9.1f}{found['cpu_s']:>9.1f}{found['last_step_s']:>13.1f}"
                    f"{found['peak_gib']:>10.2f}",
                    flush=True,
                )
            measure = "last_step_s" if strategy == "activeft" else "cpu_s"
            times = [(r["rows"], r[measure]) for r in results if r["strategy"] == strategy]
            if len(times) > 2:
                n, s = np.array(times).T
                slope, start = np.polyfit(n, s, 1)
                worst = np.abs(s - (slope * n + start)).max() / s.max()
                line = f"{slope * 1e6:.1f} s a million rows, {start:+.1f} s"
                print(f"  straight line: {line}, off by {worst:.1%} of the longest at most")
    print(json.dumps({"results": results, "machine": machine()}, sort_keys=True))


if __name__ == "__main__":
    main()
