"""What a billion images do to the driver: measured where a stand-in of the size can be made, computed where it can't.

    python benchmarks/bench_billion.py [--rows 1000000000] [--labeled 10000000]

A store's manifest with as many parts as the pool would have, without the parts; a selection on as many blocks, of a few rows
each; rows that are labelled or left out. Then bytes of every strategy's messages at that size, from `jobs/traffic.py`.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from data import machine

from engine.blocks import among, fixed_point_scale, vector_scale
from engine.folders import begin, digest_of
from engine.places import Place
from engine.runner import run_method
from engine.schema import BLOCK_ROWS
from engine.select import strategy_options
from engine.shards import Request, from_array, prepare
from engine.store import FeatureStore, part_name, publish_features
from jobs.selecting import filled
from jobs.traffic import LEGS, Size, driver_bytes, row_bytes

FEW = 8
"""Rows of a block of the stand-in."""
DIM, PICKS, SHARDS = 384, 100_000, 64


def timed(what: str, work: Callable[[], Any], results: dict[str, float]) -> Any:
    """Run work; print and keep its CPU seconds, and by how much the process's peak memory grew."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = work()
    spent = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    results[what] = spent
    print(f"{what:<76}{spent:>9.2f} s{grown:>9.2f} GiB", flush=True)
    return found


def fake(place: Place, rows: int) -> None:
    """Publish the manifest of a store of so many rows, without its parts."""
    begin(place, "features", {}, {"rows": rows}, overwrite=False)
    counts = {"num_labeled": 0, "num_rejected": 0, "bytes": BLOCK_ROWS * 1600, "sha256": "0" * 64}
    starts = range(0, rows, BLOCK_ROWS)
    parts = [
        {
            "name": part_name(s),
            "start": s,
            "stop": min(s + BLOCK_ROWS, rows),
            "num_vectors": min(BLOCK_ROWS, rows - s),
            **counts,
        }
        for s in starts
    ]
    facts = {"num_rows": rows, "num_rejected": 0, "dim": DIM, "dtype": "float16", "class_names": None, "column": "embedding"}
    publish_features(place, parts, facts)


def driver(rows: int, labeled: int, results: dict[str, float]) -> None:
    """Measure what the driver does with a store of this size, whatever the method."""
    blocks = -(-rows // BLOCK_ROWS)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder).at("store")
        timed(f"publish a manifest of {blocks:,} parts", lambda: fake(place, rows), results)
        size = place.fs.get_file_info(place.at("manifest.json").path).size
        print(f"    manifest.json: {size / 2**20:.1f} MiB")
        timed("open it, as the driver and every shard do", lambda: FeatureStore(place.address), results)
    rng = np.random.default_rng(0)
    some = np.unique(rng.integers(0, rows, labeled))
    timed(f"digest of {labeled:,} labelled rows", lambda: digest_of(some.tolist()), results)
    block = np.arange(rows // 2, rows // 2 + BLOCK_ROWS)
    timed("leave them out of a block", lambda: among(block, some), results)
    timed("the same by np.isin over all of them", lambda: np.isin(block, some), results)


def selection(rows: int, results: dict[str, float]) -> None:
    """Measure methods on a tenth as many blocks: what each call costs beside the work on rows."""
    blocks = -(-rows // BLOCK_ROWS // 10)
    x = np.random.default_rng(0).standard_normal((blocks * FEW, 16)).astype(np.float32)
    shards = timed(f"{blocks:,} blocks of {FEW} rows in one process", lambda: from_array(x, block_rows=FEW), results)
    nothing = np.empty(0, dtype=np.int64)
    timed("prepare", lambda: prepare(shards, nothing), results)
    wanted = np.sort(np.random.default_rng(1).choice(len(x), 1024, replace=False))
    timed("take 1,024 rows", lambda: shards.take(wanted), results)
    for name, given in (("random", {}), ("coreset", {})):
        _, method, options = strategy_options(name, given)
        timed(f"{name}, 256 picks", lambda m=method, o=options: run_method(m, shards, Request(256, 0, nothing), o), results)


def computed(rows: int) -> None:
    """Print what every strategy sends and holds at this size."""
    print(f"\n{rows:,} vectors of {DIM} floats, {PICKS:,} picks, {SHARDS} shards; MiB; a shard: beside its vectors")
    print(f"{'strategy':<20}{'largest call':>18}{'largest answer':>18}{'driver':>18}{'a shard':>18}")
    for name in LEGS:
        size = Size(rows, PICKS, DIM, SHARDS, filled(name, {}))
        legs = LEGS[name](size)
        answer = max(leg.up * (1 if leg.folded else SHARDS) for leg in legs)
        sent, held = max(leg.down for leg in legs), row_bytes(name, size) * rows / SHARDS
        figures = (sent, answer, driver_bytes(name, size), held)
        print(f"{name:<20}" + "".join(f"{figure / 2**20:>18,.1f}" for figure in figures))
    vectors = 4 * rows * DIM / SHARDS / 2**30
    print(f"vectors of a shard: {vectors:,.1f} GiB as float32")
    bits = -np.log2(1 / vector_scale(rows, 1.0)), -np.log2(1 / fixed_point_scale(rows, 4 * DIM))
    print(f"fixed point: entries of unit vectors to 2^-{bits[0]:.0f}, squared distances to 2^-{bits[1]:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000_000)
    parser.add_argument("--labeled", type=int, default=10_000_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, float] = {}
    driver(given.rows, given.labeled, results)
    selection(given.rows, results)
    computed(given.rows)
    print(json.dumps({"cpu_s": results, "rows": given.rows, "machine": machine()}, sort_keys=True))


if __name__ == "__main__":
    main()
