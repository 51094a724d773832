"""How close does `coresift embed` come to a bare torch loop on the same images, model and threads?

    python benchmarks/bench_embed.py POOL [--rows N] [--model light|heavy] [embed's own options]

POOL is a Parquet file with image bytes, or a folder of images. Of it N rows are taken, from its start again where it has
fewer, and written as Parquet. Models: `light` is MobileNetV2 at 96 px, `heavy` vit_small_patch16_224, both with random
weights. Both sides decode, resize and encode every image; the bare loop is one process: read a row group, decode,
transform, forward. Given: whole-run wall time, steady rate (after the first part, or the same number of images), where
the time of coresift went by stage, peak memory (PSS summed over all processes of the run, so that shared pages count
once), and how the features agree. Without arguments it runs on scikit-learn's digits with a small random ResNet, so that
it needs nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from commands import digits

ROOT = Path(__file__).parents[1]
MODELS = {
    "light": ["--backbone", "mobilenetv2_100", "--weights", "random", "--image-size", "96"],
    "heavy": ["--backbone", "vit_small_patch16_224", "--weights", "random"],
}
GROUP_ROWS = 500
FIELDS = ["bytes", "path"]


def bare_loop(pool: str, threads: int, arguments: list[str], out: str) -> None:
    """Embed with plain torch; write the features and the times."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    from engine.backbones import build_backbone, preprocessing
    from engine.schema import build_options
    from engine.verbs import EmbedOptions

    began = time.perf_counter()
    torch.set_num_threads(threads)
    options = build_options(EmbedOptions, {"pool": pool, "out": "-", **parse(arguments)}, "bare loop")
    model = build_backbone(options).eval().to(memory_format=torch.channels_last)
    config = {**resolve_model_data_config(model), **preprocessing(model, options)}
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    transform = create_transform(**{key: config[key] for key in keys})
    batch, features, marks = [], [], []
    size = options.batch_size or 16

    def forward() -> None:
        with torch.inference_mode():
            images = torch.stack(batch).contiguous(memory_format=torch.channels_last)
            features.append(model(images).numpy())
        batch.clear()
        marks.append(time.perf_counter() - began)

    with pq.ParquetFile(pool) as file:
        for group in range(file.num_row_groups):
            for value in file.read_row_group(group, columns=["image"])["image"].to_pylist():
                batch.append(transform(Image.open(io.BytesIO(value["bytes"])).convert("RGB")))
                if len(batch) == size:
                    forward()
    if batch:
        forward()
    np.save(out, np.concatenate(features))
    Path(out + ".json").write_text(json.dumps({"marks": marks}))


def parse(arguments: list[str]) -> dict[str, object]:
    """Return embed's own flags as option values."""
    parsed: dict[str, object] = {}
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        parsed[name] = [*parsed.get(name, []), value] if name == "model_option" else value
    return parsed


def measured(command: list[str]) -> tuple[float, float]:
    """Run a command; return its wall time in s and the peak PSS of it and all its descendants in GiB."""
    began, peak, done = time.perf_counter(), 0.0, threading.Event()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def watch() -> None:
        nonlocal peak
        parent = psutil.Process(process.pid)
        while not done.wait(1.0):
            total = 0
            try:
                for member in [parent, *parent.children(recursive=True)]:
                    try:
                        total += member.memory_full_info().pss
                    except (psutil.NoSuchProcess, psutil.AccessDenied):
                        continue
            except psutil.NoSuchProcess:
                return
            peak = max(peak, total / 2**30)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return seconds, peak


