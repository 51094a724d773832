"""`facility_location` and its graph against brute force."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import clustered

from engine.select import columns, graph
from engine.select.facility_location import Options, facility_location
from engine.shards import Request, Step, from_array, prepare

NOTHING = np.empty(0, dtype=np.int64)


def run(x: np.ndarray, budget: int, labeled: np.ndarray = NOTHING, seed: int = 0, neighbors: int = 50) -> Step:
    shards = from_array(x, block_rows=64)
    prepare(shards, labeled)
    return list(facility_location(shards, Request(budget, seed, labeled), Options(neighbors=neighbors)))[-1]


def brute(x: np.ndarray, budget: int, neighbors: int, labeled: np.ndarray = NOTHING) -> tuple[list[int], list[float]]:
    similarity = oracles.neighbor_similarity(x, neighbors)
    return oracles.coverage(similarity, budget, labeled.tolist(), ~np.isin(np.arange(len(x)), labeled))


@pytest.mark.parametrize(("candidates", "entries"), [(1, 1), (4, 1 << 20), (1024, 300), (1024, 1 << 20)])
@pytest.mark.parametrize("neighbors", [1, 10, 500])
@pytest.mark.parametrize("labeled", [[], [3, 70, 280]])
def test_equals_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, candidates: int, entries: int, neighbors: int, labeled: list[int]
) -> None:
    monkeypatch.setattr(columns, "CANDIDATES", candidates)
    monkeypatch.setattr(columns, "COLUMN_ENTRIES", entries)
    monkeypatch.setattr(graph, "QUERY_ROWS", 77)
    x, rows = clustered(300), np.array(labeled, dtype=np.int64)
    step = run(x, 60, rows, neighbors=neighbors)
    picks, gains = brute(x, 60, neighbors, rows)
    adding = 1 if neighbors == 1 else 60
    assert step.picks[:adding].tolist() == picks[:adding]
    np.testing.assert_allclose(step.gains, gains, atol=1e-6)
    assert step.objective is not None
    covered = oracles.neighbor_similarity(x, neighbors)[:, labeled + step.picks.tolist()].max(axis=1)
    assert step.objective == pytest.approx(covered.mean(), abs=1e-6)


def test_by_hand() -> None:
    """Four directions at 0, 30, 60 and 150 degrees, one neighbour each: 0 -> 30, 30 -> 0, 60 -> 30, 150 -> 60 (cosine 0).

    Row 1 has its own 1, and cos 30 from rows 0 and 2; then row 3 is worth 1; then rows 0 and 2 1 - cos 30 each.
    """
    angle = np.radians([0, 30, 60, 150])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    step = run(x, 4, neighbors=1)
    near = np.cos(np.radians(30))
    assert step.picks[:2].tolist() == [1, 3]
    np.testing.assert_allclose(step.gains * 4, [1 + 2 * near, 1, 1 - near, 1 - near], atol=1e-6)
    assert step.objective == pytest.approx(1.0)


@given(st.integers(2, 60), st.integers(1, 6), st.integers(0, 1000), st.integers(1, 8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_ties_go_to_the_smaller_row(n: int, d: int, seed: int, neighbors: int, some: bool) -> None:
    """Unit vectors: similarities are 0 or 1 and tie all the time, among neighbours and among picks."""
    rng = np.random.default_rng(seed)
    x = np.eye(d, dtype=np.float32)[rng.integers(0, d, n)]
    labeled = np.flatnonzero(rng.random(n) < 0.2) if some else NOTHING
    step = run(x, n - len(labeled), labeled, neighbors=neighbors)
    picks, gains = brute(x, n - len(labeled), neighbors, labeled)
    adding = np.array(gains) > 0
    assert step.picks[adding].tolist() == np.array(picks, dtype=np.int64)[adding].tolist()
    np.testing.assert_allclose(step.gains, gains, rtol=1e-12)


@pytest.mark.parametrize("neighbors", [1, 7, 199])
def test_graph_is_the_exact_one(monkeypatch: pytest.MonkeyPatch, neighbors: int) -> None:
    monkeypatch.setattr(graph, "QUERY_ROWS", 50)
    x = clustered(200)
    x[150:160] = x[:10]
    wide = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    for rows, lists, values in graph.neighbor_lists(from_array(x, block_rows=64), np.arange(200), neighbors):
        for row, found, similarity in zip(rows.tolist(), lists, values, strict=True):
            assert row not in found
            assert len(set(found.tolist())) == neighbors
            np.testing.assert_allclose(similarity, wide[found] @ wide[row], atol=1e-6)
            assert (np.diff(similarity) <= 0).all()
            others = np.delete(wide @ wide[row], row)
            np.testing.assert_allclose(similarity, np.sort(others)[::-1][:neighbors], atol=1e-6)


def test_every_one_of_more_equal_rows_than_neighbours_has_its_list() -> None:
    """Twelve equal rows and three neighbours: the smallest rows, without the row itself."""
    x = np.ones((12, 4), dtype=np.float32)
    ((rows, lists, _),) = graph.neighbor_lists(from_array(x), np.arange(12), 3)
    expected = [[other for other in range(12) if other != row][:3] for row in rows]
    assert lists.tolist() == expected


def test_lists_of_a_pool_smaller_than_they_are_end_early() -> None:
    x = clustered(3)
    ((_, lists, values),) = graph.neighbor_lists(from_array(x), np.arange(3), 5)
    assert (lists[:, 2:] == -1).all()
    assert np.isneginf(values[:, 2:]).all()


def test_gains_shrink_and_add_up() -> None:
    step = run(clustered(400), 300, neighbors=20)
    assert (np.diff(step.gains) <= 0).all()
    assert step.objective == pytest.approx(step.gains.sum(), rel=1e-12)


def test_few_rounds() -> None:
    assert int(run(clustered(1000, 16), 200).note.split()[0]) <= 8


def test_what_adds_nothing_is_drawn() -> None:
    """Twelve rows in three directions, all of each near each: three picks cover them; the others follow the seed."""
    x = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    steps = [run(x, 12, seed=seed) for seed in range(3)]
    assert all(step.picks[:3].tolist() == [0, 4, 8] and step.gains[3:].tolist() == [0.0] * 9 for step in steps)
    assert len({tuple(step.picks) for step in steps}) == 3
