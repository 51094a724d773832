"""A run cut short after any step goes on to the same picks, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_contract import NOTHING, QUICK, clustered, shards_of
from test_invariance import same

from engine.folders import Place
from engine.runner import Journal, run_method
from engine.select import STRATEGIES, strategy_options
from engine.shards import LocalShards, LostShardError, Request, Step
from engine.store import FeatureStore

ROOT = Path(__file__).parents[1]
every_strategy = pytest.mark.parametrize("name", sorted(STRATEGIES))


class CutError(Exception):
    """Stands for a kill."""


def run(name: str, shards: LocalShards, journal: Journal | None = None, cut_after: int | None = None) -> Step:
    _, method, options = strategy_options(name, QUICK.get(name, {}))
    labeled = np.array([5, 17, 140], dtype=np.int64)
    seen = 0

    def progress(*facts: object) -> None:
        nonlocal seen
        seen += 1

    def cut(inner_shards, request, inner_options):  # type: ignore[no-untyped-def]
        for step in method(inner_shards, request, inner_options):
            yield step
            if cut_after is not None and seen > cut_after:
                raise CutError

    return run_method(cut, shards, Request(40, 0, labeled), options, progress, journal)


@every_strategy
@pytest.mark.parametrize("cut_after", [0, 1, 3])
def test_goes_on_from_the_journal(name: str, cut_after: int, tmp_path: Path) -> None:
    x = clustered(300)
    whole = run(name, shards_of(x))
    journal = Journal(Place(str(tmp_path / "journal.npz")), 0.0)
    try:
        run(name, shards_of(x), journal, cut_after)
    except CutError:
        assert journal.read() is not None
    assert same(run(name, shards_of(x), journal), whole)


@every_strategy
def test_goes_on_with_whatever_a_journal_of_its_last_steps_says(name: str, tmp_path: Path) -> None:
    """Cut before the last step: the step before it is in the journal."""
    x = clustered(300)
    _, method, options = strategy_options(name, QUICK.get(name, {}))
    shards = shards_of(x)
    run_method(method, shards, Request(40, 0, NOTHING), options)
    steps = list(method(shards_fresh(x), Request(40, 0, NOTHING), options))
    for resume in steps[-2:]:
        journal = Journal(Place(str(tmp_path / "journal.npz")), 0.0)
        journal.write(resume)
        assert same(run_method(method, shards_of(x), Request(40, 0, NOTHING), options, journal=journal), steps[-1])


def shards_fresh(x: np.ndarray) -> LocalShards:
    from engine.shards import prepare

    shards = shards_of(x)
    prepare(shards, NOTHING)
    return shards


class Fragile(LocalShards):
    """Shards that are lost, with all their state, at the calls named."""

    lost_at: tuple[int, ...] = ()
    calls = 0

    def map(self, fn, *args, combine=None, at=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        if self.calls in self.lost_at:
            for block in self.blocks:
                block.state.clear()
            raise LostShardError("an actor died")
        return super().map(fn, *args, combine=combine, at=at)


@every_strategy
@pytest.mark.parametrize("lost_at", [(2,), (3, 9), (5, 6, 7)])
def test_a_lost_shard_changes_nothing(name: str, lost_at: tuple[int, ...]) -> None:
    x = clustered(300)
    shards = Fragile(shards_of(x).blocks, 12)
    shards.lost_at = lost_at
    assert same(run(name, shards), run(name, shards_of(x)))


def test_shards_lost_again_and_again_are_an_error() -> None:
    from engine.schema import RunError

    shards = Fragile(shards_of(clustered(300)).blocks, 12)
    shards.lost_at = tuple(range(2, 100))
    with pytest.raises(RunError, match="lost 4 times in a row"):
        run("kmeans", shards)


def pool(tmp_path: Path) -> Path:
    """A store on which every strategy takes several steps."""
    from engine.ingest import import_features
    from engine.verbs import ImportOptions

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((300, 48)).astype(np.float32)
    x = centres[rng.integers(0, 300, 30_000)] + 0.8 * rng.standard_normal((30_000, 48)).astype(np.float32)
    np.savez(tmp_path / "x.npz", features=x, labels=rng.integers(0, 10, 30_000))
    import_features(ImportOptions(file=str(tmp_path / "x.npz"), out=str(tmp_path / "features")))
    return tmp_path / "features"


KILLED = {
    "kmeans": ["--budget", "300", "--option", "restarts=2", "--option", "iterations=8"],
    "coreset": ["--budget", "600", "--option", "candidates=32"],
    "activeft": ["--budget", "200", "--option", "steps=12"],
}
"""Strategies that keep state, on sizes that take several steps."""


def command(features: Path, out: Path, name: str, workers: int) -> list[str]:
    fixed = ["--strategy", name, "--out", str(out), "--journal-s", "0", "--workers", str(workers), "--quiet"]
    return [sys.executable, "-m", "cli", "select", str(features), *fixed, *KILLED[name]]


def journal_number(out: Path) -> int:
    step = Journal(Place(str(out / "journal.npz")), 0.0).read()
    return step.number if step else -1


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KILLED))
def test_kill_of_the_driver(name: str, tmp_path: Path) -> None:
    """kill -9 after the first journal entry, near the middle and before the last; then once more to the end."""
    features = pool(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(features, whole, name, 0), cwd=ROOT, check=True)
    numbers: list[int] = []
    for share in (0.0, 0.5, 0.9):
        process = subprocess.Popen(command(features, out, name, 0), cwd=ROOT)
        try:
            while process.poll() is None:
                step = Journal(Place(str(out / "journal.npz")), 0.0).read() if out.exists() else None
                if step is not None and step.number > max([-1, *numbers]) and step.number >= share * step.total:
                    break
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if not (out / "manifest.json").exists():
            numbers.append(journal_number(out))
    assert numbers, "the run ended before it could be killed"
    assert numbers == sorted(numbers)
    subprocess.run(command(features, out, name, 0), cwd=ROOT, check=True)
    assert (out / "picks.parquet").read_bytes() == (whole / "picks.parquet").read_bytes()
    assert not (out / "journal.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KILLED))
def test_kill_of_a_shard_actor(ray_session: None, name: str, tmp_path: Path) -> None:
    """An actor's process is killed with -9 after the first step, in the middle and before the last."""
    import ray

    from engine.schema import parse_pairs
    from engine.shards import RayShards, Reading

    features = FeatureStore(str(pool(tmp_path)))
    given = parse_pairs([word for word in KILLED[name] if "=" in word], "option")
    _, method, options = strategy_options(name, given)
    request = Request(int(KILLED[name][1]), 0, NOTHING)
    from engine.shards import open_local

    whole = run_method(method, open_local(features, Reading(True)), request, options)
    shards = RayShards(features, 2, 2, Reading(True))
    killed: list[int] = []

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if len(killed) < 3 and done >= (0, 0.5, 0.85)[len(killed)] * total:
            victim = shards.actors[len(killed) % 2]
            pid = ray.get(victim.pid.remote())
            os.kill(pid, signal.SIGKILL)
            killed.append(done)

    try:
        assert same(run_method(method, shards, request, options, progress), whole)
        assert len(killed) == 3
    finally:
        shards.close()
