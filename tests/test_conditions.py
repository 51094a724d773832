"""Conditions as `select` and `compare` take them: read from a store's columns, met, recorded, and refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from stores import write_store
from test_contract import QUICK, clustered

from cli import main
from engine.compare import compare
from engine.conditions import asked_of, read_conditions
from engine.rounds import rounds
from engine.runner import run_method
from engine.schema import InputError, build_options
from engine.select import request_of, select, strategy_options
from engine.selections import open_selection
from engine.shards import RayShards, Reading, open_local
from engine.store import FeatureStore
from engine.verbs import CompareOptions, RoundsOptions, SelectOptions

N = 300
CLASSES = ["cat", "dog", "bird", "newt"]
LABEL = np.repeat([0, 1, 2, 3], [150, 90, 50, 10])
VIDEO = [None if row % 60 == 0 else f"v{row % 37}" for row in range(N)]
COST = np.random.default_rng(0).integers(1, 90, N) / 10
NOTHING = np.empty(0, dtype=np.int64)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Four classes of 150, 90, 50 and 10 images, mixed; 37 videos, and none for every 60th image; a cost."""
    mixed = np.random.default_rng(1).permutation(N)
    bad = COST.copy()
    bad[[17, 40]] = [0, np.nan]
    columns = {
        "label": pa.array(LABEL[mixed]),
        "video": pa.array(VIDEO),
        "scene": pa.array([None if v is None else f"s{int(v[1:]) // 5}" for v in VIDEO]),
        "size": pa.array(np.arange(N) % 7),
        "sharp": pa.array(np.arange(N) % 2 == 0),
        "cost": pa.array(COST.astype(np.float32)),
        "bad": pa.array(bad),
        "boxes": pa.array([[1]] * N),
    }
    folder = tmp_path_factory.mktemp("conditions") / "features"
    return FeatureStore(write_store(folder, clustered(N), columns, class_names=CLASSES))


def values(store: FeatureStore, column: str, rows: np.ndarray) -> list[object]:
    return store.read_column(column).take(pa.array(rows)).to_pylist()


def count(store: FeatureStore, column: str, rows: np.ndarray) -> dict[object, int]:
    found = values(store, column, rows)
    return {value: found.count(value) for value in set(found)}


def run(store: FeatureStore, out: Path, **given: object) -> dict[str, object]:
    options = {"features": store.place.uri, "out": str(out), "strategy": "random", "workers": 0, **given}
    (manifest,) = select(build_options(SelectOptions, options, "select"))
    return manifest


def test_quota_and_cap(store: FeatureStore, tmp_path: Path) -> None:
    given = {"budget": "40", "quota": ["label=newt:8,0:5"], "cap": ["video=2"], "strategy": "kmeans", "option": ["restarts=1"]}
    manifest = run(store, tmp_path / "out", **given)
    picks = open_selection(str(tmp_path / "out")).picks
    made = count(store, "label", picks)
    assert (made[3], made[0], len(picks)) == (8, 5, 40)
    assert max(count(store, "video", picks).values()) <= 2
    said = manifest["constraints"]
    assert said["asked"] == {"quota": {"label": {"newt": 8, "0": 5}}, "cap": {"video": 2}}
    listed = {group["value"]: group for group in said["groups"]["label"]["listed"]}
    assert listed["newt"] == {"value": "newt", "picked": 8, "asked": 8, "eligible": 10, "labeled": 0}
    assert listed["cat"]["asked"] == 5
    assert said["groups"]["video"]["largest"] <= 2
    quality = said["quality"]
    assert quality["picked"]["num_picks"] == quality["unconditional"]["num_picks"] == 40
    assert quality["picked"]["mean_distance"] > quality["unconditional"]["mean_distance"]
    free = open_selection(run(store, tmp_path / "free", **{**given, "quota": [], "cap": []}) and str(tmp_path / "free")).picks
    assert quality["num_shared"] == len(np.intersect1d(picks, free))
    assert run(store, tmp_path / "out", **given)["published"] == manifest["published"]
    with pytest.raises(InputError, match="constraints"):
        run(store, tmp_path / "out", **{**given, "cap": ["video=3"]})


def test_balance_fills_like_water(store: FeatureStore, tmp_path: Path) -> None:
    """The ten newts are all there are, so the others get more; every budget of a nested strategy is balanced by itself."""
    options = {"features": store.place.uri, "out": str(tmp_path), "strategy": "coreset", "balance": "label", "workers": 0}
    select(build_options(SelectOptions, {**options, "budget": "8,43,90"}, "select"))
    shares = {}
    for budget in (8, 43, 90):
        shares[budget] = count(store, "label", open_selection(str(tmp_path / str(budget))).picks)
    assert shares[8] == {0: 2, 1: 2, 2: 2, 3: 2}
    assert shares[43] == {0: 11, 1: 11, 2: 11, 3: 10}
    assert sorted(shares[90].values()) == [10, 26, 27, 27]


