"""`coreset` against one-at-a-time greedy, pick for pick."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracles
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import clustered

from engine.embed import embed
from engine.select.coreset import Options, coreset
from engine.shards import Request, Step, from_array, prepare
from engine.store import FeatureStore
from engine.verbs import EmbedOptions

NOTHING = np.empty(0, dtype=np.int64)


def run(x: np.ndarray, budget: int, labeled: np.ndarray = NOTHING, m: int = 1024, block_rows: int = 64) -> Step:
    shards = from_array(x, block_rows=block_rows)
    prepare(shards, labeled)
    return list(coreset(shards, Request(budget, 0, labeled), Options(candidates=m)))[-1]


def brute(x: np.ndarray, picks: np.ndarray, labeled: np.ndarray = NOTHING) -> list[int]:
    eligible = ~np.isin(np.arange(len(x)), labeled)
    first = None if len(labeled) else int(picks[0])
    return oracles.coreset(x, len(picks), labeled.tolist(), first, eligible)


@pytest.mark.parametrize("m", [1, 2, 7, 64, 1024])
def test_equals_one_at_a_time(m: int) -> None:
    x = clustered(500)
    picks = run(x, 60, m=m).picks
    assert picks.tolist() == brute(x, picks)


@pytest.mark.parametrize("m", [1, 5, 1024])
def test_starts_from_the_labeled_rows(m: int) -> None:
    x, labeled = clustered(400, seed=2), np.array([3, 50, 51, 399])
    picks = run(x, 40, labeled, m=m).picks
    assert picks.tolist() == brute(x, picks, labeled)


@given(st.integers(2, 60), st.integers(1, 3), st.integers(0, 1000), st.sampled_from([1, 2, 3, 9]))
@settings(max_examples=60, deadline=None)
def test_ties_go_to_the_smaller_row(n: int, d: int, seed: int, m: int) -> None:
    x = np.random.default_rng(seed).integers(0, 3, (n, d)).astype(np.float32)
    picks = run(x, n, m=m, block_rows=7).picks
    assert picks.tolist() == brute(x, picks)


def test_worked_by_hand() -> None:
    x = np.array([[0], [1], [4], [10]], dtype=np.float32)
    step = run(x, 3, np.array([0]))
    assert step.picks.tolist() == [3, 2, 1]
    assert step.gains.tolist() == [10.0, 4.0, 1.0]
    assert step.objective == 0.0


def test_gains_are_the_shrinking_radius() -> None:
    step = run(clustered(300), 40)
    assert np.isnan(step.gains[0])
    assert (np.diff(step.gains[1:]) <= 0).all()
    assert step.objective is not None
    assert step.objective <= step.gains[-1]


def test_few_rounds() -> None:
    note = run(clustered(2000, 16), 300).note
    assert int(note.split()[0]) <= 15


def test_equals_brute_force_on_real_features(shared: Path, tmp_path: Path) -> None:
    pool = pq.read_table(shared / "cifar10" / "test.parquet").slice(0, 2000)
    pq.write_table(pool, tmp_path / "cifar.parquet")
    embed(EmbedOptions(pool=str(tmp_path / "cifar.parquet"), out=str(tmp_path / "features"), encoder="pixels", workers=0))
    x = FeatureStore(str(tmp_path / "features")).vectors()
    picks = run(x, 100, block_rows=512).picks
    assert picks.tolist() == brute(x, picks)
