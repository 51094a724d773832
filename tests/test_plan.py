"""`coresift plan`: measured on a little of a job, it says what the whole takes, and writes nothing in OUT."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_contract import clustered

from cli.main import run
from engine import session
from engine.schema import InputError
from engine.select import STRATEGIES
from engine.verbs import VERBS
from jobs import selecting
from jobs.embedding import ranges
from jobs.expand import expand
from jobs.overlay import load
from jobs.plan import cluster_of, plan
from jobs.plan_options import PlanOptions
from jobs.selecting import GROWTH, PLAIN, Measured, Point
from jobs.traffic import LEGS, Size
from jobs.work import START_S, Cluster, Work, enough, worker_seconds

NODE = Cluster(cpus=16, gpus=0, memory=64e9, network=None)
JOB = """
pool: {pool}
out: {out}
resources: {{workers: 0}}
steps:
  - embed: {{encoder: pixels, pixels_size: 4}}
    as: features
  - for: {{strategy: [kmeans, coreset, random]}}
    steps:
      - select: {{features: $features, strategy: $strategy, budget: 10%}}
        as: picks
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images in the class folders a and b."""
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(3)
    for row in range(200):
        file = folder / "ab"[row % 2] / f"{row:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file)
    return folder


def job_of(folder: Path, pool: Path, text: str = JOB) -> Path:
    file = folder / "job.yaml"
    file.write_text(text.format(pool=pool, out=folder / "out"))
    return file


def planned(job: Path, **given: Any) -> dict[str, Any]:
    return plan(PlanOptions(job=str(job), **{"probe_rows": 32, "workers": (0, 4), **given}))


def by_step(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["step"]: step for step in found["steps"]}


def test_says_what_a_job_then_writes(pool: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path, pool)
    found = planned(job)
    assert not (tmp_path / "out").exists()
    steps = by_step(found)
    assert list(steps) == ["features", "picks/kmeans", "picks/coreset", "picks/random"]
    assert steps["features"]["basis"].startswith("measured on")
    assert steps["picks/kmeans"]["basis"].startswith("modelled from")
    assert all(line["seconds_s"] >= 0 and line["worker_bytes"] > 0 for step in steps.values() for line in step["times"])
    total = [line["seconds_s"] for line in found["total"]["times"]]
    assert total == pytest.approx([sum(s["times"][at]["seconds_s"] for s in steps.values()) for at in (0, 1)], abs=0.01)
    assert "cost" not in found["total"]["times"][0]
    for step in expand(load(str(job))):
        VERBS[step.verb].load()(step.options, lambda *_: None)
    written = sum(file.stat().st_size for file in (tmp_path / "out" / "features" / "parts").iterdir())
    assert steps["features"]["storage_bytes"] == pytest.approx(written, rel=0.35)  # metadata of small parts
    assert {step["why_not"] for step in planned(job)["steps"]} == {"done before"}


def test_keeps_what_it_measured(pool: Path, tmp_path: Path) -> None:
    job, file = job_of(tmp_path, pool), tmp_path / "probe.json"
    first = planned(job, out=str(file))
    again = planned(job, probe=str(file))
    assert first["measured_now"] == 4
    assert again["measured_now"] == 0
    assert [s["times"] for s in again["steps"]] == [s["times"] for s in first["steps"]]
    file.write_text("{}")
    with pytest.raises(InputError, match="not what `coresift plan --out` wrote"):
        planned(job, probe=str(file))


def test_plans_for_a_pool_that_is_a_sample(pool: Path, tmp_path: Path) -> None:
    job, file = job_of(tmp_path, pool), tmp_path / "probe.json"
    small = by_step(planned(job, out=str(file), rows=10_000_000))
    large = by_step(planned(job, probe=str(file), rows=1_000_000_000, workers=(64,), price=2.0, memory_per_node="1GiB"))
    assert large["features"]["storage_bytes"] == pytest.approx(100 * small["features"]["storage_bytes"], rel=1e-6)
    assert large["features"]["images"] == 1_000_000_000
    line = large["features"]["times"][0]
    assert line["cost"] == pytest.approx(64 * line["seconds_s"] / 3600 * 2, rel=1e-3)
    found = planned(job, probe=str(file), rows=1_000_000_000, workers=(64,), memory_per_node="1GiB")
    told = "\n".join(found["warnings"])
    assert "the driver would hold" in told
    assert "object store" in told
    assert "they are read again" in told
    assert "free" in told  # OUT does not fit this disk


def test_says_what_it_cannot_plan(pool: Path, tmp_path: Path) -> None:
    text = """
pool: {pool}
out: {out}
steps:
  - select: {{features: nowhere, strategy: random, budget: "10"}}
  - predict: {{checkpoint: nowhere}}
  - finetune: {{selection: nowhere, task: classify, model: test_resnet, weights: random}}
  - embed: {{encoder: influence, checkpoint: nowhere}}
"""
    found = planned(job_of(tmp_path, pool, text))
    whys = {step["verb"]: step["why_not"] for step in found["steps"]}
    assert "neither there nor written by a step above" in whys["select"]
    assert "neither there nor trained by a step above" in whys["predict"]
    assert "how many images" in whys["finetune"]
    assert "reference set" in whys["embed"]
    assert found["total"]["times"] == []


def test_trains_a_few_steps_to_plan_a_training(pool: Path, tmp_path: Path) -> None:
    text = """