def test_nulls_are_a_group(store: FeatureStore, tmp_path: Path) -> None:
    run(store, tmp_path / "a", budget="38", balance="video")
    assert set(count(store, "video", open_selection(str(tmp_path / "a")).picks).values()) == {1}
    run(store, tmp_path / "b", budget="30", quota=["video=null:4"])
    assert count(store, "video", open_selection(str(tmp_path / "b")).picks)[None] == 4


def test_a_cap_counts_what_is_labelled(store: FeatureStore, tmp_path: Path) -> None:
    labeled = np.arange(1, 75)
    np.save(tmp_path / "rows.npy", labeled)
    manifest = run(store, tmp_path / "out", budget="30", cap=["video=3"], labeled=str(tmp_path / "rows.npy"))
    picks = open_selection(str(tmp_path / "out")).picks
    both = count(store, "video", np.concatenate([labeled, picks]))
    assert max(both.values()) <= 3
    assert manifest["constraints"]["groups"]["video"]["listed"][0]["labeled"] <= 2


def test_where(store: FeatureStore, tmp_path: Path) -> None:
    manifest = run(store, tmp_path / "out", budget="20", where="label in ('cat', 'newt') and size > 2 and video is not None")
    picks = open_selection(str(tmp_path / "out")).picks
    assert set(values(store, "label", picks)) <= {0, 3}
    assert min(values(store, "size", picks)) > 2
    label, size = np.array(values(store, "label", store.rows)), np.array(values(store, "size", store.rows))
    left = np.isin(label, (0, 3)) & (size > 2) & np.array([video is not None for video in VIDEO])
    assert manifest["constraints"]["num_where"] == left.sum()


def test_a_sum_to_spend(store: FeatureStore, tmp_path: Path) -> None:
    for strategy in ("coreset", "kmeans"):
        out = tmp_path / strategy
        manifest = run(store, out, strategy=strategy, budget_cost="33.3", cost_column="cost", cap=["label=4"])
        picks = open_selection(str(out)).picks
        spent = round(sum(COST[picks]), 6)
        assert manifest["constraints"]["cost_total"] == spent <= 33.3
        assert manifest["num_picks"] == len(picks) == len(json.loads((out / "indices.json").read_text()))
        assert max(count(store, "label", picks).values()) <= 4


