"""The same picks, byte for byte, however the pool is cut and wherever it lives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from folding import Backwards
from scores import write_scores
from test_contract import QUICK, SCORED, probabilities, worth

from engine.runner import run_method
from engine.schema import build_options
from engine.select import STRATEGIES, select, strategy_options
from engine.shards import LocalShards, RayShards, Reading, Request, Step, from_array, open_local
from engine.store import FeatureStore
from engine.verbs import SelectOptions

LABELED = np.arange(5, 900, 100, dtype=np.int64)
BUDGET = 80
CASES = {name: (name, QUICK.get(name, {})) for name in STRATEGIES}
CASES["kmeans, approximate"] = ("kmeans", {"neighbors": 10, "exact_every": 3, "iterations": 8, "restarts": 2})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """26 blocks of 64 rows: enough for 7 shards that differ in size."""
    from engine import ingest, store
    from engine.verbs import ImportOptions

    rng = np.random.default_rng(0)
    x = (
        rng.standard_normal((1650, 24)).astype(np.float32)
        + 4 * rng.standard_normal((30, 24)).astype(np.float32)[rng.integers(0, 30, 1650)]
    )
    folder = tmp_path_factory.mktemp("store")
    np.savez(folder / "x.npz", features=x, labels=rng.integers(0, 6, 1650))
    np.savez(folder / "p.npz", features=probabilities(x))
    patch = pytest.MonkeyPatch()
    patch.setattr(ingest, "BLOCK_ROWS", 64)
    patch.setattr(store, "BLOCK_ROWS", 64)
    ingest.import_features(ImportOptions(file=str(folder / "x.npz"), out=str(folder / "features")))
    ingest.import_features(ImportOptions(file=str(folder / "p.npz"), out=str(folder / "probs"), holds="probs"))
    patch.undo()
    for column in ("influence", "stability"):
        write_scores(folder / column, column, worth(x)[:, 0], column)
    opened = FeatureStore(str(folder / "features"))
    assert opened.num_blocks == 26
    return opened


def reading_of(store: FeatureStore, name: str) -> Reading:
    """Vectors, labels and one of the stores beside them: that which a case reads, by its column."""
    column = next(iter(STRATEGIES[CASES[name][0]].predictions), "probs")
    return Reading(True, ("label",), predictions=str(Path(store.place.uri).parent / column))


def run(case: str, shards: object) -> Step:
    _, method, options = strategy_options(*CASES[case])
    return run_method(method, shards, Request(BUDGET, 0, LABELED), options)


def same(a: Step, b: Step) -> bool:
    """Whether two results agree to the last bit, gains and columns too."""
    columns = a.columns.keys() == b.columns.keys() and all(np.array_equal(a.columns[k], b.columns[k]) for k in a.columns)
    return (
        columns
        and a.picks.tobytes() == b.picks.tobytes()
        and a.gains.tobytes() == b.gains.tobytes()
        and a.objective == b.objective
    )


@pytest.fixture(scope="module")
def expected(store: FeatureStore) -> dict[str, Step]:
    return {name: run(name, open_local(store, reading_of(store, name))) for name in CASES}


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
def test_ray_shards_give_the_same_picks(
    ray_session: None, store: FeatureStore, expected: dict[str, Step], workers: int
) -> None:
    by_reading: dict[Reading, list[str]] = {}
    for name in CASES:
        if workers == 2 or name not in SCORED:  # each further reading starts actors of its own
            by_reading.setdefault(reading_of(store, name), []).append(name)
    for reading, names in by_reading.items():
        shards = RayShards(store, workers, 2, reading)
        try:
            for name in names:
                assert same(run(name, shards), expected[name]), name
        finally:
            shards.close()


@pytest.mark.parametrize("name", sorted(CASES))
def test_one_thread_or_two(store: FeatureStore, expected: dict[str, Step], name: str) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert same(run(name, open_local(store, reading_of(store, name))), expected[name])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(CASES))
def test_order_of_combining_does_not_matter(store: FeatureStore, expected: dict[str, Step], name: str) -> None:
    """Fold the blocks from the right instead of from the left: associativity, exactly."""
    local = open_local(store, reading_of(store, name))

    assert same(run(name, Backwards(local.blocks, local.d)), expected[name])


def test_published_bytes_are_the_same(ray_session: None, store: FeatureStore, tmp_path: Path) -> None:
    found = set()
    for index, workers in enumerate([0, 0, 1, 3]):
        out = tmp_path / str(index)
        given = {"features": store.place.uri, "out": str(out), "strategy": "kmeans", "budget": "20", "workers": workers}
        select(build_options(SelectOptions, given, "select"))
        found.add(tuple((out / name).read_bytes() for name in ("picks.parquet", "ids.txt", "indices.json")))
    assert len(found) == 1


def test_blocks_are_the_unit_of_rounding_not_shards() -> None:
    """Sums over blocks of another size may round alike or not; over the same blocks they must be the same bits."""
    x = np.random.default_rng(1).standard_normal((500, 16)).astype(np.float32)
    a, b = from_array(x, block_rows=64), from_array(x, block_rows=64)
    b.blocks.reverse()
    for name in ("kmeans", "coreset"):
        assert same(run_unlabeled(name, a), run_unlabeled(name, b))


def run_unlabeled(name: str, shards: LocalShards) -> Step:
    _, method, options = strategy_options(name, QUICK.get(name, {}))
    nothing = np.empty(0, dtype=np.int64)
    shards.blocks.sort(key=lambda block: block.index)
    return run_method(method, shards, Request(25, 3, nothing), options)
