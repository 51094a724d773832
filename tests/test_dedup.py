"""`dedup`: near copies worked by hand, against brute force, planted in a pool, and through the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracles
import pyarrow.parquet as pq
import pytest
import torch

from cli.main import run
from engine import dedup as verb
from engine import semdedup as module
from engine.canonical import normalize
from engine.copies import Copies
from engine.dedup import dedup
from engine.ingest import import_features
from engine.schema import InputError, RunError
from engine.select import select
from engine.select.clusters import fit_centres
from engine.semdedup import cosine, default_clusters, find_copies, join, leaders, similar
from engine.shards import LocalShards, LostShardError, RayShards, Reading, from_array, open_local
from engine.store import FeatureStore
from engine.verbs import DedupOptions, ImportOptions, SelectOptions


def circle(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane."""
    angle = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return normalize(torch.from_numpy(x.astype(np.float32))).numpy()


def copies(x: np.ndarray, clusters: int = 1, eps: float = 0.05, block_rows: int = 64) -> Copies:
    return find_copies(from_array(x, block_rows=block_rows), clusters, eps, 10, 0)


APART = 1 - np.cos(np.deg2rad(10.5))
"""An eps within which vectors 10 degrees apart are, and vectors 11 degrees apart are not."""


def test_a_chain_does_not_merge() -> None:
    """A ~ B ~ C, A and C not alike: taken from the ends, B is a copy of A, and C, like B alone, stays."""
    found = leaders(torch.from_numpy(circle(0, 10, 20)), np.zeros(3, dtype=np.int64), APART)
    assert found.tolist() == [-1, 0, -1]
    found = leaders(torch.from_numpy(circle(10, 0, 20)), np.zeros(3, dtype=np.int64), APART)
    assert found.tolist() == [-1, 0, 0]


def test_a_chain_in_a_pool_keeps_its_ends() -> None:
    """Rows 0, 1, 2 at 0, 10 and 20.4 degrees: the last is farthest from their mean, then the first."""
    found = copies(circle(0, 10, 20.4), eps=APART)
    assert found.rows.tolist() == [1]
    assert found.kept.tolist() == [2]
    assert found.similarity[0] == pytest.approx(np.cos(np.deg2rad(10.4)))


def test_a_long_chain_by_hand() -> None:
    """0, 10, 20, ..., 60 degrees: from both ends inwards, every second one stays."""
    found = copies(circle(*range(0, 70, 10)), eps=APART)
    assert found.rows.tolist() == [1, 3, 5]


def test_groups_don_t_see_one_another() -> None:
    x = torch.from_numpy(circle(0, 0, 0, 0))
    assert leaders(x, np.array([3, 3, 7, 7]), 0.05).tolist() == [-1, 0, -1, 2]


def test_exact_copies_and_zeros() -> None:
    """A vector and its multiples are copies at the smallest eps; vectors of zeros are nobody's copies, at the largest."""
    x = unit(np.random.default_rng(0).standard_normal((5, 384)))
    x = unit(np.concatenate([x, 3 * x, 1e-3 * x]))
    found = copies(x, eps=1e-6)
    assert len(found.rows) == 10
    assert set(found.rows % 5 - found.kept % 5) == {0}
    assert found.similarity == pytest.approx(np.ones(10), abs=1e-12)
    assert (found.similarity <= 1).all()
    zeros = np.zeros((4, 3), dtype=np.float32)
    assert len(copies(zeros, eps=1.0).rows) == 0


