"""`freesel` against a brute force over patterns, and against the exact probabilities of its draws."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import check_frequencies
from test_contract import clustered

from engine.draws import random_keys
from engine.runner import run_method
from engine.schema import InputError, build_options
from engine.select import freesel as module
from engine.select.freesel import REST_KEY, Options, freesel, unit
from engine.shards import LocalShards, Request, Step, from_array, take_patterns

NOTHING = np.empty(0, dtype=np.int64)


def run(
    shards: LocalShards, budget: int, labeled: np.ndarray = NOTHING, excluded: np.ndarray = NOTHING, seed: int = 0, **given
):
    return run_method(freesel, shards, Request(budget, seed, labeled, excluded), Options(**given))


def pool(images: int, seed: int, d: int = 12, most: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Patterns (v, d) around nine centres, and their images' rows, 1 to `most` patterns an image."""
    rows = np.repeat(np.arange(images), np.random.default_rng(seed).integers(1, most + 1, images))
    return clustered(len(rows), d, seed), rows


def exact_signs(patterns: int, d: int, seed: int) -> np.ndarray:
    """Vectors of norm 1 whose every distance is exact in float64: signed halves on four of d places, or one one."""
    rng = np.random.default_rng(seed)
    x = np.zeros((patterns, d), dtype=np.float32)
    for row in x:
        if rng.random() < 0.5:
            row[rng.permutation(d)[:4]] = rng.choice([-0.5, 0.5], 4)
        else:
            row[rng.integers(d)] = rng.choice([-1.0, 1.0])
    return x


def brute_fds(x: np.ndarray, rows: np.ndarray, there: list[int], budget: int, open_rows: set[int], seed: int) -> list[int]:
    """Farthest first, one at a time: every pattern's smallest D to all patterns of the images taken."""
    unit_x = unit(torch.from_numpy(x)).numpy().astype(np.float64)
    distance = 0.5 * ((unit_x[:, None] - unit_x[None]) ** 2).sum(axis=2)
    picks: list[int] = []
    while len(picks) < budget:
        nearest = distance[:, np.isin(rows, there + picks)].min(axis=1)
        nearest[~np.isin(rows, sorted(open_rows - set(picks)))] = -1
        if nearest.max() == 0:
            rest = np.array(sorted(open_rows - set(picks)), dtype=np.int64)
            order = np.argsort(random_keys(seed, (REST_KEY,), rest), kind="stable")
            return picks + rest[order][: budget - len(picks)].tolist()
        picks.append(int(rows[nearest.argmax()]))
    return picks


def check_fds(x: np.ndarray, rows: np.ndarray, budget: int, labeled: np.ndarray, block_rows: int) -> Step:
    step = run(from_array(x, block_rows=block_rows, rows=rows), budget, labeled, sampling="fds")
    picks = step.picks.tolist()
    everyone = set(np.unique(rows).tolist()) - set(labeled.tolist())
    first = [] if len(labeled) else picks[:1]
    expected = brute_fds(x, rows, labeled.tolist() + first, budget - len(first), everyone - set(first), 0)
    assert picks == first + expected
    return step


# --- farthest first


@pytest.mark.parametrize("m", [1, 3, 1024])
@pytest.mark.parametrize("labeled", [NOTHING, np.array([0, 7, 100])])
def test_farthest_first_equals_one_at_a_time(monkeypatch: pytest.MonkeyPatch, m: int, labeled: np.ndarray) -> None:
    monkeypatch.setattr(module, "CANDIDATES", m)
    x, rows = pool(150, 1)
    step = check_fds(x, rows, 60, labeled, 32)
    distances = step.gains[np.isfinite(step.gains)]
    assert (np.diff(distances) <= 0).all()


