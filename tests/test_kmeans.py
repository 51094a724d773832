"""`kmeans` and its seeding against brute force and against the exact distribution."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import oracles
import pytest
import torch
from test_contract import clustered, shards_of

from engine import nearest as nearest_module
from engine.canonical import canonical_sqdist
from engine.products import scores
from engine.select import bounds, nearby, seeding
from engine.select import lloyd as lloyd_module
from engine.select.kmeans import Options, kmeans
from engine.select.lloyd import lloyd
from engine.select.seeding import d2_seeds
from engine.shards import Request, from_array, prepare

NOTHING = np.empty(0, dtype=np.int64)


def last_step(x: np.ndarray, request: Request, **options: object):
    shards = shards_of(x)
    prepare(shards, request.labeled)
    return list(kmeans(shards, request, Options(**options)))[-1]


def test_worked_by_hand() -> None:
    """Two groups on a line: means 1 and 11, so rows 1 and 4 (value 11) are nearest; the larger group comes first."""
    x = np.array([[0], [1], [2], [10], [11], [12], [11.5]], dtype=np.float32)
    step = last_step(x, Request(2, 0, NOTHING))
    assert step.picks.tolist() == [4, 1]
    assert step.gains.tolist() == [4.0, 3.0]
    assert step.objective == pytest.approx(2 + ((x[3:] - x[3:].mean()) ** 2).sum(), rel=1e-9)


def test_lloyd_steps_equal_brute_force() -> None:
    x = np.random.default_rng(0).random((400, 6)).astype(np.float32)
    start = x[:11]
    shards = from_array(x, block_rows=64)
    *_, last = lloyd(shards, start, 7, float(np.abs(x).max()))
    assert last.number == 7
    before, _ = oracles.lloyd(x, start, 6)
    expected, _ = oracles.lloyd(x, start, 7)
    np.testing.assert_allclose(last.centres, expected, atol=2e-6)
    assigned = ((x[:, None] - before[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert last.inertia == pytest.approx(((x - expected[assigned]) ** 2).sum(), rel=1e-6)


def plan_of(far: int, k: int) -> object:
    """Return a plan that takes the `far` centres that moved most for those that moved far, whatever that costs."""

    def plan(before, after, gaps, longest):  # type: ignore[no-untyped-def]
        every = np.arange(k)
        moves = bounds.SLACK * np.sqrt(canonical_sqdist(before, every, after, every))
        order = np.argsort(-moves, kind="stable")
        rest = float(moves[order[far]]) if far < k else 0.0
        return bounds.Motion(moves, np.sort(order[:far]), rest)

    return plan


@pytest.mark.parametrize("pool", ["clusters", "noise", "whole numbers", "duplicates", "far from the origin"])
def test_bounds_change_no_bit(monkeypatch: pytest.MonkeyPatch, pool: str) -> None:
    """Every centre after every step, without bounds and with any plan for them: the same bits."""
    rng = np.random.default_rng(7)
    x = {
        "clusters": clustered(600, 9),
        "noise": rng.random((600, 5)).astype(np.float32),
        "whole numbers": rng.integers(0, 4, (600, 3)).astype(np.float32),
        "duplicates": np.repeat(clustered(60, 4), 10, axis=0),
        "far from the origin": 1000 + rng.random((600, 4)).astype(np.float32),
    }[pool]
    start = x[rng.choice(600, 40, replace=False)]
    found = []
    for plan in (lambda *given: None, plan_of(0, 40), plan_of(7, 40), plan_of(40, 40), bounds.plan):
        monkeypatch.setattr(lloyd_module, "plan", plan)
        steps = lloyd(from_array(x, block_rows=128), start, 25, float(np.abs(x).max()))
        found.append([(step.moved, step.inertia, step.centres.tobytes()) for step in steps])
    assert len(found[0]) > 3
    assert all(other == found[0] for other in found[1:])


def test_bounds_spare_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once centres settle, few rows are compared with all of them, and few centres with all rows."""
    compared: list[int] = []
    product = bounds.scores

    def counting(offset, x, c, out=None):  # type: ignore[no-untyped-def]
        compared.append(len(x) * len(c))
        return product(offset, x, c, out)

    monkeypatch.setattr(bounds, "scores", counting)
    monkeypatch.setattr(nearest_module, "scores", counting)
    x = clustered(2000, 16)
    steps = list(lloyd(from_array(x), x[:200], 40, float(np.abs(x).max())))
    assert compared[0] == 2000 * 200
    assert sum(compared) < 0.5 * 2000 * 200 * len(steps)


