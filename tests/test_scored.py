"""`entropy`, `margin`, `least_confidence` against a brute force, from probabilities and from boxes; and --predictions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import NOTHING, clustered, probabilities

from engine import ingest, store
from engine.compare import compare
from engine.draws import random_keys
from engine.folders import begin
from engine.ingest import import_features
from engine.places import Place
from engine.runner import run_method
from engine.schema import InputError, build_options
from engine.select import describe_strategies, select, strategy_options
from engine.select.scored import WITHOUT_BOXES
from engine.shards import LocalShards, Request, Step, from_array
from engine.store import FeatureStore, detections_array, part_bytes, part_name, publish_features
from engine.verbs import CompareOptions, ImportOptions, SelectOptions

NAMES = ("entropy", "margin", "least_confidence")


def run(name: str, shards: LocalShards, budget: int, labeled: np.ndarray = NOTHING, seed: int = 0, **given: str) -> Step:
    _, method, options = strategy_options(name, given)
    return run_method(method, shards, Request(budget, seed, labeled), options)


def shards_of(predictions: dict[str, np.ndarray], block_rows: int = 7) -> LocalShards:
    n = len(next(iter(predictions.values())))
    return from_array(np.empty((n, 0), dtype=np.float32), block_rows=block_rows, predictions=predictions)


def of_classes(name: str, p: np.ndarray) -> float:
    p = np.sort(p.astype(np.float64))
    if name == "entropy":
        return math.fsum(-v * math.log(v) for v in p if v > 0)
    return 1 - (p[-1] - p[-2]) if name == "margin" else 1 - p[-1]


def of_boxes(name: str, scores: list[float], aggregate: str) -> float:
    values = {
        "entropy": [-sum(v * math.log(v) for v in (s, 1 - s) if v > 0) for s in scores],
        "margin": [1 - abs(2 * s - 1) for s in scores],
        "least_confidence": [1 - s for s in scores],
    }[name]
    return {"mean": sum(values) / len(values), "max": max(values), "sum": sum(values)}[aggregate]


def brute(values: list[float], budget: int, labeled: np.ndarray = NOTHING) -> list[int]:
    """The largest first, equal ones by row; what is equal but for rounding counts as equal."""
    left = sorted(set(range(len(values))) - set(labeled.tolist()))
    return sorted(left, key=lambda row: (-round(values[row], 12), row))[:budget]


def padded(boxes: list[list[float]]) -> np.ndarray:
    out = np.full((len(boxes), max(map(len, boxes), default=0)), np.nan, dtype=np.float32)
    for row, scores in enumerate(boxes):
        out[row, : len(scores)] = scores
    return out


# --- probabilities


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labeled", [NOTHING, np.array([0, 3, 50, 119])])
def test_the_least_sure_come_first(name: str, labeled: np.ndarray) -> None:
    p = probabilities(clustered(120))
    step = run(name, shards_of({"probs": p}), 60, labeled)
    values = [of_classes(name, row) for row in p]
    assert step.picks.tolist() == brute(values, 60, labeled)
    assert step.gains == pytest.approx([values[row] for row in step.picks], abs=1e-12)
    assert (np.diff(step.gains) <= 0).all()


@given(st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 40), st.integers(0, 10_000), st.sampled_from([1, 3, 64]))
@settings(max_examples=60, deadline=None)
def test_equal_ones_go_to_the_smaller_row(name: str, classes: int, n: int, seed: int, block_rows: int) -> None:
    """Probabilities in quarters, in any order of the classes: most rows are equal to some other."""
    p = np.random.default_rng(seed).multinomial(4, np.ones(classes) / classes, n).astype(np.float32) / 4
    values = [of_classes(name, np.append(row, 0) if classes == 1 else row) for row in p]
    assert run(name, shards_of({"probs": p}, block_rows), n).picks.tolist() == brute(values, n)


def test_the_three_differ() -> None:
    """Of three classes: one flat over two of them, one with the lowest top, one with the most entropy and a clear top."""
    p = np.array([[0.5, 0.5, 0.0], [0.4, 0.38, 0.22], [0.9, 0.05, 0.05]], dtype=np.float32)
    first = {name: run(name, shards_of({"probs": p}), 3).picks.tolist() for name in NAMES}
    assert first == {"entropy": [1, 0, 2], "margin": [0, 1, 2], "least_confidence": [1, 0, 2]}
    p = np.array([[0.45, 0.55, 0.0, 0.0], [0.58, 0.14, 0.14, 0.14]], dtype=np.float32)
    first = {name: run(name, shards_of({"probs": p}), 1).picks.tolist() for name in NAMES}
    assert first == {"entropy": [1], "margin": [0], "least_confidence": [0]}


def test_many_classes_are_taken_a_few_rows_at_a_time() -> None:
    p = np.random.default_rng(0).dirichlet(np.full(3000, 0.01), 200).astype(np.float32)
    for name in NAMES:
        values = [of_classes(name, row) for row in p]
        assert run(name, shards_of({"probs": p}, 128), 200).gains == pytest.approx(sorted(values, reverse=True), abs=1e-9)


# --- boxes


def boxes_of(n: int, seed: int, most: int = 6) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [rng.random(k).astype(np.float32).tolist() for k in rng.integers(0, most + 1, n)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("aggregate", ["mean", "max", "sum"])
def test_boxes_are_aggregated_over_an_image(name: str, aggregate: str) -> None:
    boxes = boxes_of(90, 2)
    with_boxes = [row for row in range(90) if boxes[row]]
    values = [of_boxes(name, scores, aggregate) if scores else -1.0 for scores in boxes]
    for block_rows in (90, 7):
        step = run(name, shards_of({"score": padded(boxes)}, block_rows), len(with_boxes), aggregate=aggregate)
        assert step.picks.tolist() == brute(values, len(with_boxes))
        assert step.gains == pytest.approx([values[row] for row in step.picks], abs=1e-12)


def test_worked_by_hand() -> None:
    """Image 0: one box of 0.5, as unsure as can be. 1: four of 0.25. 2: one of 0.5 beside one of 1. 3: none."""
    boxes = padded([[0.5], [0.25] * 4, [0.5, 1.0], []])
    order = {
        aggregate: run("margin", shards_of({"score": boxes}), 4, aggregate=aggregate) for aggregate in ("mean", "max", "sum")
    }
    assert order["mean"].picks.tolist() == [0, 1, 2, 3]  # 1, 1/2, 1/2
    assert order["max"].picks.tolist() == [0, 2, 1, 3]  # 1, 1, 1/2
    assert order["sum"].picks.tolist() == [1, 0, 2, 3]  # 2, 1, 1
    assert order["mean"].gains[:3].tolist() == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("name", NAMES)
def test_images_without_boxes_come_last_by_seed(name: str) -> None:
    boxes = boxes_of(100, 3, most=2)
    labeled = np.array([row for row in range(100) if not boxes[row]][:3])
    without = np.array([row for row in range(100) if not boxes[row] and row not in labeled], dtype=np.int64)
    for seed in (0, 1):
        step = run(name, shards_of({"score": padded(boxes)}), 97, labeled, seed)
        assert (
            step.picks[-len(without) :].tolist() == without[np.argsort(random_keys(seed, (WITHOUT_BOXES,), without))].tolist()
        )
        assert np.isnan(step.gains[-len(without) :]).all()
        assert np.isfinite(step.gains[: -len(without)]).all()


def test_a_detector_that_found_nothing_gives_a_seeded_order() -> None:
    nothing = shards_of({"score": np.empty((30, 0), dtype=np.float32)})
    picks = [run("entropy", nothing, 30, seed=seed).picks.tolist() for seed in (0, 1)]
    assert sorted(picks[0]) == sorted(picks[1]) == list(range(30))
    assert picks[0] != picks[1]


# --- stores


def import_as(folder: Path, name: str, x: np.ndarray, holds: str = "embedding", **arrays: Any) -> str:
    np.savez(folder / f"{name}.npz", features=x, **arrays)
    import_features(ImportOptions(file=str(folder / f"{name}.npz"), out=str(folder / name), holds=holds))
    return str(folder / name)


def detections(
    folder: Path, name: str, boxes: list[list[float]], block_rows: int = 64, labels: np.ndarray | None = None
) -> str:
    """Write a store as `predict` does of a detector that found boxes of these scores, a part a block."""
    place, parts = Place(str(folder / name)), []
    begin(place, "features", {}, {}, overwrite=False)
    for start in range(0, len(boxes), block_rows):
        mine = boxes[start : start + block_rows]
        values = np.array([[1, 2, 3, 4, s, 0] for scores in mine for s in scores], dtype=np.float32).reshape(-1, 6)
        rows = np.arange(start, start + len(mine))
        column = detections_array(values, np.array([len(scores) for scores in mine]))
        label = pa.nulls(len(rows), pa.int64()) if labels is None else pa.array(labels[rows])
        table = pa.table({"row": rows, "id": rows.astype(str), "label": label, "detections": column})
        data = part_bytes(table)
        place.at("parts", part_name(start)).write(data)
        facts = {"start": start, "stop": start + len(mine), "num_vectors": len(mine), "num_rejected": 0}
        facts["num_labeled"] = 0 if labels is None else len(mine)
        parts.append(
            {"name": part_name(start), **facts, "num_detections": len(values), "sha256": str(start), "bytes": data.size}
        )
    facts = {"num_rows": len(boxes), "dim": 6, "column": "detections", "class_names": ["cell"], "block_rows": block_rows}
    publish_features(place, parts, facts)
    return place.uri


def picked(features: str, out: Path, strategy: str, **given: Any) -> list[int]:
    words = {"features": features, "out": str(out), "strategy": strategy, "budget": "20", "workers": 0, **given}
    select(build_options(SelectOptions, words, "select"))
    return [int(row) for row in pq.read_table(out / "picks.parquet")["row"].to_pylist()]


@pytest.fixture
def stores(tmp_path: Path) -> tuple[str, str]:
    """200 vectors with labels, and the probabilities of five classes for them."""
    x = clustered(200)
    features = import_as(tmp_path, "features", x, labels=np.arange(200) % 3)
    return features, import_as(tmp_path, "probs", probabilities(x), "probs")


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_stand_alone_or_beside_features(stores: tuple[str, str], tmp_path: Path, name: str) -> None:
    features, probs = stores
    expected = brute([of_classes(name, row) for row in probabilities(clustered(200))], 20)
    assert picked(probs, tmp_path / "alone", name) == expected
    assert picked(features, tmp_path / "beside", name, predictions=probs) == expected


def test_a_selection_says_by_which_predictions(stores: tuple[str, str], tmp_path: Path) -> None:
    features, probs = stores
    given = {"features": features, "out": str(tmp_path / "out"), "strategy": "badge", "budget": "20", "workers": 0}
    words = {**given, "predictions": probs}
    [manifest] = select(build_options(SelectOptions, words, "select"))
    assert manifest["inputs"]["predictions"] == FeatureStore(probs).digest
    assert select(build_options(SelectOptions, words, "select")) == [manifest]
    other = import_as(tmp_path, "other", probabilities(clustered(200), 4), "probs")
    with pytest.raises(InputError, match=r"inputs\.predictions .*choose another --out"):
        select(build_options(SelectOptions, {**given, "predictions": other}, "select"))


def test_the_labels_of_the_pool_are_not_read(stores: tuple[str, str], tmp_path: Path) -> None:
    _, probs = stores
    poisoned = import_as(tmp_path, "poisoned", clustered(200), labels=np.arange(200)[::-1] % 7)
    for name in (*NAMES, "badge"):
        picks = [picked(f, tmp_path / f"{name}-{i}", name, predictions=probs) for i, f in enumerate((stores[0], poisoned))]
        assert picks[0] == picks[1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_only_the_predictions_have_are_not_picked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Blocks of two sizes, and rows 0..199 of 260: the same as of predictions for those alone."""
    p = probabilities(clustered(260)).astype(dtype)
    monkeypatch.setattr(ingest, "BLOCK_ROWS", 64)
    monkeypatch.setattr(store, "BLOCK_ROWS", 64)
    features, few = import_as(tmp_path, "features", clustered(200)), import_as(tmp_path, "few", p[:200], "probs")
    monkeypatch.setattr(ingest, "BLOCK_ROWS", 48)
    monkeypatch.setattr(store, "BLOCK_ROWS", 48)
    many = import_as(tmp_path, "many", p, "probs")
    for name in ("entropy", "badge"):
        picks = [picked(features, tmp_path / f"{name}-{i}", name, predictions=given) for i, given in enumerate((few, many))]
        assert picks[0] == picks[1]


