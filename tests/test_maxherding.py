"""`maxherding` and `probcover` against one-at-a-time greedy, and the exact products under them."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import clustered

from engine.nearest import nearest
from engine.select import maxherding, probcover
from engine.select.clusters import fit_centres
from engine.select.exact import exact_products, exact_sqdist, exact_step, quantize
from engine.select.purity import LLOYD_STEPS, RADIUS_KEY, pure_sqradius
from engine.shards import LocalShards, Request, Step, from_array, prepare

NOTHING = np.empty(0, dtype=np.int64)


def run(x: np.ndarray, budget: int, labeled: np.ndarray = NOTHING, seed: int = 0, **options: object) -> Step:
    shards = from_array(x, block_rows=64)
    prepare(shards, labeled)
    return list(maxherding.maxherding(shards, Request(budget, seed, labeled), maxherding.Options(**options)))[-1]


def cover(x: np.ndarray, budget: int, labeled: np.ndarray = NOTHING, seed: int = 0, **options: object) -> Step:
    shards = from_array(x, block_rows=7)
    prepare(shards, labeled)
    return list(probcover.probcover(shards, Request(budget, seed, labeled), probcover.Options(**options)))[-1]


@pytest.fixture(autouse=True)
def _constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a test changes."""
    monkeypatch.setattr(maxherding, "EDGE_FLOATS", maxherding.EDGE_FLOATS)


def pairwise(x: np.ndarray) -> np.ndarray:
    return np.stack([oracles.sqdist(x, row) for row in x], axis=1)


def eligible(x: np.ndarray, labeled: np.ndarray) -> np.ndarray:
    return ~np.isin(np.arange(len(x)), labeled)


@pytest.mark.parametrize("widths", [(2, 10), (32, 2048)])
@pytest.mark.parametrize("edge_floats", [0, 5, 10**6])
@pytest.mark.parametrize("labeled", [[], [4, 77, 301]])
def test_equals_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, widths: tuple[int, int], edge_floats: int, labeled: list[int]
) -> None:
    """Whatever is measured at once, and whether pairs are kept from the start, from some pick on, or never."""
    monkeypatch.setattr(maxherding, "FEWEST", widths[0])
    monkeypatch.setattr(maxherding, "MOST", widths[1])
    monkeypatch.setattr(maxherding, "EDGE_FLOATS", edge_floats)
    x, rows = clustered(320), np.array(labeled, dtype=np.int64)
    step = run(x, 30, rows, sigma=3.0)
    picks, gains = oracles.coverage(np.exp(-pairwise(x) / 18), 30, labeled, eligible(x, rows))
    assert step.picks.tolist() == picks
    np.testing.assert_allclose(step.gains, gains, atol=1e-7)


def test_default_sigma_is_the_released_kernel() -> None:
    x = clustered(200)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    picks, gains = oracles.coverage(np.exp(-pairwise(x)), 30, [], eligible(x, NOTHING))
    step = run(x, 30)
    assert step.picks.tolist() == picks
    np.testing.assert_allclose(step.gains, gains, atol=1e-7)


def test_gaussian_by_hand() -> None:
    """On 0, 1, 2, 10 with exp(-d^2): row 1 adds 1 + 2/e, then row 3 adds 1, then row 0 (of two alike) 1 - 1/e."""
    x = np.array([[0], [1], [2], [10]], dtype=np.float32)
    step = run(x, 4)
    assert step.picks.tolist() == [1, 3, 0, 2]
    np.testing.assert_allclose(step.gains * 4, [1 + 2 / np.e, 1, 1 - 1 / np.e, 1 - 1 / np.e], atol=1e-9)
    assert step.objective == 1.0


def test_top_hat_by_hand() -> None:
    """On 0, 1, 2, 10 with radius 1: row 1 covers three, row 3 itself; then nothing is left and the rest is drawn."""
    x = np.array([[0], [1], [2], [10]], dtype=np.float32)
    for step in (cover(x, 4, delta=1.0), run(x, 4, kernel="tophat", delta=1.0)):
        assert step.picks[:2].tolist() == [1, 3]
        assert step.gains.tolist() == [0.75, 0.25, 0.0, 0.0]
        assert step.objective == 1.0
    assert len({tuple(cover(x, 4, seed=seed, delta=1.0).picks) for seed in range(20)}) == 2
    assert cover(x, 1, np.array([1]), delta=1.0).picks.tolist() == [3]