def rows_of(pool: str, num_rows: int | None, folder: Path) -> str:
    """Write `num_rows` images of a pool (all, if None) as Parquet in row groups of GROUP_ROWS; return the file's path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if Path(pool).is_dir():
        files = sorted(path for path in Path(pool).iterdir() if path.is_file())
        images = pa.array([{"bytes": path.read_bytes(), "path": path.name} for path in files])
    else:
        images = pq.read_table(pool, columns=["image"])["image"].combine_chunks()
    data = images.field("bytes")
    at = [row % len(data) for row in range(num_rows or len(data))]
    struct = pa.StructArray.from_arrays([data.take(pa.array(at)), pa.array([f"{row}.img" for row in range(len(at))])], FIELDS)
    pq.write_table(pa.table({"image": struct}), folder / "rows.parquet", row_group_size=GROUP_ROWS)
    return str(folder / "rows.parquet")


def stages(spent: dict[str, Any], wall: float) -> list[tuple[str, float]]:
    """Return where the wall time went, in order, and then, summed over all actors, what they did."""
    steady = spent["seconds_s"] - spent["first_part_s"]
    found = [
        ("before and after: imports, listing, leaving", wall - spent["seconds_s"]),
        ("start of Ray, and the model once", spent["ready_s"]),
        ("until the first part", spent["first_part_s"] - spent["ready_s"]),
        ("from the first part to the last", steady),
    ]
    return found + [(f"actors: {name.removesuffix('_s')}", value) for name, value in spent["stages"].items()]


def shown(value: float | None) -> str:
    """Return a number, or a dash where the run had no steady part: one part, or all at once."""
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    if sys.argv[1:2] == ["--bare"]:
        bare_loop(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", nargs="?")
    parser.add_argument("--rows", type=int, help="images to take")
    parser.add_argument("--model", choices=sorted(MODELS), help="instead of embed's own options")
    parser.add_argument("--keep", help="folder to leave the features in")
    known, arguments = parser.parse_known_args()
    import numpy as np

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pool = rows_of(known.pool, known.rows, folder) if known.pool else digits(folder)[0]
        if known.model:
            arguments = [*MODELS[known.model], *arguments]
        elif not known.pool:
            arguments = ["--backbone", "resnet18", "--weights", "random", "--image-size", "64"]
        out = known.keep or str(folder / "features")
        threads = len(os.sched_getaffinity(0))
        bare_wall, bare_peak = measured(
            [sys.executable, __file__, "--bare", pool, str(threads), json.dumps(arguments), str(folder / "bare.npy")]
        )
        wall, peak = measured([sys.executable, "-m", "cli", "embed", pool, "--out", out, *arguments])
        bare = json.loads((folder / "bare.npy.json").read_text())
        from engine.store import FeatureStore

        store = FeatureStore(out)
        ours, theirs = store.vectors(), np.load(folder / "bare.npy")
        cosine = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
        n, spent = len(ours), store.manifest["time"]
        steady = spent["steady_rows_per_s"]
        marks = bare["marks"]
        after = len(marks) // 20
        bare_steady = (n - n * (after + 1) / len(marks)) / (marks[-1] - marks[after])
    rows = [
        ("", "bare torch loop", "coresift embed", "ratio"),
        ("whole run, s", f"{bare_wall:.1f}", f"{wall:.1f}", f"{bare_wall / wall:.2f}"),
        ("whole run, images/s", f"{n / bare_wall:.1f}", f"{n / wall:.1f}", f"{bare_wall / wall:.2f}"),
        ("steady, images/s", f"{bare_steady:.1f}", shown(steady), shown(steady and steady / bare_steady)),
        ("peak PSS, GiB", f"{bare_peak:.2f}", f"{peak:.2f}", ""),
    ]
    print(f"{n} images, {threads} CPUs, {' '.join(arguments)}, least cosine {cosine.min():.7f}")
    for row in rows:
        print(f"{row[0]:<22}{row[1]:>18}{row[2]:>18}{row[3]:>8}")
    ledger = stages(spent, wall)
    for name, seconds in ledger:
        print(f"{name:<44}{seconds:>9.1f} s")
    result = {
        "images": n,
        "stages_s": dict(ledger),
        "bare_s": bare_wall,
        "coresift_s": wall,
        "whole_ratio": bare_wall / wall,
        "steady_ratio": steady and steady / bare_steady,
        "bare_peak_gib": bare_peak,
        "peak_gib": peak,
        "least_cosine": float(cosine.min()),
        "versions": store.manifest["versions"],
    }
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()