pool: {pool}
out: {out}
steps:
  - select: {{features: features, strategy: random, budget: "40"}}
    as: picks
  - finetune: {{selection: all, task: classify, model: test_resnet, weights: random, image_size: 32,
                option: [batch_size=4, epochs=7]}}
    as: model
  - predict: {{checkpoint: $model}}
    as: probabilities
  - rounds: {{subject: "{pool}", strategy: margin, oracle: column, test: "{pool}", start: "20", add: "10", rounds: 3,
              task: classify, model: test_resnet, weights: random, image_size: 32, option: [batch_size=4, epochs=7]}}
"""
    found = planned(job_of(tmp_path, pool, text))
    steps = by_step(found)
    assert "350 steps" in steps["model"]["basis"]
    assert steps["model"]["bound"] == "the step is for one process"
    assert steps["probabilities"]["basis"].startswith("measured on")
    assert steps["rounds"]["basis"].startswith("measured as a training and an embedding: 3 of the one, 2 of the other")
    assert not (tmp_path / "out").exists()


def test_where_more_workers_stop_helping() -> None:
    plain = Work(worker_s=1000.0, pieces=100_000)
    workers, why = enough([plain], NODE)
    assert plain.seconds(workers, NODE) - plain.seconds(2 * workers, NODE) < 0.1 * plain.seconds(workers, NODE)
    assert (workers, why) == (512, "starting takes most of the rest")
    assert enough([Work(1e6, 7)], NODE) == (8, "there are only 7 parts")
    assert enough([Work(1e6, 1000, most=2)], NODE) == (2, "the step is for 2")
    assert enough([Work(1e6, 100_000, driver_s=1e5)], NODE)[1] == "the driver's own share does not shrink"
    assert enough([Work(1e6, 100_000, rounds=1e6)], NODE)[1] == "1,000,000 round trips to all workers"
    slow = Cluster(16, 0, 64e9, network=1e6)
    assert enough([Work(1e6, 100_000, down=1e9)], slow)[1] == "the network"


def test_what_it_costs_is_what_workers_are_held_for() -> None:
    one, shared = Work(100.0, 50, most=1), Work(100.0, 50)
    assert worker_seconds([one], 10, NODE) == pytest.approx(100.0)
    assert worker_seconds([shared], 10, NODE) == pytest.approx(10 * (10.0 + START_S))
    assert worker_seconds([shared], 100, NODE) == pytest.approx(50 * (2.0 + START_S))  # the others have nothing to do


def test_takes_the_cluster_as_it_is(ray_session: None) -> None:
    cluster, told = cluster_of(PlanOptions(job="job.yaml", address="auto", gpus_per_node=3))
    assert (cluster.cpus, cluster.gpus) == (session.cpus(), 3)
    assert cluster.memory > 1e8
    assert [one.source for one in told[:3]] == ["the cluster at auto", "given", "the cluster at auto"]


def test_pieces_of_a_probe_lie_in_the_pool_and_apart() -> None:
    for rows, wanted in ((1, 16), (10, 16), (200, 32), (1_000_000, 256)):
        found = ranges(rows, wanted)
        assert all(0 <= start < stop <= rows for start, stop in found)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(found))
        assert sum(stop - start for start, stop in found) <= max(wanted, 1)


def test_a_fit_finds_what_work_costs() -> None:
    options = selecting.filled("kmeans", {"restarts": "2", "iterations": "10"})
    points = []
    for n, b in ((8192, 64), (16384, 64), (16384, 256), (8192, 256)):
        points.append(Point(n, b, 1e-9 * n * b * 9 + 1e-7 * n * 9, 0.0, 1e-5 * b * 9, 20, 8))
    found = selecting.work_of(Measured("kmeans", 16, options, tuple(points)), 1_000_000, 1000)
    assert found.worker_s == pytest.approx(2 * 11 * (1e-9 * 1e6 * 1000 + 1e-7 * 1e6), rel=1e-3)
    assert found.driver_s == pytest.approx(2 * 11 * 1e-5 * 1000, rel=1e-3)
    assert found.rounds == pytest.approx(2 * (10 + 12 + 2 * 744 / 1024))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_can_be_measured(name: str) -> None:
    few = {"kmeans": {"iterations": 2}, "activeft": {"steps": 2}, "maxherding": {"candidates": 100}}.get(name, {})
    x = clustered(60, 6)
    found = selecting.measure(name, few, x, Size(400, 40, 6))
    work = selecting.work_of(found, 50_000_000, 1000)
    assert work.worker_s > 0
    assert work.pieces == 6104
    assert name in LEGS
    assert GROWTH.get(name, PLAIN).rows


def test_vectors_made_alike_have_the_same_directions() -> None:
    flat = np.zeros((50, 6), np.float32)
    flat[:, :2] = np.random.default_rng(0).standard_normal((50, 2))
    made = selecting.alike(flat, 300)
    assert made.shape == (300, 6)
    assert (made[:, 2:] == 0).all()
    assert np.linalg.norm(made, axis=1) == pytest.approx(1)


def test_the_command(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, probe = str(job_of(tmp_path, pool)), str(tmp_path / "probe.json")
    words = ["plan", job, "--probe-rows", "32", "--out", probe, "--price", "1", "--workers", "1,64"]
    assert run(words) == 0
    out = capsys.readouterr().out
    for word in ("features", "picks/coreset", "more stops helping at", "taken for granted", "cost of the job"):
        assert word in out
    assert run(["plan", job, "--probe", probe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured_now"] == 0
    assert run(["plan", job, "--set", "steps.features.encoder=pixel"]) == 2
    assert "did you mean 'pixels'" in capsys.readouterr().err
    assert run(["plan", str(tmp_path / "none.yaml")]) == 2