def test_d2_seeding_leaves_the_first_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first Lloyd step after D^2 seeding needs no product, and gives what one would."""
    x = clustered(900, 7)
    largest = float(np.abs(x).max())
    seeded = from_array(x, block_rows=128)
    centres = seeded.take(d2_seeds(seeded, 60, 3, (0,))[0]).numpy()
    products: list[int] = []
    monkeypatch.setattr(nearest_module, "scores", lambda *given, **more: products.append(1) or scores(*given, **more))
    first = next(iter(lloyd(seeded, centres, 1, largest)))
    assert not products
    afresh = list(lloyd(from_array(x, block_rows=128), centres, 12, largest))
    assert first.centres.tobytes() == afresh[0].centres.tobytes()
    d2_seeds(seeded, 60, 3, (0,))
    again = list(lloyd(seeded, centres, 12, largest))
    assert [step.centres.tobytes() for step in again] == [step.centres.tobytes() for step in afresh]


def test_stops_once_nothing_moves() -> None:
    x = np.array([[0], [1], [10], [11]], dtype=np.float32)
    steps = list(lloyd(from_array(x), x[[0, 2]], 50, 11.0))
    assert [step.number for step in steps] == [1]
    assert steps[-1].centres.tolist() == [[0.5], [10.5]]


def test_an_empty_cluster_starts_again_at_the_farthest_eligible_row() -> None:
    """Two equal first centres: the second is empty after one step and takes the row farthest from its centre."""
    x = np.array([[0], [1], [2], [9], [30]], dtype=np.float32)
    shards = from_array(x)
    shards.blocks[0].eligible = np.array([True, True, True, True, False])
    first, *_ = lloyd(shards, np.array([[0], [0]], dtype=np.float32), 1, 30.0)
    assert first.centres.tolist() == [[np.float32(8.4)], [9.0]]


def test_a_cluster_without_eligible_rows_gives_its_turn_to_the_farthest() -> None:
    x = np.array([[0], [1], [5], [100], [101]], dtype=np.float32)
    step = last_step(x, Request(2, 0, np.array([3, 4])))
    assert step.picks.tolist() == [1, 2]
    assert step.gains.tolist() == [3.0, 0.0]


def test_the_best_of_the_restarts_is_kept() -> None:
    x = clustered(300, seed=3)
    single = [last_step(x, Request(9, seed, NOTHING), restarts=1, iterations=3).objective for seed in range(4)]
    assert len(set(single)) > 1
    best = last_step(x, Request(9, 0, NOTHING), restarts=6, iterations=3).objective
    assert best <= single[0]


def test_more_steps_never_raise_the_inertia() -> None:
    x = clustered(500, seed=4)
    inertia = [last_step(x, Request(12, 0, NOTHING), restarts=1, iterations=steps).objective for steps in range(8)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(inertia))
    assert inertia[-1] < inertia[0]


def test_inertia_is_the_sum_of_squared_distances() -> None:
    x = clustered(200, seed=5)
    shards = from_array(x, block_rows=64)
    step = last_step(x, Request(5, 0, NOTHING), restarts=1, iterations=3)
    seeds, _ = d2_seeds(shards, 5, 0, (0,))
    _, expected = oracles.lloyd(x, x[seeds], 3)
    assert step.objective == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 50])
def test_seeds_are_distinct_rows(k: int) -> None:
    seeds, _ = d2_seeds(shards_of(clustered()), k, 0, (0,))
    assert len(set(seeds.tolist())) == k


@pytest.mark.parametrize("candidates", [1, 8])
def test_d2_seeding_has_the_exact_distribution(monkeypatch: pytest.MonkeyPatch, candidates: int) -> None:
    """Every ordered triple of five points over 5,000 seeds, against its exact probability."""
    monkeypatch.setattr(seeding, "CANDIDATES", candidates)
    x = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [5.0, 1.0], [4.0, 4.0]], dtype=np.float32)
    shards = from_array(x, block_rows=2)
    trials = 5_000
    counts = Counter(tuple(d2_seeds(shards, 3, seed, (0,))[0].tolist()) for seed in range(trials))
    chi_square = 0.0
    for triple in itertools.permutations(range(5), 3):
        expected = trials * oracles.d2_sequence_probability(x, triple)
        chi_square += (counts[triple] - expected) ** 2 / expected
    assert sum(counts.values()) == trials
    assert chi_square < 98.3  # 59 degrees of freedom, p = 0.001; seeds are fixed, so it cannot flicker


def test_d2_seeding_of_three_rows_with_more_candidates_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where draws without replacement would be wrong: the second seed given the first, exactly."""
    monkeypatch.setattr(seeding, "CANDIDATES", 16)
    x = np.array([[0.0], [1.0], [3.0]], dtype=np.float32)
    shards = from_array(x)
    trials = 6_000
    pairs = Counter(tuple(d2_seeds(shards, 2, seed, (9,))[0].tolist()) for seed in range(trials))
    for pair in itertools.permutations(range(3), 2):
        expected = trials * oracles.d2_sequence_probability(x, pair)
        assert abs(pairs[pair] - expected) < 4 * np.sqrt(expected)