@pytest.mark.parametrize("edge_floats", [0, 5, 10**6])
@given(st.integers(2, 50), st.integers(1, 3), st.integers(0, 1000), st.sampled_from([0.0, 1.0, 1.5, 2.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_top_hat_ties_go_to_the_smaller_row(edge_floats: int, n: int, d: int, seed: int, delta: float, some: bool) -> None:
    maxherding.EDGE_FLOATS = edge_floats
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 5, (n, d)).astype(np.float32)
    labeled = np.flatnonzero(rng.random(n) < 0.2) if some else NOTHING
    step = cover(x, n - len(labeled), labeled, delta=delta)
    within = (pairwise(x) <= delta * delta).astype(np.float64)
    picks, gains = oracles.coverage(within, len(step.picks), labeled.tolist(), eligible(x, labeled))
    adding = np.array(gains) > 0
    assert step.picks[adding].tolist() == np.array(picks, dtype=np.int64)[adding].tolist()
    np.testing.assert_allclose(step.gains, gains, rtol=1e-12)


def test_gains_shrink_and_add_up() -> None:
    for step in (run(clustered(200), 120, sigma=2.0), cover(clustered(200), 120)):
        assert (np.diff(step.gains) <= 0).all()
        assert step.gains[0] > 0
        assert step.objective == pytest.approx(step.gains.sum(), rel=1e-12)


def test_excluded_rows_count_in_the_mean_and_labeled_ones_cover() -> None:
    """Rows 0 to 4 lie together but may not be picked; row 5 is near them. When row 0 is labelled they are covered."""
    x = np.array([[0], [0], [0], [0], [0], [1], [20], [21], [22]], dtype=np.float32)
    shards = from_array(x)
    prepare(shards, np.arange(5))
    (step,) = list(probcover.probcover(shards, Request(1, 0, NOTHING), probcover.Options(delta=1.0)))[-1:]
    assert step.picks.tolist() == [5]
    assert step.objective == pytest.approx(6 / 9)
    assert cover(x, 1, np.array([0]), delta=1.0).picks.tolist() == [7]


def test_more_rows_than_candidates_is_a_seeded_sample() -> None:
    x = clustered(300)
    first, again, other = (run(x, 20, seed=seed, sigma=3.0, candidates=40) for seed in (0, 0, 1))
    assert first.picks.tolist() == again.picks.tolist() != other.picks.tolist()
    assert "40 candidates (a sample)" in first.note
    assert run(x, 20, sigma=3.0, candidates=300).picks.tolist() == run(x, 20, sigma=3.0).picks.tolist()
    longest = run(x, 60, sigma=3.0, candidates=40)
    assert longest.picks[:20].tolist() == first.picks.tolist()
    assert np.isnan(longest.gains[40:]).all()
    every = np.exp(-pairwise(x) / 18)
    np.testing.assert_allclose(longest.objective, every[:, longest.picks].max(axis=1).mean(), atol=1e-7)


def stranger_sqdist(x: np.ndarray, shards: LocalShards, clusters: int) -> np.ndarray:
    """Squared distance of each row to the nearest one of another cluster."""
    *_, (_, _, centres) = fit_centres(shards, clusters, LLOYD_STEPS, 0, (RADIUS_KEY,))
    own = nearest(torch.from_numpy(x), torch.from_numpy(centres))
    return np.where(own[:, None] == own[None, :], np.inf, pairwise(x)).min(axis=1)


@pytest.mark.parametrize("purity", [0.0, 0.5, 0.95, 1.0])
def test_radius_is_the_largest_that_is_pure_enough(purity: float) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (200, 2)).astype(np.float32)
    shards = from_array(x, block_rows=64)
    step = exact_step(float(np.linalg.norm(x, axis=1).max()), 2)
    *_, (_, sqradius) = pure_sqradius(shards, 0, 5, purity, step)
    strangers = stranger_sqdist(x, shards, 5)
    assert (strangers > sqradius).mean() >= purity
    assert (strangers > sqradius + step * step).mean() < max(purity, 1e-9)


def test_one_cluster_is_pure_at_any_radius() -> None:
    step = cover(clustered(50), 3, clusters=1)
    assert step.gains.tolist() == [1.0, 0.0, 0.0]
    assert step.picks[0] == 0


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_exact_products_are_the_same_bits(scale: float) -> None:
    """Cut, permuted, transposed, in any company and on any number of threads."""
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy((scale * rng.standard_normal((n, 129))).astype(np.float32)) for n in (700, 90))
    step = exact_step(float(torch.cat([a, b]).double().norm(dim=1).max()), 129)
    whole = exact_products(a, b, step)
    order, columns = rng.permutation(700), rng.permutation(129)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(exact_products(a[order], b, step), whole[order])
            assert torch.equal(exact_products(b, a, step).T, whole)
            assert torch.equal(exact_products(a[:, columns], b[:, columns], step), whole)
            assert torch.equal(exact_products(a[13:14], b[5:6], step), whole[13:14, 5:6])
            assert torch.equal(torch.cat([exact_sqdist(part, b, step) for part in a.split(3)]), exact_sqdist(a, b, step))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("d", [1, 3, 64, 2048])
def test_exact_products_are_exact(d: int) -> None:
    rng = np.random.default_rng(d)
    x = torch.from_numpy(rng.standard_normal((6, d)).astype(np.float32))
    x[0] = float(x.double().norm(dim=1).max()) / d**0.5
    largest = float(x.double().norm(dim=1).max())
    step = exact_step(largest, d)
    assert step <= largest * 2**-24.5
    whole = [[int(v) for v in row] for row in (quantize(x, step) / step).numpy()]
    for i in range(6):
        for j in range(6):
            product = sum(p * q for p, q in zip(whole[i], whole[j], strict=True))
            sqdist = sum((p - q) ** 2 for p, q in zip(whole[i], whole[j], strict=True))
            assert exact_products(x, x, step)[i, j] / step**2 == product
            assert exact_sqdist(x, x, step)[i, j] / step**2 == sqdist
    error = (exact_products(x, x, step) - x.double() @ x.double().T).abs()
    assert error.max() <= d**0.5 * step * largest + d * step * step / 4  # row 0, all of one value, comes near it
    assert error[1:, 1:].max() <= 2 * step * largest


def test_the_exponential_does_not_depend_on_company() -> None:
    values = -np.random.default_rng(0).random(1001) * 5
    whole = np.exp(values)
    for start in (0, 1, 2, 3, 500, 999):
        for stop in (start + 1, start + 2, 1001):
            assert np.exp(values[start:stop].copy()).tolist() == whole[start:stop].tolist()