def test_streamed_and_on_actors_the_same(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "BLOCK_ROWS", 64)
    monkeypatch.setattr(store, "BLOCK_ROWS", 64)
    features = import_as(tmp_path, "features", clustered(300))
    probs = import_as(tmp_path, "probs", probabilities(clustered(300)), "probs")
    boxes = detections(tmp_path, "boxes", boxes_of(300, 5))
    for name, predictions in (("badge", probs), ("entropy", probs), ("margin", boxes)):
        found = []
        for index, how in enumerate(({}, {"memory_per_shard": "1"}, {"workers": 1}, {"workers": 3, "memory_per_shard": "1"})):
            out = tmp_path / f"{name}-{index}"
            picked(features, out, name, predictions=predictions, **how)
            found.append((out / "picks.parquet").read_bytes())
        assert len(set(found)) == 1


def test_boxes_of_a_store(tmp_path: Path) -> None:
    boxes = boxes_of(150, 4)
    uri = detections(tmp_path, "boxes", boxes)
    scores = FeatureStore(uri).scores(np.array([149, 3, 70, 3]))
    assert [row[~np.isnan(row)].tolist() for row in scores] == [boxes[row] for row in (149, 3, 70, 3)]
    values = [of_boxes("margin", scores, "max") if scores else -1.0 for scores in boxes]
    assert picked(uri, tmp_path / "alone", "margin", option=("aggregate=max",)) == brute(values, 20)
    features = import_as(tmp_path, "features", clustered(150))
    assert picked(features, tmp_path / "beside", "margin", option=("aggregate=max",), predictions=uri) == brute(values, 20)


