"""Does the memory of listing a pool stay flat while the pool grows?

    python benchmarks/bench_listing.py [--rows 1,2,5,10] [--files 1000] [--ids] [--embed WORKERS]

Makes a Parquet list of so many million URIs that point at the same few files, with a label and two columns of metadata
(and ids of its own with --ids; without, the URIs are found not to be ids). Each size is opened and saved in a process of
its own. With --embed it is embedded instead, by the `pixels` encoder, in that process (0) or on so many actors of Ray.
Memory is the peak of that process's anonymous and shared memory, sampled, less what it has once everything is imported.
Mapped files are not counted, nor are Ray's processes and actors.
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
import pyarrow as pa
import pyarrow.parquet as pq
from data import machine
from PIL import Image

WRITE_ROWS = 200_000
LISTED = ("rows", "open_s", "open_cpu_s", "rows_per_s", "save_s", "listing_mib", "peak_mib")
DIGITS = {"open_s": 1, "open_cpu_s": 1, "embed_s": 1, "save_s": 2}
RUN = """
import json, os, sys, time
from engine.places import Place
from engine.sources import load_pool, open_pool, read, save_pool
print("ready", flush=True)
sys.stdin.readline()
began, began_cpu = time.perf_counter(), time.process_time()
pool = open_pool(sys.argv[1])
opened, cpu_s = time.perf_counter(), time.process_time() - began_cpu
place = Place(sys.argv[2])
save_pool(pool, place)
saved = time.perf_counter()
last = list(read(load_pool(place), pool.num_rows - 64, pool.num_rows))
size = os.path.getsize(place.path) / 2**20
facts = {"rows": pool.num_rows, "open_s": opened - began, "open_cpu_s": cpu_s, "save_s": saved - opened}
facts["last_64_s"] = time.perf_counter() - saved
print(json.dumps({**facts, "listing_mib": size, "id": pool.detail["id"], "last": last[-1].row}))
"""
EMBED = """
import json, sys, time
import ray.data, torch
from engine.embed import embed
from engine.verbs import EmbedOptions
print("ready", flush=True)
sys.stdin.readline()
began = time.perf_counter()
found = embed(EmbedOptions(pool=sys.argv[1], out=sys.argv[2], encoder="pixels", workers=sys.argv[3]))
seconds = time.perf_counter() - began
print(json.dumps({"rows": found["num_rows"], "embed_s": seconds, "parts": len(found["parts"])}))
"""


def memory_bytes(pid: int) -> int:
    """Return the anonymous and shared memory of a process, without its children."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


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


def run(program: str, *words: str) -> dict[str, float]:
    """Open or embed a list in a fresh process; return its times and the peak of its memory."""
    command = [sys.executable, "-c", program, *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    start = peak = memory_bytes(process.pid)
    process.stdin.write("go\n")
    process.stdin.flush()
    while process.poll() is None:
        peak = max(peak, memory_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the run on {words[0]} failed")
    facts = json.loads(process.stdout.read().splitlines()[-1])
    rate = facts["rows"] / (facts.get("open_s") or facts["embed_s"])
    return {**facts, "rows_per_s": rate, "imported_mib": start / 2**20, "peak_mib": (peak - start) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,2,5,10", help="millions")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--ids", action="store_true")
    parser.add_argument("--embed", metavar="WORKERS")
    given = parser.parse_args()
    print(f"a Parquet list, {machine()}")
    shown = ("rows", "embed_s", "rows_per_s", "parts", "peak_mib") if given.embed else LISTED
    print("".join(f"{name:>13}" for name in shown), flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "images"
        place.mkdir()
        images = [str(place / f"{i:06d}.png") for i in range(given.files)]
        for image in images:
            Image.new("L", (16, 16)).save(image)
        for size in given.rows.split(","):
            rows = int(float(size) * 1e6)
            file = Path(folder) / f"{size}.parquet"
            write_list(file, rows, images, given.ids)
            out = str(Path(folder) / f"{size}.out")
            found = run(EMBED, str(file), out, given.embed) if given.embed else run(RUN, str(file), out)
            file.unlink()
            results.append(found)
            print("".join(f"{found[name]:>13,.{DIGITS.get(name, 0)}f}" for name in shown), flush=True)
    facts = {"ids": given.ids, "embed": given.embed, "machine": machine()}
    print(json.dumps({"results": results, **facts}, sort_keys=True))


if __name__ == "__main__":
    main()