def clouds(n: int = 400, d: int = 6, seed: int = 0) -> np.ndarray:
    """Unit vectors of many near copies, in chains and crowds."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n // 8, d))
    return unit(centres[rng.integers(0, n // 8, n)] + 0.12 * rng.standard_normal((n, d)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eps", [0.003, 0.05, 0.3])
@pytest.mark.parametrize("clusters", [1, 7])
def test_equals_brute_force(clusters: int, eps: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same copies, and the same leaders, whether a cluster is one piece or many."""
    x = clouds(seed=seed)
    shards = from_array(x, block_rows=64)
    whole = find_copies(shards, clusters, eps, 10, 0)
    *_, (_, _, centres) = fit_centres(from_array(x, block_rows=64), clusters, 10, 0, (module.SEED_KEY,))
    owner = oracles.nearest_centre(x, centres)
    expected: dict[int, int] = {}
    for cluster in range(clusters):
        mine = np.flatnonzero(owner == cluster)
        order = mine[np.argsort(-oracles.sqdist(x[mine], centres[cluster]), kind="stable")]
        expected |= oracles.near_copies(x, order.tolist(), eps)
    assert dict(zip(whole.rows.tolist(), whole.kept.tolist(), strict=True)) == expected
    assert expected
    for name, value in {"HEAD_ROWS": 13, "MEMBER_ROWS": 50, "TILE_ELEMENTS": 100}.items():
        monkeypatch.setattr(module, name, value)
    pieces = find_copies(from_array(x, block_rows=50), clusters, eps, 10, 0)
    assert pieces.rows.tobytes() == whole.rows.tobytes()
    assert pieces.kept.tobytes() == whole.kept.tobytes()
    assert pieces.similarity.tobytes() == whole.similarity.tobytes()


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """600 vectors of 32 floats, of which 90 are near copies of 60 others; returns the vectors and each one's group."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((510, 32))
    source = np.concatenate([np.arange(510), np.arange(60), np.arange(30)])
    y = unit(x[source] + np.where(np.arange(600) < 510, 0, 0.03)[:, None] * rng.standard_normal((600, 32)))
    shuffled = rng.permutation(600)
    return y[shuffled], source[shuffled]


@pytest.mark.parametrize("clusters", [1, 5])
def test_planted_copies_are_found_and_nothing_else(clusters: int) -> None:
    """Precision and recall 1: one row of every planted group stays, and every other row of it is told to be its copy."""
    x, group = planted()
    found = copies(x, clusters)
    assert len(found.rows) == 90
    assert (group[found.rows] == group[found.kept]).all()
    stays = np.setdiff1d(np.arange(600), found.rows)
    assert sorted(group[stays].tolist()) == list(range(510))
    assert set(found.kept.tolist()) <= set(stays.tolist())


def test_decisions_within_the_rounding_error_are_canonical() -> None:
    """Pairs whose similarity is within 1e-7 of the threshold, both sides of it, decided as in float64."""
    rng = np.random.default_rng(3)
    a = unit(rng.standard_normal((40, 384)))
    b = unit(a[:, None, :].repeat(8, 1).reshape(320, 384) + 0.3 / 384**0.5 * rng.standard_normal((320, 384)))
    exact = cosine(torch.from_numpy(a), np.arange(320) // 8, torch.from_numpy(b), np.arange(320))
    for value in exact[:60]:
        for eps in (1 - value, 1 - np.nextafter(value, 0)):
            close = similar(torch.from_numpy(a), torch.from_numpy(b), float(eps))
            assert close[np.arange(320) // 8, np.arange(320)].tolist() == (exact > 1 - eps).tolist()


def test_default_clusters() -> None:
    assert [default_clusters(n) for n in (1, 8192, 50_000, 1_281_167)] == [1, 1, 50, 253]


def test_join_sorts() -> None:
    parts = [Copies(np.array([5, 2]), np.array([1, 0]), np.array([0.5, 0.2])), Copies(np.array([3]), np.array([1]), np.ones(1))]
    joined = join(parts)
    assert (joined.rows.tolist(), joined.kept.tolist(), joined.similarity.tolist()) == ([2, 3, 5], [0, 1, 1], [0.2, 1, 0.5])
    assert len(join([]).rows) == 0


def test_a_lost_shard_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = planted()
    left = [2]

    def lose(*arguments: object) -> Copies:
        left[0] -= 1
        if left[0] >= 0:
            raise LostShardError("an actor died")
        return copies(x)

    shards = LocalShards(from_array(x).blocks, 32)
    assert len(verb._persist([shards], lose).rows) == 90
    left[0] = 100
    with pytest.raises(RunError, match="in a row"):
        verb._persist([shards], lose)


# --- folders and the command


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the planted pool, in blocks of 64 rows, and its dedup folder."""
    from engine import ingest, store

    folder = tmp_path_factory.mktemp("dedup")
    x, group = planted()
    np.savez(folder / "x.npz", features=x, labels=group % 3, ids=np.array([f"image-{row:03d}" for row in range(600)]))
    patch = pytest.MonkeyPatch()
    patch.setattr(ingest, "BLOCK_ROWS", 64)
    patch.setattr(store, "BLOCK_ROWS", 64)
    import_features(ImportOptions(file=str(folder / "x.npz"), out=str(folder / "features")))
    patch.undo()
    dedup(DedupOptions(features=str(folder / "features"), out=str(folder / "copies"), workers=0))
    return folder


