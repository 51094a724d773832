"""Every recipe's small variant, on images of the shared data: does it run, how long, and what comes out?

    python benchmarks/bench_recipes.py SHARED [NAME ...] --out DIR

SHARED is the folder of shared data (its README.md says what is in it): pools of a few hundred images are cut out of it. Each
recipe is one `coresift run NAME --small`, as a user would type it; run again it goes on where it stopped. A few hundred images,
a small network and minutes of training: the figures show that a recipe runs, and nothing of its paper. Without arguments: two
recipes on the shared data beside the checkout, if it is there.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

from commands import ROOT, begin, coresift
from pools import cut, listed

NAMES = sorted(file.stem for file in (ROOT / "jobs" / "recipes").glob("*.yaml"))
BOXES = ("freesel-voc", "isal-voc2012", "isal-coco-fasterrcnn", "isal-coco-fcos")
"""Those that train detectors: on BCCD."""


def pools(shared: Path, folder: Path) -> dict[str, str]:
    """Write the pools that are not there yet; return all files by name."""
    train, test = (shared / "cifar10" / f"{split}.parquet" for split in ("train", "test"))
    files = {"pool": folder / "pool.parquet", "fewer": folder / "fewer.parquet", "test": folder / "test.parquet"}
    for name, source, rows in (("pool", train, 1000), ("fewer", train, 500), ("test", test, 300)):
        if not files[name].exists():
            cut(source, rows, files[name])
    for name, source, rows, tail in (("long", train, 1000, 0.8), ("flat", test, 300, 1.0)):
        files[name] = folder / f"{name}.txt"
        if not files[name].exists():
            listed(source, rows, files[name], tail)
    return {name: str(file) for name, file in files.items()}


def places(name: str, shared: Path, known: dict[str, str]) -> dict[str, str]:
    """Return what a recipe's small variant is given by --set."""
    weights = str(shared / "weights" / "mobilenetv2_100.safetensors")
    if name in BOXES:
        boxes = shared / "bccd"
        return {"pool": str(boxes / "train.json"), "data.test": str(boxes / "test.json"), "data.weights": weights}
    pool = known["fewer"] if name.startswith("isal") else known["pool"]
    given = {"pool": pool, "data.test": known["test"], "data.weights": weights}
    if name == "lowbudget-imagenet-lt":
        given |= {"pool": known["long"], "data.test": known["flat"], "data.images": str(Path(known["long"]).parent)}
    return given


def one(name: str, shared: Path, out: Path, known: dict[str, str]) -> dict[str, Any]:
    """Run a recipe's small variant; return how long it took, and its tables."""
    sets = places(name, shared, known) | {"out": str(out / name)}
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    began, before = time.perf_counter(), _cpu_s()
    found = json.loads(coresift("run", name, "--small", *words, "--quiet", "--json"))
    seconds, again = time.perf_counter() - began, sum(step["already_done"] for step in found["steps"])
    spent = _cpu_s() - before
    print(f"\n{name}: {len(found['steps'])} steps ({again} done before), {seconds:.0f} s, {spent:.0f} s of CPUs\n")
    print((out / name / "table.md").read_text(), flush=True)
    return {"steps": len(found["steps"]), "done_before": again, "seconds": round(seconds, 1), "cpu_s": round(spent, 1)}


def _cpu_s() -> float:
    """Return the processor time of all commands so far: on a busy machine, what a run costs."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def quick(folder: Path) -> list[str]:
    shared = ROOT.parent / "shared" / "data"
    if not shared.exists():
        print(f"{shared} does not exist: say where the shared data is")
        raise SystemExit(0)
    return [str(shared), "freesel-cifar10", "isal-coco-fcos", "--out", str(folder)]


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=lambda text: Path(text).absolute())
    parser.add_argument("names", nargs="*", metavar="NAME", help="Default: every recipe.")
    parser.add_argument("--out", required=True, type=lambda text: Path(text).absolute())
    known = parser.parse_args(arguments)
    known.out.mkdir(parents=True, exist_ok=True)
    cuts = pools(known.shared, known.out)
    done = {name: one(name, known.shared, known.out, cuts) for name in known.names or NAMES}
    print(json.dumps(done, sort_keys=True))


if __name__ == "__main__":
    begin(run, quick)
