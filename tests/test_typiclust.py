"""`typiclust` worked by hand and against brute force on the clusters it found."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from test_contract import clustered, shards_of

from engine.select import typiclust as module
from engine.select.clusters import Counts, packs
from engine.select.typiclust import Options, turns, typiclust
from engine.shards import LocalShards, Request, Step, from_array, prepare

NOTHING = np.empty(0, dtype=np.int64)


def last_step(shards: LocalShards, request: Request, **options: int) -> Step:
    prepare(shards, np.union1d(request.labeled, request.excluded))
    return list(typiclust(shards, request, Options(**options)))[-1]


def test_worked_by_hand() -> None:
    """Seven points round 0 and six round 100, two neighbours: 0.5 has neighbours at 0.5 and 0.5, 100 at 1 and 1.

    The larger cluster comes first; of equally typical rows the smaller one.
    """
    line = [-9, -2, 0, 0.5, 1, 2.5, 9, 90, 98, 99, 100, 101, 110]
    step = last_step(from_array(np.array(line, dtype=np.float32)[:, None], block_rows=4), Request(2, 0, NOTHING), neighbors=2)
    assert step.picks.tolist() == [3, 9]
    assert step.gains.tolist() == [2.0, 1.0]
    assert step.columns["cluster_size"].tolist() == [7, 6]


def test_labeled_rows_cover_their_cluster_and_stay_neighbours() -> None:
    """Three clusters, of which the one round 0 is covered: the others are picked from first, and 0.5 stays typical."""
    line = [-3, -2, -1, 0, 0.5, 1, 2, 3, 100, 101, 102, 103, 104, 105, 106, 200, 201, 202, 203, 204, 205]
    x = np.array(line, dtype=np.float32)[:, None]
    step = last_step(from_array(x), Request(3, 0, np.array([3])), neighbors=2, max_clusters=3)
    assert step.picks.tolist() == [9, 16, 4]
    assert step.columns["cluster_size"].tolist() == [7, 6, 8]
    assert step.gains[2] == 2.0


def test_turns_go_to_the_least_covered_then_the_largest() -> None:
    rows, labeled = np.array([9, 20, 5, 12, 20]), np.array([0, 1, 0, 0, 0])
    counts = Counts(rows, np.array([9, 19, 5, 2, 20]), labeled)
    assert turns(counts, 9).tolist() == [4, 3, 0, 1, 4, 3, 0, 1, 4]
    everything = turns(counts, 55)
    assert np.bincount(everything).tolist() == [9, 19, 5, 2, 20]
    assert set(everything[-5:].tolist()) == {2}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("budget", "max_clusters", "neighbors"), [(12, 500, 20), (40, 10, 5), (150, 60, 3), (200, 500, 20)])
def test_equals_brute_force(budget: int, max_clusters: int, neighbors: int, seed: int) -> None:
    x = clustered(260, seed=seed)
    x[40:55] = x[40]
    labeled, excluded = np.arange(0, 40, 2, dtype=np.int64), np.arange(1, 41, 4, dtype=np.int64)
    request = Request(budget, seed, labeled, excluded)
    step = last_step(shards_of(x), request, max_clusters=max_clusters, neighbors=neighbors, iterations=4)
    eligible = ~np.isin(np.arange(260), np.union1d(labeled, excluded))
    expected = oracles.typiclust(x, step.arrays["centres"], budget, labeled.tolist(), eligible, neighbors)
    assert len(step.arrays["centres"]) == min(budget + 20, max_clusters)
    assert step.picks.tolist() == expected


def test_pieces_of_any_size_give_the_same_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that span packs, queries and members in pieces, one canonical row at a time: nothing shows."""
    x = np.concatenate([clustered(250), np.repeat(clustered(5, seed=1), 10, axis=0)])
    whole = last_step(shards_of(x), Request(30, 0, NOTHING), max_clusters=8)
    for name, value in {"PACK_ROWS": 50, "QUERY_ROWS": 7, "MEMBER_ROWS": 33, "WAVE": 0, "TILE_ELEMENTS": 64}.items():
        monkeypatch.setattr(module, name, value)
    pieces = last_step(shards_of(x, 40), Request(30, 0, NOTHING), max_clusters=8)
    assert pieces.picks.tolist() == whole.picks.tolist()
    assert pieces.gains.tobytes() == whole.gains.tobytes()


def test_few_rows_are_measured_canonically(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    canonical = module.canonical_sqdist
    monkeypatch.setattr(module, "canonical_sqdist", lambda a, i, b, j: (measured.append(len(i)), canonical(a, i, b, j))[1])
    last_step(from_array(clustered(2000, 32)), Request(10, 0, NOTHING))
    assert sum(measured) < 10 * 2 * 25


def test_a_row_alone_in_its_cluster_has_no_typicality() -> None:
    x = np.array([[0.0], [10.0], [20.0]], dtype=np.float32)
    step = last_step(from_array(x), Request(3, 0, NOTHING))
    assert sorted(step.picks.tolist()) == [0, 1, 2]
    assert step.gains.tolist() == [0.0, 0.0, 0.0]


def test_packs() -> None:
    rows = np.array([3, 4, 50, 2, 2, 9, 1])
    found = [run.tolist() for run in packs(np.array([0, 1, 2, 3, 4, 6]), rows, 8)]
    assert found == [[0, 1], [2], [3, 4, 6]]


def test_goes_on_from_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between groups of clusters too; those that were done before are not searched again."""
    monkeypatch.setattr(module, "PACK_ROWS", 50)
    shards = shards_of(clustered())
    prepare(shards, NOTHING)
    steps = list(typiclust(shards, Request(30, 0, NOTHING), Options()))
    groups = steps[-1].total - Options().iterations
    assert groups > 3
    searched = []
    typical = module._Pack.typical
    monkeypatch.setattr(module._Pack, "typical", lambda self, quota: (searched.append(1), typical(self, quota))[1])
    for step in (steps[0], steps[2], steps[-3], steps[-1]):
        searched.clear()
        prepare(shards, NOTHING)
        again = list(typiclust(shards, Request(30, 0, NOTHING, resume=step), Options()))
        assert again[-1].picks.tolist() == steps[-1].picks.tolist()
        assert again[-1].gains.tobytes() == steps[-1].gains.tobytes()
        assert len(searched) == min(groups, steps[-1].number - step.number)
