"""Memory is bounded by the block: no (n, b) array anywhere, and a streamed pool is never held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_contract import QUICK

from engine.select import STRATEGIES

TESTS = Path(__file__).parent
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")

METER = """
import sys, threading, time
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

class Meter:
    def __enter__(self):
        self.before, self.grown, self.on = anonymous(), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while self.on:
            self.grown = max(self.grown, anonymous() - self.before)
            time.sleep(0.002)
    def __exit__(self, *error):
        self.on = False
        self.thread.join()
"""

EVERY_STRATEGY = (
    METER
    + """
import ctypes, gc, json
import numpy as np
import torch
from engine.runner import run_method
from engine.select import strategy_options
from engine.shards import Request, from_array
torch.set_num_threads(1)
cases, grown = json.loads(sys.argv[1]), {}
for name, (n, b, given) in cases.items():
    x = np.random.default_rng(0).standard_normal((n, 16)).astype(np.float32)
    probs = np.random.default_rng(1).dirichlet(np.ones(10), n).astype(np.float32)
    predictions = {"probs": probs, "influence": x[:, :1], "stability": x[:, 1:2]}
    shards = from_array(x, np.arange(n) % 10, predictions=predictions)
    _, method, options = strategy_options(name, given)
    small = Request(3, 0, np.empty(0, dtype=np.int64))
    run_method(method, shards, small, options)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with Meter() as fixed:
        run_method(method, shards, small, options)
    with Meter() as meter:
        run_method(method, shards, Request(b, 0, np.empty(0, dtype=np.int64)), options)
    grown[name] = meter.grown - fixed.grown
print(json.dumps(grown))
"""
)

SIZES = {"maxherding": (8_000, 5_000), "probcover": (12_000, 6_000)}
"""(n, b) where the usual ones take too long."""
USUAL = (20_000, 5_000)
"""The (n, b) array of float32 has 381 MiB."""


@pytest.fixture(scope="module")
def grown() -> dict[str, int]:
    """How much more anonymous memory each strategy took for b picks than for 3, at most, in bytes."""
    quick: dict[str, dict[str, Any]] = {**QUICK, "kmeans": {"restarts": 1, "iterations": 2}, "activeft": {"steps": 3}}
    cases = {name: (*SIZES.get(name, USUAL), quick.get(name, {})) for name in STRATEGIES}
    words = [sys.executable, "-c", EVERY_STRATEGY, json.dumps(cases)]
    done = subprocess.run(words, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@needs_proc
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_no_array_of_rows_times_picks(name: str, grown: dict[str, int]) -> None:
    n, b = SIZES.get(name, USUAL)
    assert grown[name] < 0.5 * 4 * n * b


STREAMED = (
    METER
    + """
import json
import torch
from engine.select import select
from engine.verbs import SelectOptions
torch.set_num_threads(1)
with Meter() as meter:
    for name, option in json.loads(sys.argv[3]).items():
        select(SelectOptions(features=sys.argv[1], out=f"{sys.argv[2]}/{name}", strategy=name, budget="100", seed=0,
                             option=tuple(option), memory_per_shard=sys.argv[4], workers=0))
print(meter.grown)
"""
)


@needs_proc
def test_a_streamed_pool_is_not_held(tmp_path: Path) -> None:
    """40,960 x 1,024 floats, 160 MiB: with 8 MiB for vectors a selection takes a fraction of them, and picks the same."""
    from engine.ingest import import_features
    from engine.verbs import ImportOptions

    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((40_960, 1024)).astype(np.float16))
    import_features(ImportOptions(file=str(tmp_path / "x.npy"), out=str(tmp_path / "features"), dtype="float16"))
    options = {"kmeans": ["restarts=1", "iterations=2"], "coreset": [], "activeft": ["steps=2"], "freesel": []}
    grown = {}
    for memory in ("8MiB", "1GiB"):
        words = [
            sys.executable,
            "-c",
            STREAMED,
            str(tmp_path / "features"),
            str(tmp_path / memory),
            json.dumps(options),
            memory,
        ]
        done = subprocess.run(words, cwd=TESTS.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        grown[memory] = int(done.stdout.splitlines()[-1])
    for name in options:
        picks = [(tmp_path / memory / name / "picks.parquet").read_bytes() for memory in grown]
        assert picks[0] == picks[1]
    assert grown["1GiB"] - grown["8MiB"] > 0.5 * 160 * 2**20
