"""What `coresift plan` says beside what it then takes: CIFAR-10 embedded, k-means, core-set, at three sizes of the pool.

    python benchmarks/bench_plan.py [TRAIN.parquet] [--weights FILE.safetensors] [--rows 1024,4096,16384] [--repeats 3]

One process, one thread, CPU seconds: what else runs on the machine changes the clock's, and these hardly. Each size is
planned from a probe of its own (256 images, a few thousand vectors), `--repeats` times, and run as often; the error is that
of the mean plan, the spread the largest distance of a run from the mean of the runs. Without TRAIN a pool of made-up images
is used, and pixels for vectors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from data import machine
from PIL import Image

from engine.verbs import VERBS
from jobs.expand import expand
from jobs.overlay import load
from jobs.plan import plan
from jobs.plan_options import PlanOptions

JOB = """
name: planned
pool: {pool}
out: {out}
steps:
  - embed: {embed}
    as: features
  - select: {{features: $features, strategy: kmeans, budget: 1%, workers: 0}}
    as: kmeans
  - select: {{features: $features, strategy: coreset, budget: 1%, workers: 0}}
    as: coreset
"""


def made_up(file: Path, rows: int) -> Path:
    """Write a pool of PNGs of noise in a few colours."""
    import io

    rng, images = np.random.default_rng(0), []
    for row in range(rows):
        noise = rng.integers(0, 64, (32, 32, 3)) + np.array([row % 7, row % 5, row % 3]) * 25
        buffer = io.BytesIO()
        Image.fromarray(noise.astype(np.uint8)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{row}.png"})
    pq.write_table(pa.table({"image": images}), file)
    return file


def run(job: Path, out: Path) -> dict[str, float]:
    """Run the job's steps into an empty folder; return each one's CPU seconds."""
    found = {}
    for step in expand(load(str(job), sets=(f"out={out}",))):
        began = time.process_time()
        VERBS[step.verb].load()(step.options, lambda *_: None)
        found[step.name] = time.process_time() - began
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", nargs="?")
    parser.add_argument("--weights")
    parser.add_argument("--rows", default="1024,4096,16384")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(part) for part in given.rows.split(",")]
    network = {"backbone": "mobilenetv2_100", "weights": given.weights or "random", "image_size": 64}
    embed = {**network, "workers": 0} if given.pool else {"encoder": "pixels", "workers": 0}
    results = []
    print(f"{'rows':>7}  {'step':<9}{'planned s':>10}{'run s':>9}{'error':>8}{'plans':>8}{'runs':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(given.pool) if given.pool else made_up(Path(folder) / "all.parquet", max(sizes))
        for rows in sizes:
            pool = Path(folder) / f"{rows}.parquet"
            pq.write_table(pq.read_table(whole).slice(0, rows), pool, row_group_size=2000)
            job = Path(folder) / f"job-{rows}.yaml"
            job.write_text(JOB.format(pool=pool, out=Path(folder) / "unused", embed=json.dumps(embed)))
            plans: dict[str, list[float]] = {}
            runs: dict[str, list[float]] = {}
            for repeat in range(given.repeats):
                told = plan(PlanOptions(job=str(job), workers=(0,)))
                for step in told["steps"]:
                    plans.setdefault(step["step"], []).append(step["times"][0]["seconds_s"])
                for name, spent in run(job, Path(folder) / f"out-{rows}-{repeat}").items():
                    runs.setdefault(name, []).append(spent)
            for name, spent in runs.items():
                said, took = float(np.mean(plans[name])), float(np.mean(spent))
                away = [float(np.abs(np.array(values) / np.mean(values) - 1).max()) for values in (plans[name], spent)]
                line = {"rows": rows, "step": name, "planned_s": said, "run_s": took, "error": said / took - 1}
                results.append({**line, "plans_spread": away[0], "runs_spread": away[1]})
                print(
                    f"{rows:>7,}  {name:<9}{said:>10.2f}{took:>9.2f}{said / took - 1:>+8.0%}{away[0]:>8.0%}{away[1]:>8.0%}",
                    flush=True,
                )
    print(json.dumps({"results": results, "machine": machine()}, sort_keys=True))


if __name__ == "__main__":
    main()
