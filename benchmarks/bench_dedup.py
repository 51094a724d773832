"""How many planted near copies does `dedup` find, and how many others does it take for copies? Which are real leaks?

    python benchmarks/planted.py ../shared/data/cifar10/train.parquet planted.parquet
    python benchmarks/bench_dedup.py PLANTED planted.parquet TRAIN TEST --pools train.parquet test.parquet \
        [--picture leaks.jpg]

PLANTED, TRAIN and TEST are feature stores. Each way at several thresholds. Recall: planted copies that are told to be a
copy of the image they were made from, or are kept while that is dropped for it. An image that is dropped for one that is
not its planted twin is counted apart (`other`): CIFAR-10 has near copies of its own, so not all of them are wrong, and
precision, which takes all of them for wrong, is a lower bound. The picture has the closest pairs of test and training images.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from commands import begin, coresift, digits
from data import machine
from PIL import Image, ImageDraw

from engine.dedup import dedup
from engine.verbs import DedupOptions

WAYS: list[dict[str, Any]] = [
    *({"by": "phash", "max_bits": bits} for bits in (0, 2, 4, 6, 8)),
    *(
        {"by": "both", "wide_bits": bits, "min_cosine": cosine}
        for bits, cosine in ((8, 0.45), (12, 0.45), (14, 0.45), (14, 0.55), (14, 0.6))
    ),
    *({"by": "embedding", "eps": eps} for eps in (0.02, 0.03, 0.05)),
]
SHOWN, SIDE_PX, GAP_PX = 40, 96, 8


def found_by(features: str, **given: Any) -> tuple[pa.Table, float]:
    """Return excluded.parquet of a run, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        dedup(DedupOptions(features=features, out=folder, workers=0, **given))
        return pq.read_table(Path(folder) / "excluded.parquet"), time.perf_counter() - began


def told(table: pa.Table, source: np.ndarray, kind: np.ndarray) -> dict[str, float]:
    """Return recall, of each kind and of all; precision, and the pairs that were not planted."""
    rows, kept = table["row"].to_numpy(), table["kept_row"].to_numpy()
    root = np.where(source >= 0, source, np.arange(len(source)))
    right = root[rows] == root[kept]
    found = np.isin(np.flatnonzero(source >= 0), np.where(source[rows] >= 0, rows, kept)[right])
    kinds = kind[source >= 0]
    by_kind = {name: float(found[kinds == name].mean()) for name in np.unique(kinds)}
    return {**by_kind, "recall": float(found.mean()), "precision": float(right.mean()), "other": int((~right).sum())}


def sheet(pairs: pa.Table, pools: list[str], out: str) -> None:
    """Write a picture of pairs: each test image above its nearest training image."""
    tables = [pq.read_table(pool)["image"] for pool in pools]
    columns, height = 10, 2 * SIDE_PX + GAP_PX + 16
    picture = Image.new("RGB", (columns * (SIDE_PX + GAP_PX) + GAP_PX, -(-SHOWN // columns) * height + GAP_PX), "white")
    draw = ImageDraw.Draw(picture)
    for number, pair in enumerate(pairs.slice(0, SHOWN).to_pylist()):
        left, top = GAP_PX + number % columns * (SIDE_PX + GAP_PX), GAP_PX + number // columns * height
        for below, (table, row) in enumerate(zip(tables, (pair["kept_row"], pair["row"]), strict=True)):
            image = Image.open(io.BytesIO(table[row]["bytes"].as_py())).convert("RGB")
            picture.paste(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST), (left, top + (1 - below) * SIDE_PX))
        draw.text((left, top + 2 * SIDE_PX + 1), f"{pair['bits']} bits, {pair['similarity']:.2f}", fill="black")
    picture.save(out, quality=88)


def run(arguments: list[str]) -> None:
    """Run, print tables, and JSON."""
    parser = argparse.ArgumentParser()
    for name in ("planted", "pool", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--pools", nargs=2, required=True)
    parser.add_argument("--picture")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pool = pq.read_table(given.pool, columns=["source", "kind"])
    source, kind = pool["source"].to_numpy(), np.array(pool["kind"].to_pylist(), dtype=object)
    kind[source < 0] = ""
    rows = []
    print(f"{'way':56} {'jpeg':>7} {'crop':>7} {'bright.':>7} {'recall':>7} {'precision':>9} {'other':>6} {'s':>6}", flush=True)
    for way in WAYS:
        table, seconds = found_by(given.planted, **way)
        found = told(table, source, kind.astype(str))
        rows.append({**way, **found, "seconds": round(seconds, 1)})
        shares = " ".join(f"{found[name]:7.3f}" for name in ("jpeg", "crop", "brightness", "recall"))
        print(f"{way!s:56} {shares} {found['precision']:9.3f} {found['other']:6} {seconds:6.1f}", flush=True)
    leaks = []
    for way in ({"by": "exact"}, {"by": "phash"}, {"by": "both"}):
        table, seconds = found_by(given.test, against=given.train, **way)
        leaks.append({**way, "test_images": len(table), "seconds": round(seconds, 1)})
        print(f"test images with a copy in train, {way}: {len(table)} ({seconds:.1f} s)", flush=True)
    if given.picture:
        closest = np.lexsort((-table["similarity"].to_numpy(), table["bits"].to_numpy() > 4))
        sheet(table.take(pa.array(closest)), [given.pools[0], given.pools[1]], given.picture)
    print(json.dumps({"planted": rows, "leaks": leaks, "machine": machine()}))


def larger(pool: str, out: Path) -> str:
    """Write a pool's images at 32 x 32 px; return the file."""
    table = pq.read_table(pool)
    made = []
    for image in table["image"].to_pylist():
        sink = io.BytesIO()
        Image.open(io.BytesIO(image["bytes"])).resize((32, 32)).save(sink, "PNG")
        made.append({"bytes": sink.getvalue(), "path": image["path"]})
    pq.write_table(pa.table({"image": pa.array(made, table.schema.field("image").type)}), out)
    return str(out)


def quick(folder: Path) -> list[str]:
    """Return the arguments of a run on scikit-learn's digits with 60 planted copies."""
    small = digits(folder, 300)
    pool, test = (larger(file, folder / f"larger-{name}.parquet") for file, name in zip(small, ("pool", "test"), strict=True))
    planted.main(pool, str(folder / "planted.parquet"), copies=60)
    stores = {str(folder / name): file for name, file in (("p", str(folder / "planted.parquet")), ("a", pool), ("b", test))}
    for store, file in stores.items():
        coresift("embed", file, "--out", store, "--encoder", "pixels", "--workers", "0")
    made, train, held = stores
    return [made, str(folder / "planted.parquet"), train, held, "--pools", pool, test]


if __name__ == "__main__":
    begin(run, quick)
