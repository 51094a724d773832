"""How far is the closed form of ActiveFT's gradient ahead of autograd on the loss as written, and does it go the same way?

    python benchmarks/bench_activeft.py [FEATURES] [--budgets 500,2500] [--steps 100] [--rival-steps 100]

The rival is the loss of the released objective in a few lines of torch: normalise, similarities of all rows and vectors,
cross-entropy of the pulled vector against the repulsion, `backward()`, torch's Adam. Both start at the same rows, with the
same threads, in the same run; times are per step, the rival's after its first. Peaks are of anonymous memory, each
method in a process of its own, above what was there when it began. The snap is timed apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from data import load, machine

from engine.blocks import merge_smallest
from engine.select.activeft import Options, Scales, _start_key, _unit, activeft, objective
from engine.shards import LocalShards, Request, prepare

NOTHING = np.empty(0, dtype=np.int64)
TAU = 0.07


def loss_as_written(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the released objective, every matrix of it in memory."""
    c = torch.nn.functional.normalize(t, dim=1)
    similarity = x @ c.T / TAU
    s, owner = similarity.max(dim=1)
    repel = torch.exp(c.detach() @ c.T / TAU).sum(dim=0)
    return -(s - torch.log(torch.exp(s) + repel[owner])).mean()


def start_of(shards: LocalShards, budget: int) -> torch.Tensor:
    """Return the rows that both start at."""
    _, rows = shards.map(_start_key, 0, budget, combine=partial(merge_smallest, budget))
    return shards.take(rows)


def gradient_error(x: np.ndarray, shards: LocalShards, budget: int) -> float:
    """Return |ours - autograd's| / |autograd's| for the gradient by the free vectors at the start, autograd in float64.

    In float32 autograd gives a row that is equally near to two vectors to the wrong one now and then, and is off by that.
    """
    t = start_of(shards, budget).double().requires_grad_()
    loss_as_written(torch.from_numpy(x).double(), t).backward()
    unit, norms = _unit(t.detach().numpy())
    scales = Scales(2.0**40, 2.0**40, 2.0**36)
    _, gradient = objective(shards, unit, budget, Options(), scales, None)
    ours = (gradient - (gradient * unit).sum(axis=1, keepdims=True) * unit) / norms[:, None]
    reference = t.grad.numpy() if t.grad is not None else ours
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


class Peak:
    """The peak of this process's anonymous memory above what it has now."""

    def __init__(self) -> None:
        self.before, self.peak, self.ended = self._now(), 0, False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while not self.ended:
            self.peak = max(self.peak, self._now())
            time.sleep(0.005)

    def end(self) -> int:
        self.ended = True
        self.thread.join()
        return self.peak - self.before


def rival(x: np.ndarray, start: torch.Tensor, steps: int) -> dict[str, object]:
    pool, t = torch.from_numpy(x), start.clone().requires_grad_()
    adam, losses, marks, peak = torch.optim.Adam([t], lr=1e-3), [], [time.perf_counter()], Peak()
    for _ in range(steps):
        adam.zero_grad()
        loss = loss_as_written(pool, t)
        loss.backward()
        adam.step()
        losses.append(float(loss))
        marks.append(time.perf_counter())
    return {"losses": losses, "step_s": float(np.mean(np.diff(marks)[1:])), "peak_bytes": peak.end()}


def ours(shards: LocalShards, budget: int, steps: int) -> dict[str, object]:
    prepare(shards, NOTHING)
    losses, marks, peak = [], [time.perf_counter()], Peak()
    for step in activeft(shards, Request(budget, 0, NOTHING), Options(steps=steps)):
        marks.append(time.perf_counter())
        losses.append(step.objective)
    times = np.diff(marks)
    return {"losses": losses[:-1], "step_s": float(times[1:-1].mean()), "snap_s": float(times[-1]), "peak_bytes": peak.end()}


def apart(features: str | None, which: str, budget: int, steps: int) -> dict[str, object]:
    """Run one method in a process of its own."""
    words = [sys.executable, __file__, *([features] if features else []), "--only", which]
    words += ["--budgets", str(budget), "--steps", str(steps)]
    return dict(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", nargs="?")
    parser.add_argument("--budgets", default="200,500")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rival-steps", type=int, default=100, help="fewer, to save time at large budgets")
    parser.add_argument("--only", choices=("ours", "rival"), help="run this method and print what it took: used inside")
    options = parser.parse_args()
    x, shards = load(options.features)
    budgets = [int(part) for part in options.budgets.split(",")]
    if options.only:
        start = start_of(shards, budgets[0])
        found = rival(x, start, options.steps) if options.only == "rival" else ours(shards, budgets[0], options.steps)
        print(json.dumps(found))
        return
    print(f"{len(x)} x {x.shape[1]}, {machine()}")
    print(f"{'b':>6}{'s a step':>10}{'autograd':>10}{'ratio':>7}{'MiB':>8}{'autograd':>10}{'ratio':>7}{'snap s':>8}", end="")
    print(f"{'gradient off by':>17}{'loss curve off by':>19}{'loss first, last':>20}", flush=True)
    results = []
    for budget in budgets:
        error = gradient_error(x, shards, budget)
        a, b = (
            apart(options.features, *given)
            for given in (("ours", budget, options.steps), ("rival", budget, options.rival_steps))
        )
        mine, theirs = np.array(a["losses"][: options.rival_steps]), np.array(b["losses"][: options.steps])
        curve = float(np.abs(mine / theirs - 1).max())
        time_ratio, memory_ratio = b["step_s"] / a["step_s"], b["peak_bytes"] / a["peak_bytes"]
        print(f"{budget:>6}{a['step_s']:>10.3f}{b['step_s']:>10.3f}{time_ratio:>7.2f}", end="")
        print(f"{a['peak_bytes'] / 2**20:>8.0f}{b['peak_bytes'] / 2**20:>10.0f}{memory_ratio:>7.1f}{a['snap_s']:>8.2f}", end="")
        print(f"{error:>17.1e}{curve:>19.1e}{mine[0]:>11.4f}{mine[-1]:>9.4f}", flush=True)
        facts = {
            "step_s": a["step_s"],
            "rival_step_s": b["step_s"],
            "peak_bytes": a["peak_bytes"],
            "rival_peak_bytes": b["peak_bytes"],
        }
        results.append({"budget": budget, **facts, "snap_s": a["snap_s"], "gradient_error": error, "curve_error": curve})
    print(json.dumps({"results": results, "machine": machine()}, sort_keys=True))


if __name__ == "__main__":
    main()