def test_the_folder(world: Path) -> None:
    x, group = planted()
    table = pq.read_table(world / "copies" / "excluded.parquet")
    assert table.column_names == ["row", "id", "kept_row", "kept_id", "similarity"]
    rows, kept = (table[name].to_numpy() for name in ("row", "kept_row"))
    assert (group[rows] == group[kept]).all()
    assert len(rows) == 90
    assert table["similarity"].to_numpy() == pytest.approx((x[rows] * x[kept]).sum(axis=1), abs=1e-6)
    ids = [f"image-{row:03d}" for row in rows]
    assert table["id"].to_pylist() == (world / "copies" / "ids.txt").read_text().splitlines() == ids
    assert json.loads((world / "copies" / "indices.json").read_text()) == rows.tolist()
    manifest = json.loads((world / "copies" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["num_excluded"], manifest["num_kept"], manifest["num_clusters"]) == ("dedup", 90, 510, 1)


def test_ray_shards_give_the_same_copies(world: Path, ray_session: None) -> None:
    store = FeatureStore(str(world / "features"))
    whole = find_copies(open_local(store, Reading(True)), 4, 0.05, 10, 0)
    for workers in (1, 3):
        shards = RayShards(store, workers, 2, Reading(True))
        try:
            found = find_copies(shards, 4, 0.05, 10, 0)
        finally:
            shards.close()
        assert found.rows.tobytes() == whole.rows.tobytes()
        assert found.similarity.tobytes() == whole.similarity.tobytes()


def test_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["dedup", f"{world}/features", "--out", f"{tmp_path}/out", "--clusters", "3", "--workers", "0", "--json"]
    digests = []
    for _ in range(2):
        assert run(line) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["command"], said["num_excluded"], said["num_kept"], said["num_clusters"]) == ("dedup", 90, 510, 3)
        assert said["out"] == f"{tmp_path}/out"
        digests.append(said["digest"])
    assert digests[0] == digests[1]
    assert run(["dedup", f"{world}/features", "--out", f"{tmp_path}/out", "--eps", "0.1", "--workers", "0"]) == 2
    assert "options.eps 0.05 -> 0.1" in " ".join(capsys.readouterr().err.split())
    assert run(["info", f"{tmp_path}/out", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["num_excluded"], told["num_clusters"]) == ("dedup", 90, 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--clusters", "601"], "clusters is 601"),
        (["--clusters", "0"], "at least 1"),
        (["--eps", "0"], "eps is 0.0"),
        (["--eps", "1.5"], "eps is 1.5"),
    ],
)
def test_wrong_options(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], told: str) -> None:
    assert run(["dedup", f"{world}/features", "--out", f"{tmp_path}/out", "--workers", "0", *given]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def chosen(world: Path, tmp_path: Path, name: str, **given: str | None) -> dict:
    (manifest,) = select(SelectOptions(features=f"{world}/features", out=f"{tmp_path}/{name}", workers=0, **given))
    return {**manifest, "picks": json.loads((tmp_path / name / "indices.json").read_text())}


@pytest.mark.parametrize("strategy", ["random", "coreset", "kmeans", "typiclust", "hierarchical", "uniform"])
def test_excluded_rows_are_not_picked(world: Path, tmp_path: Path, strategy: str) -> None:
    """All 510 that are left, but for 10 labelled ones: a percentage stays one of the pool."""
    excluded = set(json.loads((world / "copies" / "indices.json").read_text()))
    free = [row for row in range(600) if row not in excluded]
    (tmp_path / "labeled.json").write_text(json.dumps([*free[:10], *list(excluded)[:5]]))
    both = {"strategy": strategy, "labeled": f"{tmp_path}/labeled.json", "exclude": f"{world}/copies"}
    if strategy != "kmeans":
        assert set(chosen(world, tmp_path, "all", budget="500", **both)["picks"]) == set(free[10:])
    tenth = chosen(world, tmp_path, "tenth", budget="10%", **both)
    assert len(set(tenth["picks"]) - excluded - set(free[:10])) == 60
    assert (tenth["num_labeled"], tenth["num_excluded"]) == (15, 90)


def test_exclude_takes_what_labeled_takes(world: Path, tmp_path: Path) -> None:
    """The same rows in three forms are the same selection: its identity is in the rows, not in the file."""
    rows = json.loads((world / "copies" / "indices.json").read_text())
    np.save(tmp_path / "rows.npy", np.array(rows))
    whole = chosen(world, tmp_path, "out", strategy="random", budget="50", exclude=f"{world}/copies")
    for form in (f"{world}/copies/ids.txt", f"{world}/copies/indices.json", f"{tmp_path}/rows.npy"):
        assert chosen(world, tmp_path, "out", strategy="random", budget="50", exclude=form)["published"] == whole["published"]
    with pytest.raises(InputError, match=r"inputs\.excluded"):
        chosen(world, tmp_path, "out", strategy="random", budget="50")


def test_excluded_rows_take_part_in_clustering(world: Path, tmp_path: Path) -> None:
    """Excluding rows that would not have been picked changes nothing."""
    without = chosen(world, tmp_path, "without", strategy="typiclust", budget="8")["picks"]
    (tmp_path / "others.json").write_text(json.dumps([row for row in range(300) if row not in without]))
    others = f"{tmp_path}/others.json"
    assert chosen(world, tmp_path, "with", strategy="typiclust", budget="8", exclude=others)["picks"] == without


def test_wrong_exclusions(world: Path, tmp_path: Path) -> None:
    def refused(told: str, exclude: str, budget: str = "5") -> None:
        with pytest.raises(InputError, match=told):
            chosen(world, tmp_path, "out", strategy="random", budget=budget, exclude=exclude)

    refused("more than the 510 eligible images", f"{world}/copies", "511")
    refused("--exclude .* does not exist", f"{world}/nowhere")
    refused("not a finished dedup folder", f"{world}/features")
    (tmp_path / "rows.json").write_text("[600]")
    refused("--exclude .* names row 600", f"{tmp_path}/rows.json")
    (tmp_path / "ids.txt").write_text("image-001\nimage-x\n")
    refused("--exclude .* names 'image-x'", f"{tmp_path}/ids.txt")
    np.savez(tmp_path / "y.npz", features=planted(1)[0])
    import_features(ImportOptions(file=f"{tmp_path}/y.npz", out=f"{tmp_path}/other"))
    dedup(DedupOptions(features=f"{tmp_path}/other", out=f"{tmp_path}/copies", workers=0))
    refused("other features", f"{tmp_path}/copies")
    with pytest.raises(InputError, match="not a finished selection folder"):
        chosen(world, tmp_path, "out", strategy="random", budget="5", labeled=f"{world}/copies")
