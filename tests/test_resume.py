"""A run cut short after any step goes on to the same picks, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_contract import NOTHING, QUICK, clustered, probabilities, shards_of
from test_invariance import same

from engine.places import Place
from engine.runner import Journal, run_method
from engine.select import STRATEGIES, strategy_options
from engine.shards import LocalShards, LostShardError, RayShards, Reading, Request, Step, open_local
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


@dataclass(frozen=True)
class Case:
    """A run of a strategy that takes several steps: rows of the pool, picks, options."""

    rows: int
    budget: int
    options: dict[str, str] = field(default_factory=dict)


KILLED = {
    "kmeans": Case(30_000, 300, {"restarts": "2", "iterations": "8"}),
    "coreset": Case(30_000, 600, {"candidates": "32"}),
    "activeft": Case(30_000, 200, {"steps": "12"}),
    "freesel": Case(20_000, 2000),
    "badge": Case(20_000, 2000),
    "typiclust": Case(10_000, 100),
    "hierarchical": Case(20_000, 200, {"levels": "300,20"}),
    "maxherding": Case(9_000, 60, {"candidates": "1000"}),
    "probcover": Case(9_000, 300, {"delta": "1.1", "candidates": "2000"}),
    "facility_location": Case(9_000, 4000),
}
"""Every strategy but those that take one step and keep nothing: `random`, `uniform`, and those on a model's outputs."""
PLACES = (0.0, 0.5, 1.0)
"""Where a run is killed: after its first journal entry, near the middle, before the last."""

DRIVER = """
import os, runpy, signal, sys
from engine.runner import Journal
target, sys.argv = int(sys.argv[1]), ["coresift", *sys.argv[2:]]
write = Journal.write
def write_and_die(self, step):
    write(self, step)
    if step.number >= target:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.write = write_and_die
runpy.run_module("cli", run_name="__main__")
"""
"""The command line in a process that kills itself once the journal holds a step of the number named."""
NEVER = 10**9


def pool(tmp_path: Path, rows: int) -> Path:
    from engine.ingest import import_features
    from engine.verbs import ImportOptions

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((300, 48)).astype(np.float32)
    x = centres[rng.integers(0, 300, rows)] + 0.8 * rng.standard_normal((rows, 48)).astype(np.float32)
    np.savez(tmp_path / "x.npz", features=x, labels=rng.integers(0, 10, rows))
    import_features(ImportOptions(file=str(tmp_path / "x.npz"), out=str(tmp_path / "features")))
    np.savez(tmp_path / "p.npz", features=probabilities(x))
    import_features(ImportOptions(file=str(tmp_path / "p.npz"), out=str(tmp_path / "probs"), holds="probs"))
    return tmp_path / "features"


def targets(numbers: list[int]) -> list[int]:
    """Return the step numbers at which a run that counts like this is killed: three, the last step's not among them."""
    before_the_last = sorted(set(numbers))[:-1]
    places = [before_the_last[round(share * (len(before_the_last) - 1))] for share in PLACES]
    assert len(set(places)) == 3, f"the run has too few steps to be killed three times: {numbers}"
    return places


def unbroken(name: str, features: Path) -> tuple[Step, list[int]]:
    """Run a case here without a cut; return its last step and the numbers of all."""
    case, numbers = KILLED[name], []

    def progress(stage: str, done: int, total: int, note: str) -> None:
        numbers.append(done)

    _, method, options = strategy_options(name, case.options)
    shards = open_local(FeatureStore(str(features)), Reading(True, predictions=str(features.parent / "probs")))
    return run_method(method, shards, Request(case.budget, 0, NOTHING), options, progress), numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KILLED))
def test_kill_of_the_driver(name: str, tmp_path: Path) -> None:
    """kill -9 after the first journal entry, near the middle and before the last; then once more to the end."""
    case, features, out = KILLED[name], pool(tmp_path, KILLED[name].rows), tmp_path / "killed"
    whole, numbers = unbroken(name, features)
    pairs = [word for option in case.options.items() for word in ("--option", "=".join(option))]
    given = ["select", str(features), "--strategy", name, "--budget", str(case.budget), "--out", str(out), *pairs]
    given += ["--predictions", str(features.parent / "probs")] if STRATEGIES[name].predictions else []
    journal = Journal(Place(str(out / "journal.npz")), 0.0)

    def until(target: int) -> int:
        words = [sys.executable, "-c", DRIVER, str(target), *given, "--journal-s", "0", "--workers", "0", "--quiet"]
        return subprocess.run(words, cwd=ROOT, check=False).returncode

    reached: list[int] = []
    for target in targets(numbers):
        assert until(target) == -signal.SIGKILL
        step = journal.read()
        assert step is not None
        assert target <= step.number < step.total
        reached.append(step.number)
    assert len(set(reached)) == 3
    assert until(NEVER) == 0
    assert not (out / "journal.npz").exists()
    picks = pq.read_table(out / "picks.parquet")
    assert picks["row"].to_numpy().tobytes() == whole.picks.tobytes()
    assert picks["gain"].to_numpy(zero_copy_only=False).tobytes() == whole.gains.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KILLED))
def test_kill_of_a_shard_actor(ray_session: None, name: str, tmp_path: Path) -> None:
    """An actor's process is killed with -9 after the first step, near the middle and before the last."""
    import ray

    case, features = KILLED[name], pool(tmp_path, KILLED[name].rows)
    whole, numbers = unbroken(name, features)
    _, method, options = strategy_options(name, case.options)
    shards = RayShards(FeatureStore(str(features)), 2, 2, Reading(True, predictions=str(features.parent / "probs")))
    killed: list[int] = []
    noticed: list[str] = []
    places = targets(numbers)

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if note.startswith("a shard was lost"):
            noticed.append(note)
        if len(killed) < 3 and done >= places[len(killed)] and done < total:
            victim = shards.actors[len(killed) % len(shards.actors)]
            os.kill(ray.get(victim.pid.remote()), signal.SIGKILL)
            killed.append(done)

    try:
        assert same(run_method(method, shards, Request(case.budget, 0, NOTHING), options, progress), whole)
        assert len(set(killed)) == len(noticed) == 3
        assert len(shards.actors) == 2
    finally:
        shards.close()