# --- what can't be


def refused(match: str, features: str, tmp_path: Path, strategy: str, **given: Any) -> None:
    with pytest.raises(InputError, match=match):
        picked(features, tmp_path / "refused", strategy, **given)
    assert not (tmp_path / "refused").exists()


def test_errors_say_what_a_strategy_reads(stores: tuple[str, str], tmp_path: Path) -> None:
    features, probs = stores
    boxes = detections(tmp_path, "boxes", boxes_of(200, 6))
    refused(
        "'entropy' reads a model's predictions, and .* holds embedding alone: give --predictions", features, tmp_path, "entropy"
    )
    refused("'badge' reads a model's predictions beside the vectors, and .* holds probs alone", probs, tmp_path, "badge")
    refused("holds embedding: give what `coresift predict` wrote", features, tmp_path, "entropy", predictions=features)
    refused(
        "'badge' reads probabilities, and .* a detector's boxes: use entropy", features, tmp_path, "badge", predictions=boxes
    )
    refused("holds the boxes that a detector found, not vectors", boxes, tmp_path, "kmeans")
    refused("no strategy named here reads them", features, tmp_path, "kmeans", predictions=probs)
    refused("unknown option 'aggregat'", probs, tmp_path, "entropy", option=("aggregat=max",))


def test_predictions_are_of_the_same_pool(stores: tuple[str, str], tmp_path: Path) -> None:
    features, _ = stores
    p = probabilities(clustered(200))
    fewer = import_as(tmp_path, "fewer", p[:150], "probs")
    renamed = import_as(tmp_path, "renamed", p, "probs", ids=np.array([f"image-{row}" for row in range(200)]))
    refused("50 rows have features and no predictions, the first is 150", features, tmp_path, "entropy", predictions=fewer)
    refused("row 0 has the id '0' in the features and 'image-0' there", features, tmp_path, "entropy", predictions=renamed)


