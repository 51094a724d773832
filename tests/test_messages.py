"""What a selection sends, counted where it leaves RayShards, beside what `jobs.traffic` says of it."""

from __future__ import annotations

import numpy as np
import pytest
from counted import Call, counting
from test_contract import NOTHING, clustered

from engine.ingest import import_features
from engine.reading import Reading
from engine.runner import run_method
from engine.schema import result_options
from engine.select import strategy_options
from engine.shards import Request
from engine.store import FeatureStore
from engine.verbs import ImportOptions
from jobs.traffic import ENVELOPE, LEGS, ROW_BYTES, Leg, Size, row_bytes

GIVEN = {
    "kmeans": {"restarts": 1, "iterations": 5},
    "hierarchical": {"iterations": 3, "levels": (300, 20)},
    "typiclust": {"iterations": 3},
    "activeft": {"steps": 3},
    "maxherding": {"candidates": 300},
    "probcover": {"candidates": 300, "clusters": 5},
    "facility_location": {"neighbors": 5},
}
"""Few steps: what each sends is the same in all."""
FILLED = {"_lowest_keys", "_largest", "_first", "_next", "_summarise", "_settle", "_choose", "_pull", "_lists"}
"""Whose calls and answers fill what is said of them; of the others it is the most."""
COUNTED = ("random", "kmeans", "hierarchical", "coreset", "activeft", "freesel", "maxherding", "typiclust", "facility_location")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], FeatureStore]:
    """Clustered vectors, by (rows, floats)."""
    found = {}
    for n, d in ((16384, 8), (32768, 8), (16384, 24)):
        folder = tmp_path_factory.mktemp("made")
        np.save(folder / "x.npy", clustered(n, d))
        import_features(ImportOptions(file=str(folder / "x.npy"), out=str(folder / "features")))
        found[n, d] = FeatureStore(str(folder / "features"))
    return found


def counted(
    monkeypatch: pytest.MonkeyPatch, store: FeatureStore, name: str, b: int, workers: int
) -> tuple[Size, dict[str, list[Call]]]:
    """Run a strategy on stand-in actors; return its size, and its calls by the function that ran on blocks."""
    shards, calls = counting(monkeypatch, store, workers, Reading(True))
    _, method, options = strategy_options(name, GIVEN.get(name, {}))
    run_method(method, shards, Request(b, 0, NOTHING), options)
    told = {field: getattr(options, field) for field in options.__dataclass_fields__} | result_options(options)
    by_name: dict[str, list[Call]] = {}
    for call in calls:
        by_name.setdefault(call.name, []).append(call)
    return Size(store.num_vectors, b, store.dim, workers, told), by_name


def check(leg: Leg, calls: list[Call], size: Size) -> None:
    down, up = max(call.down for call in calls), max(max(call.up) for call in calls)
    assert down <= leg.down + ENVELOPE, (leg, down)
    assert up <= leg.up + ENVELOPE, (leg, up)
    if leg.function in FILLED:
        assert down >= 0.8 * leg.down - ENVELOPE
    if leg.function in FILLED or leg.function == "_farthest_first":
        assert up >= 0.6 * leg.up - ENVELOPE
    for call in calls:
        assert call.folded == leg.folded
        assert len(call.up) == size.shards
        if call.folded:  # a tree: one message fewer than shards between them, one answer to the driver
            assert call.folds == size.shards - 1
            assert call.driver <= leg.up + ENVELOPE
        else:
            assert call.driver == sum(call.up)


@pytest.mark.parametrize("name", COUNTED)
def test_as_many_bytes_as_said(name: str, stores: dict[tuple[int, int], FeatureStore], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for n, d, b, workers in ((16384, 8, 200, 2), (32768, 8, 200, 4), (16384, 24, 100, 2)):
        size, calls = counted(monkeypatch, stores[n, d], name, b, workers)
        for leg in LEGS[name](size):
            if leg.function in calls:
                check(leg, calls[leg.function], size)
                seen.add(leg.function)
    assert len(seen) >= min(2, len(LEGS[name](size)))


def test_what_folds_does_not_grow_with_the_pool() -> None:
    for name, legs in LEGS.items():
        for small, large in zip(legs(Size(10**6, 100, 64)), legs(Size(10**9, 100, 64, 64)), strict=True):
            if small.folded and name not in ("hierarchical", "typiclust"):  # whose clusters, or their members, grow with it
                most = 9 * 10**5 if small.function == "_pull" else 0  # a batch's row numbers, above 100,000 rows
                assert large.down <= small.down + most, name
                assert large.up <= small.up, name


def test_rows_are_taken_without_a_word_from_blocks_that_have_none(
    stores: dict[tuple[int, int], FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, calls = counting(monkeypatch, stores[32768, 8], 4, Reading(True))
    rows = np.array([20_000, 3, 20_001])
    assert len(shards.take(rows)) == 3
    assert calls[-1].driver < 2 * ENVELOPE
    assert sorted(calls[-1].up)[:2] == [min(calls[-1].up)] * 2  # nothing of theirs


@pytest.mark.parametrize("name", ["kmeans", "coreset", "activeft", "freesel", "maxherding", "typiclust"])
def test_what_is_kept_for_a_row(
    name: str, stores: dict[tuple[int, int], FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _ = counting(monkeypatch, stores[16384, 8], 1, Reading(True))
    _, method, options = strategy_options(name, GIVEN.get(name, {}))
    run_method(method, shards, Request(200, 0, NOTHING), options)
    kept = shards.map(_kept)
    rows, size = stores[16384, 8].num_vectors, Size(16384, 200, 8, 1)
    assert sum(kept) / rows <= row_bytes(name, size) - ROW_BYTES + 1


def _kept(block: object) -> int:
    return _nbytes(block.state)  # type: ignore[attr-defined]


def _nbytes(value: object) -> int:
    if isinstance(value, dict):
        return sum(_nbytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_nbytes(item) for item in value)
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    return _nbytes(vars(value)) if hasattr(value, "__dict__") else 0