@given(st.integers(1, 25), st.integers(1, 4), st.integers(0, 1000), st.sampled_from([1, 2, 5, 1024]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_farthest_first_with_ties(images: int, most: int, seed: int, m: int, labels: bool) -> None:
    rows = np.repeat(np.arange(images), np.random.default_rng(seed).integers(1, most + 1, images))
    labeled = np.arange(0, images, 3) if labels and images > 1 else NOTHING
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CANDIDATES", m)
        check_fds(exact_signs(len(rows), 5, seed), rows, images - len(labeled), labeled, 7)


def test_worked_by_hand() -> None:
    """Image 0 is labelled and points east. Image 1 has a pattern that points west (D 2), which takes the image with
    its other pattern, north; so image 2 (north-east, cos 0.7 to both) is at 1 - 0.71 and image 3 (south) at 1.
    """
    x = np.array([[2, 0], [0, 1], [-3, 0], [1, 1], [0, -5]], dtype=np.float32)
    step = run(from_array(x, rows=np.array([0, 1, 1, 2, 3])), 3, np.array([0]), sampling="fds")
    assert step.picks.tolist() == [1, 3, 2]
    assert step.gains == pytest.approx([2.0, 1.0, 1 - np.sqrt(0.5)], abs=1e-6)
    assert step.columns["pattern"].tolist() == [1, 0, 0]


def test_excluded_images_are_not_picked_and_lower_nothing() -> None:
    x = np.array([[1, 0], [-1, 0], [-1, 0.01], [0, 1]], dtype=np.float32)
    shards = from_array(x, rows=np.array([0, 1, 2, 3]))
    assert run(shards, 2, np.array([0]), np.array([1]), sampling="fds").picks.tolist() == [2, 3]
    for seed in range(30):
        assert 1 not in run(shards, 2, np.array([0]), np.array([1]), seed=seed).picks


@pytest.mark.parametrize("sampling", ["d2", "fds"])
def test_few_rounds(sampling: str) -> None:
    x, rows = pool(2000, 3, 16, most=5)
    note = run(from_array(x, block_rows=512, rows=rows), 500, sampling=sampling).note
    assert int(note.split()[0]) <= 25


# --- draws


def sequence_probability(x: np.ndarray, rows: np.ndarray, sequence: tuple[int, ...], labeled: tuple[int, ...]) -> float:
    """Probability that draws made one at a time take exactly these images."""
    unit_x = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    distance = 1 - unit_x @ unit_x.T
    probability, taken = 1.0, list(labeled)
    for image in sequence:
        if taken:
            d2 = distance[:, np.isin(rows, taken)].min(axis=1) ** 2
            d2[np.isin(rows, taken)] = 0
            probability *= d2[rows == image].sum() / d2.sum()
        else:
            probability /= len(np.unique(rows))
        taken.append(image)
    return probability


FEW = np.array([[1, 0, 0], [0.9, 0.3, 0], [0, 1, 0], [0, 0, 1], [-1, 0.2, 0], [0.7, 0.7, 0], [0.1, 0.2, -1], [1, 1, 1]])
FEW_ROWS = np.array([0, 0, 1, 2, 2, 2, 3, 4])


@pytest.mark.parametrize(("candidates", "labeled"), [(1, ()), (6, ()), (6, (1,))])
def test_draws_have_the_exact_distribution(monkeypatch: pytest.MonkeyPatch, candidates: int, labeled: tuple[int, ...]) -> None:
    """Every ordered triple of five images with 1 to 3 patterns, against its exact probability."""
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    x = FEW.astype(np.float32)
    shards = from_array(x, block_rows=2, rows=FEW_ROWS)
    trials = 3000
    counts = Counter(tuple(run(shards, 3, np.array(labeled, dtype=np.int64), seed=s).picks.tolist()) for s in range(trials))
    left = [image for image in range(5) if image not in labeled]
    expected = {s: trials * sequence_probability(x, FEW_ROWS, s, labeled) for s in itertools.permutations(left, 3)}
    check_frequencies(counts, expected, trials)


def test_d2_squares_the_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """D of 2 and 1 beside a labelled image: 4 to 1, not 2 to 1."""
    shards = from_array(np.array([[1, 0], [-1, 0], [0, 1]], dtype=np.float32))
    monkeypatch.setattr(module, "CANDIDATES", 4)
    share = np.mean([run(shards, 1, np.array([0]), seed=seed).picks[0] == 1 for seed in range(2000)])
    assert abs(share - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 2000)


def test_gain_is_the_distance_of_the_drawn_pattern() -> None:
    x, rows = pool(120, 5)
    step = run(from_array(x, block_rows=32, rows=rows), 30)
    unit_x = unit(torch.from_numpy(x)).numpy().astype(np.float64)
    assert np.isnan(step.gains[0])
    for rank in range(1, 30):
        mine = unit_x[np.flatnonzero(rows == step.picks[rank])[step.columns["pattern"][rank]]]
        there = unit_x[np.isin(rows, step.picks[:rank])]
        assert step.gains[rank] == pytest.approx((1 - there @ mine).min(), abs=1e-6)


# --- both


@pytest.mark.parametrize("sampling", ["d2", "fds"])
def test_duplicates_are_drawn_last_and_by_seed(sampling: str) -> None:
    x = np.repeat(np.eye(4, dtype=np.float32), 2, axis=0)[np.tile(np.arange(8), 5)]
    rows = np.repeat(np.arange(20), 2)  # each image twice one of four directions
    found = [run(from_array(x, block_rows=8, rows=rows), 20, seed=seed, sampling=sampling) for seed in (0, 1)]
    for step in found:
        assert sorted(step.picks.tolist()) == list(range(20))
        assert {int(row) % 4 for row in step.picks[:4]} == {0, 1, 2, 3}
        assert step.gains[1:].tolist() == [1.0] * 3 + [0.0] * 16
        assert step.columns["pattern"][4:].tolist() == [-1] * 16
    assert found[0].picks[4:].tolist() != found[1].picks[4:].tolist()


@pytest.mark.parametrize("sampling", ["d2", "fds"])
def test_blocks_threads_and_prefixes(sampling: str) -> None:
    x, rows = pool(400, 8)
    whole = run(from_array(x, block_rows=64, rows=rows), 80, sampling=sampling)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            again = run(from_array(x, block_rows=64, rows=rows), 80, sampling=sampling)
            assert again.picks.tobytes() == whole.picks.tobytes()
            assert again.gains.tobytes() == whole.gains.tobytes()
    finally:
        torch.set_num_threads(before)
    for budget in (1, 33, 79):
        part = run(from_array(x, block_rows=64, rows=rows), budget, sampling=sampling)
        assert part.picks.tolist() == whole.picks[:budget].tolist()
    if sampling == "fds":
        assert run(from_array(x, block_rows=37, rows=rows), 80, sampling=sampling).picks.tolist() == whole.picks.tolist()


@pytest.mark.parametrize("sampling", ["d2", "fds"])
def test_a_run_goes_on_from_any_step(monkeypatch: pytest.MonkeyPatch, sampling: str) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 16)
    x, rows = pool(200, 9)
    labeled, options = np.array([3, 60]), Options(sampling=sampling)
    request = Request(60, 0, labeled)
    whole = run(from_array(x, block_rows=64, rows=rows), 60, labeled, sampling=sampling)
    steps = list(freesel(fresh(x, rows, labeled), request, options))
    assert len(steps) > 4
    for resume in steps:
        *_, last = freesel(fresh(x, rows, labeled), Request(60, 0, labeled, resume=resume), options)
        assert last.picks.tobytes() == whole.picks.tobytes()
        assert last.gains.tobytes() == whole.gains.tobytes()


def fresh(x: np.ndarray, rows: np.ndarray, labeled: np.ndarray) -> LocalShards:
    shards = from_array(x, block_rows=64, rows=rows)
    for block in shards.blocks:
        block.eligible = ~np.isin(block.rows, labeled)
    return shards


def test_length_does_not_matter() -> None:
    x, rows = pool(100, 10)
    scaled = x * (2.0 ** np.random.default_rng(0).integers(-3, 4, len(x)))[:, None].astype(np.float32)
    for sampling in ("d2", "fds"):
        picks = [run(from_array(v, block_rows=32, rows=rows), 40, sampling=sampling).picks.tolist() for v in (x, scaled)]
        assert picks[0] == picks[1]


def test_presets_set_the_sampling() -> None:
    shards = from_array(clustered(200))
    d2, fds = (run(shards, 20, sampling=sampling).picks.tolist() for sampling in ("d2", "fds"))
    assert d2 != fds
    for preset, sampling, expected in [
        ("freesel", None, d2),
        ("geal", None, d2),
        ("geal-v1", None, fds),
        ("geal-v1", "d2", d2),
        ("freesel", "fds", fds),
    ]:
        assert run(shards, 20, preset=preset, sampling=sampling).picks.tolist() == expected
    with pytest.raises(InputError, match="one of: freesel, geal, geal-v1"):
        build_options(Options, {"preset": "geal-v2"}, "strategy 'freesel'")


# --- several vectors an image


def test_take_gives_all_vectors_of_an_image_in_the_order_asked() -> None:
    x, rows = np.arange(12, dtype=np.float32).reshape(6, 2), np.array([0, 0, 2, 5, 5, 5])
    shards = from_array(x, block_rows=2, rows=rows)
    assert (shards.n, len(shards.blocks)) == (6, 3)
    found, owner = take_patterns(shards, np.array([5, 0]))
    assert owner.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(found, torch.from_numpy(x[[3, 4, 5, 0, 1]]))
    with pytest.raises(InputError, match="1 of 2 rows have no vector"):
        shards.take(np.array([0, 1]))