REFUSED = [
    ({"quota": ["label=newt:11,cat:200"]}, "label=cat asks for 200, and 150 are eligible; label=newt asks for 11, and 10"),
    ({"quota": ["label=newt:8"], "where": "label != 'newt'"}, "0 are eligible (of 10: 10 excluded or left out)"),
    ({"quota": ["label=cat:30,dog:30"]}, "asks for 60 in all, and the budget is 40"),
    ({"quota": ["label=cat:1,dog:1,bird:1"]}, "other values have 10 eligible images for the other 37"),
    ({"cap": ["label=9"]}, "--cap label=9 leaves 36 of 300 images, and the budget is 40"),
    ({"quota": ["label=cat:20"], "cap": ["label=10"]}, "label=cat asks for 20, and --cap leaves 10"),
    ({"quota": ["label=newt:10"], "cap": ["size=1"]}, "--cap size=1 leaves 7 of 300"),
    (
        {"quota": ["size=0:10", "label=cat:39"], "where": "label == 'cat' and size > 0 or label != 'cat' and size == 0"},
        "--quota size=0 10; label=cat 39 contradict one another",
    ),
    ({"quota": ["label=cta:1"]}, "did you mean 'cat'?"),
    ({"quota": ["lable=cat:1"]}, "did you mean 'label'?"),
    ({"quota": ["label=cat"]}, "not of the form value:count"),
    ({"quota": ["label"]}, "not of the form column=value:count"),
    ({"quota": ["label=cat:1,cat:2"]}, "twice"),
    ({"balance": "boxes"}, "makes no groups"),
    ({"balance": "label", "quota": ["label=cat:1"]}, "leave one out"),
    ({"cap": ["video=0"]}, "1 or more"),
    ({"quota": ["label=cat:1"], "cap": ["size=9", "video=3"]}, "three columns"),
    ({"where": "size > 100"}, "leaves 0 of 300 images"),
    ({"where": "label == 'cta'"}, "did you mean 'cat'?"),
    ({"budget_cost": "10"}, "--budget-cost needs --cost-column"),
    ({"budget_cost": "10", "cost_column": "cost"}, "give one of them"),
    ({"budget": None}, "--budget is missing"),
    ({"budget": None, "budget_cost": "10", "cost_column": "cost", "balance": "label"}, "leaves open how many"),
    ({"budget": None, "budget_cost": "0.01", "cost_column": "cost"}, "pays for nothing"),
    ({"budget": None, "budget_cost": "-1", "cost_column": "cost"}, "not a positive number"),
    ({"budget": None, "budget_cost": "10", "cost_column": "bad"}, "bad of row 17 (i17) is 0"),
    ({"budget": None, "budget_cost": "10", "cost_column": "video"}, "a cost is a number"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_refused_before_any_work(store: FeatureStore, tmp_path: Path, given: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as caught:
        run(store, tmp_path / "out", **{"budget": "40", **given})
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_nested_columns(store: FeatureStore, tmp_path: Path) -> None:
    """A video lies in one scene: three columns, which are two chains."""
    run(store, tmp_path / "out", budget="30", quota=["label=newt:5"], cap=["video=2", "scene=5"])
    picks = open_selection(str(tmp_path / "out")).picks
    assert max(count(store, "scene", picks).values()) <= 5
    assert count(store, "label", picks)[3] == 5


def test_compare(store: FeatureStore, tmp_path: Path) -> None:
    given = {"features": store.place.uri, "out": str(tmp_path / "out"), "strategies": ("coreset", "uniform"), "budget": "12,20"}
    given |= {"balance": "label", "where": "size > 0", "seeds": 1, "metrics": ("coverage",), "workers": 0}
    manifest = compare(build_options(CompareOptions, given, "compare"))
    assert manifest["num_cells"] == 4
    for budget in (12, 20):
        picks = open_selection(str(tmp_path / "out" / "cells" / "coreset" / "seed-0" / str(budget) / "selection")).picks
        assert set(count(store, "label", picks).values()) == {budget // 4}
        assert 0 not in values(store, "size", picks)


def test_rounds_ask_for_no_label(store: FeatureStore, tmp_path: Path) -> None:
    given = {"subject": store.place.uri, "out": str(tmp_path / "out"), "strategy": "random", "oracle": "column"}
    write_store(tmp_path / "test", clustered(40, seed=1), {"label": pa.array(LABEL[::7][:40])}, class_names=CLASSES)
    given |= {"test": str(tmp_path / "test"), "start": "10", "add": "10", "rounds": 2}
    for conditions in ({"balance": "label"}, {"where": "label == 'cat'"}):
        with pytest.raises(InputError, match="nobody has paid"):
            rounds(build_options(RoundsOptions, {**given, **conditions}, "rounds"))
    rounds(build_options(RoundsOptions, {**given, "cap": ["video=1"], "linear_epochs": 2}, "rounds"))
    last = open_selection(str(tmp_path / "out" / "round-01" / "selection"))
    assert max(count(store, "video", np.concatenate([last.picks, last.labeled])).values()) == 1


def test_what_is_said(store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["select", store.place.uri, "--out", str(tmp_path / "out"), "--strategy", "kmeans", "--workers", "0", "-q"]
    given += ["--quota", "label=newt:8", "--cap", "video=2", "--where", "size < 6"]
    assert main.run([*given, "--budget", "30", "--option", "restarts=1"]) == 0
    said = capsys.readouterr().out
    assert "--where left 258 of 300 images" in said
    assert "newt 8" in said
    assert "of 38 values, 2 of one at most" in said
    assert "what the conditions cost: mean distance" in said
    assert main.run([*given, "--budget", "30", "--cap", "label=1"]) == 2
    assert "label=newt asks for 8, and --cap leaves 1" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 3])
def test_actors_give_the_same_picks(ray_session: None, store: FeatureStore, workers: int) -> None:
    given = {"features": store.place.uri, "out": "", "strategy": "", "quota": ["label=newt:6,cat:9"], "cap": ["video=2"]}
    asked = asked_of(build_options(SelectOptions, given, "select"))
    request, _ = request_of(read_conditions(asked, store, NOTHING, NOTHING), 30, 0, NOTHING, NOTHING)
    shards, local = RayShards(store, workers, 2, Reading(True)), open_local(store, Reading(True))
    try:
        for name in ("random", "coreset", "kmeans", "activeft", "typiclust", "hierarchical", "freesel", "maxherding"):
            _, method, options = strategy_options(name, QUICK.get(name, {}))
            here, there = (run_method(method, some, request, options) for some in (local, shards))
            assert here.picks.tobytes() == there.picks.tobytes(), name
    finally:
        shards.close()