def test_numbers_that_are_no_probabilities(stores: tuple[str, str], tmp_path: Path) -> None:
    p = probabilities(clustered(200))
    low, negative = p.copy(), p.copy()
    low[17] *= 0.8
    negative[30, :2] = -0.25, p[30, 0] + p[30, 1] + 0.25
    given = {name: import_as(tmp_path, name, x, "probs") for name, x in (("low", low), ("negative", negative))}
    for name, what in (("low", "row 17 has a sum of 0.8"), ("negative", "row 30 has a probability of -0.25")):
        for strategy in ("margin", "badge"):
            refused(what, stores[0], tmp_path, strategy, predictions=given[name])
    boxes = detections(tmp_path, "boxes", [[0.5], [0.2, 1.5]] * 100)
    refused("row 1 has a score of 1.5", boxes, tmp_path, "entropy", budget="2")


# --- beside the others


def test_compare_takes_predictions(stores: tuple[str, str], tmp_path: Path) -> None:
    features, probs = stores
    names = ("random", "entropy", "badge")
    given = {"features": features, "out": str(tmp_path / "cmp"), "strategies": names, "budget": "20", "seeds": 1, "workers": 0}
    words = {**given, "metrics": "coverage", "emd_sample": 50, "predictions": probs}
    table = compare(build_options(CompareOptions, words, "compare"))["table"]
    assert {row["strategy"] for row in table} == set(names)
    cell = pq.read_table(tmp_path / "cmp" / "cells" / "entropy" / "seed-0" / "20" / "selection" / "picks.parquet")
    assert cell["row"].to_pylist() == picked(features, tmp_path / "one", "entropy", predictions=probs)
    alone = {
        **words,
        "features": probs,
        "predictions": None,
        "strategies": ("random", "margin"),
        "out": str(tmp_path / "alone"),
    }
    assert compare(build_options(CompareOptions, alone, "compare"))["num_cells"] == 2
    boxes = detections(tmp_path, "boxes", boxes_of(200, 6))
    with pytest.raises(InputError, match="holds the boxes that a detector found, not vectors"):
        compare(build_options(CompareOptions, {**alone, "features": boxes, "out": str(tmp_path / "no")}, "compare"))


def test_what_strategies_read_is_listed() -> None:
    reads = {strategy["name"]: strategy["reads"] for strategy in describe_strategies()}
    assert reads["entropy"] == ["probs or detections"]
    assert reads["badge"] == ["vectors", "probs"]
    assert reads["gradient_similarity"] == ["influence"]
    assert (reads["random"], reads["uniform"]) == ([], ["label"])
