"""kill -9 of the driver, of an actor, of a node: what is finished stays, what is missing is made, nothing twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.embed import embed
from engine.verbs import EmbedOptions

ROOT = Path(__file__).parents[1]
NUM_ROWS, PART = 1280, 64
SLOWLY = """
import os, sys, time
def slowly(log=sys.argv[1], pids=sys.argv[1] + ".pids"):
    from engine.encoders import PixelsEncoder
    encode = PixelsEncoder.encode
    def append(path, text):
        handle = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(handle, text)
        os.close(handle)
    def counted(self, batch, rows, sizes):
        append(pids, b"%d\\n" % os.getpid())
        time.sleep(float(os.environ["NAP_S"]))
        append(log, b"." * len(batch))
        return encode(self, batch, rows, sizes)
    PixelsEncoder.encode = counted
"""
"""Encodes slowly, and writes down a dot for every image and the process that did it."""
DRIVER = (
    SLOWLY
    + """
import runpy
words = sys.argv[2:]
if words[words.index("--workers") + 1] == "0":
    slowly()
else:
    import ray
    hook = {"worker_process_setup_hook": slowly}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2, runtime_env=hook)
sys.argv = ["coresift", *words]
runpy.run_module("cli", run_name="__main__")
"""
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survival") / "pool"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for row in range(NUM_ROWS):
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).save(folder / f"{row:04d}.png")
    for row in (3, 700):
        (folder / f"{row:04d}.png").write_bytes(b"words")
    return folder


def unbroken(pool, out, **given):
    return embed(EmbedOptions(pool=str(pool), out=str(out), encoder="pixels", workers=0, **given))


def same(killed: Path, whole: Path) -> bool:
    """Whether two stores have the same bytes, and manifests that differ in times alone."""
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(killed) for path in killed.rglob("*") if path.is_file())
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (killed, whole)]
    for manifest in manifests:
        del manifest["time"], manifest["published"]
    assert manifests[0] == manifests[1]
    return all((killed / name).read_bytes() == (whole / name).read_bytes() for name in files if name.name != "manifest.json")


class Run:
    """A command in a process of its own; its actors, if it has some, are on a Ray of its own."""

    def __init__(self, log: Path, pool: Path, out: Path, workers: int) -> None:
        words = ["embed", str(pool), "--out", str(out), "--encoder", "pixels", "--workers", str(workers), "--quiet"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NAP_S": "0.05"}
        self.log = log
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER, str(log), *words], cwd=ROOT, env=environment)

    def until(self, encoded: int) -> bool:
        """Wait until so many images are encoded in all, over all runs; return whether the run still goes on."""
        while self.process.poll() is None and count(self.log) < encoded:
            time.sleep(0.01)
        return self.process.poll() is None

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL


def count(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


@pytest.mark.parametrize(("workers", "kills"), [(0, 10), (1, 3)])
def test_kill_of_the_driver_at_random_moments(pool, tmp_path, workers, kills):
    whole, out, log, rng = tmp_path / "whole", tmp_path / "out", tmp_path / "log", random.Random(workers)
    unbroken(pool, whole)
    killed = 0
    while killed < kills:
        run = Run(log, pool, out, workers)
        assert run.until(count(log) + rng.randint(1, NUM_ROWS // kills)), "it ended before it was killed"
        time.sleep(rng.uniform(0, 0.1))
        run.kill()
        killed += 1
        time.sleep(0 if workers == 0 else 3)  # what Ray had started ends with its driver, a little later
    assert not (out / "manifest.json").exists()
    last = Run(log, pool, out, workers)
    assert last.process.wait() == 0
    assert NUM_ROWS - 2 <= count(log) <= NUM_ROWS + kills * PART
    assert same(out, whole)


def test_kill_of_an_actor_at_random_moments(pool, tmp_path):
    whole, out, log, rng = tmp_path / "whole", tmp_path / "out", tmp_path / "log", random.Random(5)
    unbroken(pool, whole)
    run, killed = Run(log, pool, out, 1), set()
    for _ in range(3):
        assert run.until(count(log) + rng.randint(20, 250))
        victim = int(Path(f"{log}.pids").read_text().split()[-1])
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
    assert run.process.wait() == 0
    assert len(killed) == 3
    assert NUM_ROWS - 2 <= count(log) <= NUM_ROWS + 3 * PART
    assert same(out, whole)


CLUSTER = (
    SLOWLY
    + """
if __name__ == "__main__":
    import json
    import ray
    from ray.cluster_utils import Cluster
    from engine.embed import embed
    from engine.verbs import EmbedOptions

    pool, out, temporary, decode = sys.argv[2:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "temp_dir": temporary})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": slowly})
    removed = []

    def progress(stage, done, total, note):
        if done >= total // 4 and not removed:
            removed.append(done)
            cluster.remove_node(nodes[0], allow_graceful=False)

    given = {"decode_workers": 1, "workers": 3} if decode == "tasks" else {"workers": 3, "cpus_per_worker": 2}
    manifest = embed(EmbedOptions(pool=pool, out=out, encoder="pixels", **given), progress)
    alive = sum(node["Alive"] for node in ray.nodes())
    with open(sys.argv[1] + ".facts", "w") as file:
        json.dump({"removed": removed, "alive": alive, "rows": manifest["num_vectors"]}, file)
    ray.shutdown()
    cluster.shutdown()
"""
)


@pytest.mark.parametrize("decode", ["actors", "tasks"])
def test_a_node_is_removed_in_mid_run(pool, tmp_path, decode):
    """Three nodes of two CPUs; one of them goes after a quarter of the pool, with whatever runs on it."""
    import tempfile

    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    unbroken(pool, whole, **({"cpus_per_worker": 2} if decode == "actors" else {}))
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # sockets have short names
        words = [sys.executable, "-c", CLUSTER, str(log), str(pool), str(out), short, decode]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NAP_S": "0.3"}
        subprocess.run(words, cwd=ROOT, env=environment, timeout=400, check=True)
    facts = json.loads(Path(f"{log}.facts").read_text())
    assert (facts["alive"], facts["rows"]) == (2, NUM_ROWS - 2)
    assert NUM_ROWS // 4 <= facts["removed"][0] < NUM_ROWS
    assert same(out, whole)
