"""Does the memory of listing a pool stay flat while the pool grows?

    python benchmarks/bench_listing.py [--rows 1,2,5] [--files 1000] [--ids]

Makes a Parquet list of so many million URIs that point at the same few files, with a label and two columns of metadata
(and ids of its own with --ids; without, the URIs are found not to be ids). Each size is opened and saved in a process of
its own. Memory is the peak of that process's anonymous memory, sampled, less what it has once everything is imported; it
holds 8 bytes a row while ids are compared. Mapped files are not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from bench_scale import memory_bytes
from data import machine

WRITE_ROWS = 200_000
RUN = """
import json, os, sys, time
from engine.places import Place
from engine.sources import load_pool, open_pool, read, save_pool
print("ready", flush=True)
sys.stdin.readline()
began = time.perf_counter()
pool = open_pool(sys.argv[1])
opened = time.perf_counter()
place = Place(sys.argv[2])
save_pool(pool, place)
saved = time.perf_counter()
last = list(read(load_pool(place), pool.num_rows - 64, pool.num_rows))
size = os.path.getsize(place.path)
facts = {"rows": pool.num_rows, "open_s": opened - began, "save_s": saved - opened, "last_64_s": time.perf_counter() - saved}
print(json.dumps({**facts, "listing_bytes": size, "id": pool.detail["id"], "last": last[-1].row}))
"""


def write_list(file: Path, rows: int, images: list[str], ids: bool) -> None:
    rng = np.random.default_rng(0)
    fields = [("uri", pa.string()), ("label", pa.string()), ("camera", pa.int32()), ("score", pa.float32())]
    schema = pa.schema(fields + ([("id", pa.string())] if ids else []))
    names = pa.array(images)
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, rows, WRITE_ROWS):
            n = min(WRITE_ROWS, rows - start)
            columns = [names.take(pa.array(rng.integers(0, len(images), n)))]
            columns.append(pa.array([f"class-{i}" for i in range(100)]).take(pa.array(rng.integers(0, 100, n))))
            columns += [pa.array(rng.integers(0, 9, n), pa.int32()), pa.array(rng.random(n), pa.float32())]
            columns += [pa.array([f"image-{i:012d}" for i in range(start, start + n)])] if ids else []
            writer.write_table(pa.table(columns, schema=schema))


def run(file: Path, out: Path) -> dict[str, float]:
    """Open a list in a fresh process; return its times and the peak of its memory."""
    command = [sys.executable, "-c", RUN, str(file), str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    watched = psutil.Process(process.pid)
    start = peak = memory_bytes(watched)
    process.stdin.write("go\n")
    process.stdin.flush()
    while process.poll() is None:
        peak = max(peak, memory_bytes(watched))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"listing {file} failed")
    facts = json.loads(process.stdout.read())
    rate = facts["rows"] / facts["open_s"]
    return {**facts, "rows_per_s": rate, "imported_mib": start / 2**20, "peak_mib": (peak - start) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,2,5", help="millions")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--ids", action="store_true")
    given = parser.parse_args()
    print(f"a Parquet list, {machine()}")
    print(
        f"{'rows':>12}{'open s':>9}{'rows/s':>11}{'save s':>9}{'listing MiB':>13}{'peak MiB':>10}{'bytes/row':>11}", flush=True
    )
    results = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "images"
        place.mkdir()
        images = [str(place / f"{i:06d}.png") for i in range(given.files)]
        for image in images:
            Path(image).write_bytes(b"not decoded here")
        for size in given.rows.split(","):
            rows = int(float(size) * 1e6)
            file = Path(folder) / f"{size}.parquet"
            write_list(file, rows, images, given.ids)
            found = run(file, Path(folder) / "pool.arrow")
            file.unlink()
            results.append(found)
            print(
                f"{rows:>12,}{found['open_s']:>9.1f}{found['rows_per_s']:>11,.0f}{found['save_s']:>9.2f}"
                f"{found['listing_bytes'] / 2**20:>13.0f}{found['peak_mib']:>10.0f}{found['peak_mib'] * 2**20 / rows:>11.1f}",
                flush=True,
            )
    print(json.dumps({"results": results, "ids": given.ids, "machine": machine()}, sort_keys=True))


if __name__ == "__main__":
    main()
