"""Nodes that come and go under a job: it ends with what it ends with where they stay."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from trainings import make_job

from engine import session
from engine import shards as shards_module
from engine.embed import embed
from engine.ingest import import_features
from engine.reading import Reading
from engine.schema import InputError
from engine.select import select
from engine.shards import RayShards, _share
from engine.store import FeatureStore
from engine.training.launch import _check_room
from engine.verbs import EmbedOptions, ImportOptions, SelectOptions

ROOT = Path(__file__).parents[1]
NUM_IMAGES = 9000
"""Two blocks: a selection has work for two nodes. Embedding them takes seconds, so that a node can be killed meanwhile."""


@pytest.mark.parametrize("each", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8, 33])
def test_shares_fit_nodes(each, workers):
    """On nodes of some CPUs each, as many actors find a place as there are."""
    for nodes in range(1, 6):
        share = _share(nodes * each, workers)
        assert nodes * int(each / share + 1e-9) >= workers
        assert share == 1 or workers > nodes * each


def test_shards_are_made_smaller_where_the_cluster_is(ray_session, tmp_path, monkeypatch):
    """Two ask for a CPU each, one is left, and nobody says that another comes: they share it."""
    import ray

    class Idler:
        def ready(self):
            return True

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(9000, 4)).astype(np.float32))
    import_features(ImportOptions(file=str(tmp_path / "x.npy"), out=str(tmp_path / "features")))
    sizes = iter([session.Size(2, 0)])
    monkeypatch.setattr(session, "size", lambda: next(sizes, session.Size(1, 0)))
    monkeypatch.setattr(shards_module, "SETTLE_EVERY_S", 0.5)
    others = ray.remote(Idler).options(num_cpus=session.now().cpus - 1).remote()
    ray.get(others.ready.remote())
    shards = RayShards(FeatureStore(str(tmp_path / "features")), 2, 2, Reading(True))
    try:
        assert shards.shares == (0.5, 0.0)
        assert shards.take(np.array([8999, 0])).shape == (2, 4)
    finally:
        shards.close()
        ray.kill(others)


@pytest.mark.parametrize(
    ("most", "given", "said"),
    [
        (None, {"workers": 500}, None),  # an autoscaler may bring them
        (session.Size(8, 0), {"workers": 8}, None),
        (
            session.Size(8, 0),
            {"workers": 5, "threads": 2},
            "--workers 5 x --cpus-per-worker 2 need 10 CPUs, the cluster grows to 8",
        ),
        (
            session.Size(8, 1),
            {"workers": 2, "gpus": 1.0},
            "--workers 2 x --gpus-per-worker 1 need 2 GPUs, the cluster grows to 1",
        ),
    ],
)
def test_a_training_is_refused_only_where_it_can_never_be(monkeypatch, tmp_path, most, given, said):
    monkeypatch.setattr(session, "most", lambda: most)
    monkeypatch.setattr(session, "_own", False)
    job = make_job(tmp_path / "out", str(tmp_path), {"epochs": 1}, **given)
    if said is None:
        _check_room(job)
        return
    with pytest.raises(InputError, match=re.escape(said)):
        _check_room(job)


def parquet_pool(file: Path) -> str:
    rng, rows = np.random.default_rng(0), []
    for row in range(NUM_IMAGES):
        pixels = rng.integers(0, 160, (64, 64, 3)).astype(np.uint8)
        pixels[..., row % 3] += 80
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, format="PNG")
        rows.append({"image": {"bytes": held.getvalue(), "path": f"{row}.png"}, "label": "rgb"[row % 3]})
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=500)
    return str(file)


JOB = """
name: lost
pool: {pool}
out: {out}
steps:
  - embed: {{encoder: pixels, image_size: 8, workers: 3}}
    as: features
  - select: {{features: $features, strategy: kmeans, budget: 30, option: [restarts=10], workers: 2}}
    as: picks
  - finetune:
      selection: $picks
      task: classify
      model: vit_tiny_patch16_224
      model_option: [img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2]
      weights: random
      image_size: 32
      option: [steps=300, batch_size=8, lr=0.02]
      checkpoint_steps: 50
      workers: 2
    as: model
"""


@pytest.mark.slow
def test_a_node_is_killed_in_each_step(tmp_path):
    """Must-show 3: one job; each time one of three nodes goes, with what runs on it."""
    pool, whole, out = parquet_pool(tmp_path / "pool.parquet"), tmp_path / "whole", tmp_path / "out"
    embed(EmbedOptions(pool=pool, out=str(whole / "features"), encoder="pixels", image_size=8, workers=0))
    given = {"features": str(whole / "features"), "strategy": "kmeans", "budget": "30", "option": ("restarts=10",)}
    select(SelectOptions(**given, out=str(whole / "picks"), workers=0))
    (tmp_path / "job.yaml").write_text(JOB.format(pool=pool, out=out))
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # sockets have short names
        words = [sys.executable, str(ROOT / "tests" / "lost_nodes.py"), str(tmp_path / "job.yaml"), short]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, env=environment, timeout=500, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    killed = json.loads(done.stdout.splitlines()[-1])
    assert {step: left for step, (_, _, left) in killed.items()} == dict.fromkeys(("embed", "select", "finetune"), 2)
    assert all(0 < at < total for at, total, _ in killed.values()), killed
    parts = sorted(path.name for path in (whole / "features" / "parts").iterdir())
    assert parts == sorted(path.name for path in (out / "features" / "parts").iterdir())
    files = [f"features/parts/{name}" for name in parts]
    for name in [*files, "picks/indices.json", "picks/ids.txt", "picks/picks.parquet"]:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((out / "model" / "manifest.json").read_text())["steps"] == 300


@pytest.mark.slow
def test_nodes_come_when_they_are_needed_and_go():
    """Must-show 2: no node, then two and more that all work, then none, in each of two steps; it is said what is waited for."""
    words = [sys.executable, str(ROOT / "benchmarks" / "bench_autoscaling.py"), "--images", "512"]
    done = subprocess.run(words, timeout=400, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for step in ("embed", "select"):
        ups = [up for _, up, _ in found[step]["counts"]]
        assert (ups[0], ups[-1]) == (0, 0)
        assert max(ups) == found[step]["worked"] == 3
    texts = [text for _, text in found["select"]["said"]]
    assert all(text.startswith("waiting for ") and text.endswith(", and grows to {CPU: 3}") for text in texts)
