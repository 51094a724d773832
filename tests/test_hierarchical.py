"""`hierarchical`: the split worked by hand and by brute force, the tree on pools whose structure is known."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
from test_contract import clustered, shards_of

from engine.draws import random_keys
from engine.schema import InputError
from engine.select.hierarchical import LEAF_KEY, Options, cluster_level, default_levels, hierarchical, quotas, split
from engine.shards import LocalShards, Request, Step, from_array, prepare

NOTHING = np.empty(0, dtype=np.int64)


def last_step(shards: LocalShards, request: Request, **options: object) -> Step:
    prepare(shards, np.union1d(request.labeled, request.excluded))
    return list(hierarchical(shards, request, Options(**options)))[-1]


def keys(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


@pytest.mark.parametrize(
    ("budget", "capacity", "expected"),
    [
        (0, [3, 0, 5], [0, 0, 0]),
        (6, [2, 2, 2], [2, 2, 2]),
        (7, [1, 10, 10], [1, 3, 3]),
        (8, [1, 10, 10], [1, 3, 4]),
        (2, [5, 5, 5], [1, 0, 1]),
        (5, [0, 0, 9], [0, 0, 5]),
        (24, [1, 4, 19], [1, 4, 19]),
    ],
)
def test_split_by_hand(budget: int, capacity: list[int], expected: list[int]) -> None:
    """What doesn't divide goes to the smallest keys: here the last, then the first, then the middle one."""
    assert split(budget, np.array(capacity), keys(5, 9, 1)).tolist() == expected


def test_split_is_as_even_as_can_be() -> None:
    """Of all ways to share a budget, the one whose sorted shares are largest from the smallest up: brute force."""
    for capacity in itertools.product(range(4), repeat=3):
        for budget in range(sum(capacity) + 1):
            ways = [w for w in itertools.product(*(range(c + 1) for c in capacity)) if sum(w) == budget]
            found = split(budget, np.array(capacity), keys(2, 3, 1)).tolist()
            assert tuple(found) in ways
            assert sum(share * share for share in found) == min(sum(share * share for share in w) for w in ways)


def test_quotas_go_down_the_tree() -> None:
    """Two top clusters share 8 equally: the left one's 4 over its lowest clusters 0 and 2, the right one's 4 all in 1."""
    eligible, parents = np.array([1, 50, 9]), [np.array([1, 0, 1])]
    assert quotas(8, eligible, parents, seed=0).tolist() == [1, 4, 3]
    assert quotas(60, eligible, parents, seed=0).tolist() == [1, 50, 9]
    assert quotas(30, eligible, parents, seed=0).tolist() == [1, 20, 9]


def test_default_levels() -> None:
    assert default_levels(50_000, 100) == (1000, 100, 10)
    assert default_levels(1_281_167, 12_800) == (12_800, 1280, 128, 12)
    assert default_levels(1797, 50) == (35, 3)
    assert default_levels(60, 5) == (1,)


def long_tail() -> tuple[np.ndarray, np.ndarray]:
    """Four kinds far apart, of 600, 60, 30 and 10 rows; returns the rows and their kind."""
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(4), [600, 60, 30, 10])
    x = 40 * np.eye(4)[kind] + rng.standard_normal((700, 4))
    return x.astype(np.float32), kind


def test_a_long_tail_gets_equal_shares() -> None:
    x, kind = long_tail()
    step = last_step(from_array(x, block_rows=128), Request(32, 0, NOTHING), levels=(40, 4))
    assert np.bincount(kind[step.picks]).tolist() == [8, 8, 8, 8]
    step = last_step(from_array(x, block_rows=128), Request(100, 0, NOTHING), levels=(40, 4))
    assert np.bincount(kind[step.picks]).tolist() == [30, 30, 30, 10]


def test_capacities_count_eligible_rows() -> None:
    """Of the rarest kind three rows may be picked, of the next none: the others share the rest."""
    x, kind = long_tail()
    labeled, excluded = (
        np.flatnonzero(kind == 3)[:4],
        np.concatenate([np.flatnonzero(kind == 3)[7:], np.flatnonzero(kind == 2)]),
    )
    step = last_step(from_array(x), Request(23, 0, labeled, excluded), levels=(40, 4))
    assert np.bincount(kind[step.picks], minlength=4).tolist() == [10, 10, 0, 3]
    assert not np.isin(step.picks, np.union1d(labeled, excluded)).any()


@pytest.mark.parametrize("seed", range(3))
def test_a_lowest_cluster_gives_the_rows_closest_to_its_centre(seed: int) -> None:
    x = clustered(300, seed=seed)
    step = last_step(shards_of(x), Request(50, seed, np.arange(20)), levels=(12, 3))
    centres = step.arrays["centres"]
    owner = oracles.nearest_centre(x, centres)
    for leaf in range(12):
        mine = step.picks[step.columns["leaf"] == leaf]
        rows = np.array([row for row in np.flatnonzero(owner == leaf) if row >= 20])
        order = rows[np.argsort(oracles.sqdist(x[rows], centres[leaf]), kind="stable")] if len(rows) else rows
        assert mine.tolist() == order[: len(mine)].tolist()
        assert (step.gains[step.columns["leaf"] == leaf] == (owner == leaf).sum() / max(1, len(mine))).all()
    assert np.unique(step.columns["leaf"][:8]).size == 8, "every lowest cluster has its turn before one has its second"


def test_random_leaves() -> None:
    x = clustered(300)
    step = last_step(shards_of(x), Request(30, 4, NOTHING), levels=(6, 2), leaf="random")
    owner = oracles.nearest_centre(x, step.arrays["centres"])
    for leaf in range(6):
        mine = step.picks[step.columns["leaf"] == leaf]
        rows = np.flatnonzero(owner == leaf)
        assert mine.tolist() == rows[np.argsort(random_keys(4, (LEAF_KEY,), rows))][: len(mine)].tolist()


def test_resampling_spreads_the_upper_clusters() -> None:
    """900 centres in one place and 30 in each of three others: plain k-means of 6 gives the crowd more than one of six."""
    rng = np.random.default_rng(2)
    place = np.repeat(np.arange(4), [900, 30, 30, 30])
    points = (6 * np.eye(8)[place] + rng.standard_normal((990, 8))).astype(np.float32)

    def crowded(resamplings: int) -> float:
        found = [cluster_level(points, 12, Options(resamplings=resamplings), seed, 1)[1] for seed in range(3)]
        return float(np.mean([len(np.unique(owner[place == 0])) for owner in found]))

    assert crowded(5) < crowded(0)


def test_resampling_takes_half_of_an_average_cluster() -> None:
    """Where that is one each, there is nothing to resample: 8 points in 4 clusters; 9 points in 4 have it."""
    points = clustered(8, seed=1)
    plain, again = (cluster_level(points, 4, Options(resamplings=n), 0, 1) for n in (0, 10))
    assert plain[0].tobytes() == again[0].tobytes()


def test_one_level_is_a_balanced_k_means() -> None:
    x, _ = long_tail()
    step = last_step(from_array(x), Request(20, 0, NOTHING), levels=(4,))
    assert np.bincount(step.columns["leaf"]).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("levels", [(10, 10), (10, 100), (301,), (100, 10, 20), ()])
def test_levels_must_fall(levels: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="lowest level first"):
        last_step(shards_of(clustered(300)), Request(5, 0, NOTHING), levels=levels)
