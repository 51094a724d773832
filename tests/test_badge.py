"""`badge` against explicit gradient embeddings, and the exact probabilities of its draws."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import check_frequencies
from test_contract import NOTHING, clustered, probabilities

from engine.runner import run_method
from engine.select import badge as module
from engine.select.badge import Gradients, Options, badge
from engine.shards import LocalShards, Request, Step, from_array, prepare


def run(shards: LocalShards, budget: int, labeled: np.ndarray = NOTHING, excluded: np.ndarray = NOTHING, seed: int = 0) -> Step:
    return run_method(badge, shards, Request(budget, seed, labeled, excluded), Options())


def shards_of(x: np.ndarray, p: np.ndarray, block_rows: int = 64) -> LocalShards:
    return from_array(x, block_rows=block_rows, predictions={"probs": p})


def embeddings(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """(p - e_y) outer x of each image, flat: what badge never makes."""
    residual = p.astype(np.float64)
    residual[np.arange(len(p)), p.argmax(axis=1)] -= 1
    return (residual[:, :, None] * x[:, None, :].astype(np.float64)).reshape(len(p), -1)


def sqdists(g: np.ndarray) -> np.ndarray:
    return ((g[:, None] - g[None]) ** 2).sum(axis=2)


# --- distances


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_distances_factorise(n: int, d: int, classes: int, seed: int) -> None:
    x = clustered(n, d, seed)
    x[n // 2 :] = x[: n - n // 2]
    p = probabilities(x, classes)
    g = Gradients.of(torch.from_numpy(p), torch.from_numpy(x))
    i, j = (index.ravel() for index in np.indices((n, n)))
    found = module._sqdist(g, i, g, j).reshape(n, n)
    expected = sqdists(embeddings(x, p))
    assert found == pytest.approx(expected, abs=1e-5 * max(1.0, expected.max()))
    same = (x[:, None] == x[None]).all(axis=2)
    assert (found[same] == 0).all()
    assert (found == found.T).all()


@pytest.mark.parametrize("asked", ["float32", "bf16"])
def test_nearest_is_canonical(asked: str) -> None:
    """Products decide nothing that canonical distances would decide otherwise; many are equal or nearly so."""
    from engine import products

    x = np.repeat(clustered(60, 10, 4), 5, axis=0)
    x[::7] *= np.float32(1 + 2**-20)
    p = probabilities(x)
    mine = Gradients.of(torch.from_numpy(p), torch.from_numpy(x))
    new = mine.some(np.arange(0, 300, 4, dtype=np.int64))
    i, j = (index.ravel() for index in np.indices((300, 75)))
    exact = module._sqdist(mine, i, new, j).reshape(300, 75).min(axis=1)
    before = np.where(np.arange(300) % 3 == 0, np.inf, exact * np.random.default_rng(0).choice([0.9, 1.0, 1.1], 300))
    with products.precision(asked):
        found = module._nearest(mine, new, before)
    assert found.tobytes() == np.minimum(before, exact).tobytes()


# --- draws


def sequence_probability(g: np.ndarray, sequence: tuple[int, ...], labeled: tuple[int, ...]) -> float:
    """Probability that draws made one at a time take exactly these images."""
    distance, probability, taken = sqdists(g), 1.0, list(labeled)
    for row in sequence:
        if taken:
            d2 = distance[:, taken].min(axis=1)
            d2[taken] = 0
            probability *= d2[row] / d2.sum()
        else:
            probability /= len(g)
        taken.append(row)
    return probability


FEW_X = np.array([[1, 0], [0.8, 0.6], [0, 2], [-1, 0.5], [1, 1], [0.3, -1]], dtype=np.float32)
FEW_P = np.array(
    [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.35, 0.25], [0.2, 0.2, 0.6], [0.8, 0.1, 0.1], [0.34, 0.33, 0.33]],
    dtype=np.float32,
)


@pytest.mark.parametrize(("candidates", "labeled"), [(1, ()), (6, ()), (6, (1,))])
def test_draws_have_the_exact_distribution(monkeypatch: pytest.MonkeyPatch, candidates: int, labeled: tuple[int, ...]) -> None:
    """Every ordered triple of six images, against its exact probability by explicit outer products."""
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    shards, g, trials = shards_of(FEW_X, FEW_P, 2), embeddings(FEW_X, FEW_P), 3000
    counts = Counter(tuple(run(shards, 3, np.array(labeled, dtype=np.int64), seed=s).picks.tolist()) for s in range(trials))
    left = [row for row in range(6) if row not in labeled]
    expected = {s: trials * sequence_probability(g, s, labeled) for s in itertools.permutations(left, 3)}
    check_frequencies(counts, expected, trials)


def test_gain_is_the_distance_to_the_nearest_pick_before() -> None:
    x = clustered(150, 8, 5)
    p = probabilities(x)
    distance = np.sqrt(sqdists(embeddings(x, p)))
    for labeled in (NOTHING, np.array([3, 77])):
        step = run(shards_of(x, p), 40, labeled)
        there = labeled.tolist()
        for pick, gain in zip(step.picks.tolist(), step.gains, strict=True):
            assert np.isnan(gain) if not there else gain == pytest.approx(distance[pick, there].min(), abs=1e-5)
            there.append(pick)


def test_a_sure_model_gives_no_distance_and_unsure_images_are_drawn() -> None:
    """Where p is one class the embedding is zero: those images are at distance 0 from a labelled one, drawn last by seed."""
    x, p = clustered(60, 6, 2), np.zeros((60, 3), dtype=np.float32)
    p[:, 0] = 1
    p[:10] = [0.4, 0.35, 0.25]
    found = [run(shards_of(x, p, 16), 59, np.array([59]), seed=seed) for seed in (0, 1)]
    for step in found:
        assert set(step.picks[:10].tolist()) == set(range(10))
        assert (step.gains[:10] > 0).all()
        assert step.gains[10:].tolist() == [0.0] * 49
    assert found[0].picks[10:].tolist() != found[1].picks[10:].tolist()


def test_length_counts() -> None:
    """Of two equally unsure images beside a labelled one the one of three times the length is drawn nine times as often."""
    x = np.array([[1, 0], [0, 1], [0, 3]], dtype=np.float32)
    p = np.array([[1, 0], [0.5, 0.5], [0.5, 0.5]], dtype=np.float32)
    share = np.mean([run(shards_of(x, p), 1, np.array([0]), seed=seed).picks[0] == 2 for seed in range(1000)])
    assert abs(share - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 1000)


# --- rounds


def test_few_rounds() -> None:
    x = clustered(2000, 16, 3)
    note = run(shards_of(x, probabilities(x), 512), 500).note
    assert int(note.split()[0]) <= 25


def test_excluded_images_are_not_picked_and_lower_nothing() -> None:
    x, p = FEW_X, FEW_P
    for seed in range(30):
        assert 4 not in run(shards_of(x, p, 2), 4, np.array([0]), np.array([4]), seed=seed).picks
    step = run(shards_of(x, p, 2), 4, np.array([0]), np.array([4]))
    assert step.gains[0] == pytest.approx(np.sqrt(sqdists(embeddings(x, p))[0, step.picks[0]]))


def test_prefixes_and_threads() -> None:
    x = clustered(400, 12, 8)
    p = probabilities(x)
    whole = run(shards_of(x, p), 80)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            again = run(shards_of(x, p), 80)
            assert again.picks.tobytes() == whole.picks.tobytes()
            assert again.gains.tobytes() == whole.gains.tobytes()
    finally:
        torch.set_num_threads(before)
    for budget in (1, 33, 79):
        assert run(shards_of(x, p), budget).picks.tolist() == whole.picks[:budget].tolist()


def test_a_run_goes_on_from_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 16)
    x = clustered(200, 9, 9)
    p, labeled = probabilities(x), np.array([3, 60])
    whole = run(shards_of(x, p), 60, labeled)

    def fresh() -> LocalShards:
        shards = shards_of(x, p)
        prepare(shards, labeled)
        return shards

    steps = list(badge(fresh(), Request(60, 0, labeled), Options()))
    assert len(steps) > 4
    for resume in steps:
        *_, last = badge(fresh(), Request(60, 0, labeled, resume=resume), Options())
        assert last.picks.tobytes() == whole.picks.tobytes()
        assert last.gains.tobytes() == whole.gains.tobytes()