def test_seeding_takes_few_rounds() -> None:
    _, rounds = d2_seeds(shards_of(clustered(2000, 16)), 500, 0, (0,))
    assert rounds < 25


def approximate(x: np.ndarray, block_rows: int = 64, neighbors: int = 12, k: int = 120, **more: object):
    shards = shards_of(x, block_rows)
    prepare(shards, NOTHING)
    options = Options(restarts=2, iterations=9, exact_every=4, neighbors=neighbors, **more)
    return list(kmeans(shards, Request(k, 0, NOTHING), options))


def test_the_approximate_mode_does_not_depend_on_blocks_and_loses_little() -> None:
    x = np.random.default_rng(2).standard_normal((1500, 8)).astype(np.float32)
    found = approximate(x)[-1]
    other = approximate(x, block_rows=500)[-1]
    assert found.picks.tolist() == other.picks.tolist()
    assert found.objective == other.objective
    exact = last_step(x, Request(120, 0, NOTHING), restarts=2, iterations=9)
    assert found.objective < 1.02 * exact.objective
    assert found.objective != exact.objective


def test_the_approximate_mode_with_all_neighbors_is_exact() -> None:
    x = clustered(1500, 8)
    exact = last_step(x, Request(120, 0, NOTHING), restarts=2, iterations=9)
    found = approximate(x, neighbors=120)[-1]
    assert found.picks.tolist() == exact.picks.tolist()
    assert found.objective == exact.objective


def test_the_approximate_mode_goes_on_from_any_step() -> None:
    """From the last exact step: what rows were assigned to since then follows from it."""
    x = clustered(1500, 8)
    steps = approximate(x)
    for resume in steps[:-1]:
        shards = shards_of(x)
        prepare(shards, NOTHING)
        options = Options(restarts=2, iterations=9, exact_every=4, neighbors=12)
        *_, last = kmeans(shards, Request(120, 0, NOTHING, resume=resume), options)
        assert last.picks.tolist() == steps[-1].picks.tolist()
        assert last.objective == steps[-1].objective


def test_neighbors_are_the_nearest_centres_the_first_of_equal_ones() -> None:
    centres = np.random.default_rng(5).integers(-2, 3, (150, 4)).astype(np.float32)
    found = nearby.neighbors_of(torch.from_numpy(centres), 7)
    sqdist = ((centres[:, None].astype(np.float64) - centres[None]) ** 2).sum(axis=2)
    sqdist[np.arange(150), np.arange(150)] = -1
    expected = np.sort(np.argsort(sqdist, axis=1, kind="stable")[:, :8], axis=1)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(nearby.neighbors_of(torch.from_numpy(centres[:3]), 7), [[0, 1, 2]] * 3)
