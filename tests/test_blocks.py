"""The block mathematics against float64 and exact integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import nearest_centre, sqdist

from engine import blocks, canonical, draws, nearest


def random_matrix(rows: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, d)).astype(np.float32))


@pytest.mark.parametrize("d", [1, 2, 3, 7, 64, 385])
def test_canonical_distance_is_the_exact_one(d: int) -> None:
    a, b = random_matrix(9, d, 1), random_matrix(5, d, 2)
    i, j = np.repeat(np.arange(9), 5), np.tile(np.arange(5), 9)
    expected = np.stack([sqdist(a.numpy(), row) for row in b.numpy()], axis=1).reshape(-1)
    np.testing.assert_allclose(canonical.canonical_sqdist(a, i, b, j), expected, rtol=1e-14)


def test_canonical_distance_does_not_depend_on_company() -> None:
    a, b = random_matrix(3000, 129, 1), random_matrix(3000, 129, 2)
    rows = np.arange(3000)
    together = canonical.canonical_sqdist(a, rows, b, rows)
    alone = [
        canonical.canonical_sqdist(a[k : k + 1], np.array([0]), b[k : k + 1], np.array([0]))[0] for k in (0, 1, 1777, 2999)
    ]
    assert together[[0, 1, 1777, 2999]].tolist() == alone


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nearest_is_the_float64_answer(scale: float, offset: float) -> None:
    x, c = scale * (random_matrix(500, 33, 3) + offset), scale * (random_matrix(70, 33, 4) + offset)
    np.testing.assert_array_equal(nearest.nearest(x, c), nearest_centre(x.numpy(), c.numpy()))


def test_nearest_settles_what_float32_cannot() -> None:
    """Two centres that differ in the last bit of one coordinate, far from the origin: the product sees one distance."""
    x = torch.full((4, 8), 1000.0)
    c = torch.full((3, 8), 1000.5)
    c[1, 0] = float(np.nextafter(np.float32(1000.5), np.float32(1000.0)))
    c[2] = c[1]
    assert nearest.nearest(x, c).tolist() == [1, 1, 1, 1]


def test_nearest_of_equal_centres_is_the_first() -> None:
    x = random_matrix(10, 5)
    c = torch.cat([x[:1] + 9, x[:2], x[:2]])
    assert nearest.nearest(x[:2], c).tolist() == [1, 2]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(0, 10_000), st.sampled_from([1, 2, 3]))
@settings(max_examples=60, deadline=None)
def test_nearest_with_ties(rows: int, k: int, d: int, seed: int, levels: int) -> None:
    """Small whole numbers: distances tie all the time, and are exact."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(0, levels, (rows, d)).astype(np.float32))
    c = torch.from_numpy(rng.integers(0, levels, (k, d)).astype(np.float32))
    np.testing.assert_array_equal(nearest.nearest(x, c), nearest_centre(x.numpy(), c.numpy()))


def test_nearest_in_tiles_equals_nearest_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, c = random_matrix(700, 20, 5), random_matrix(90, 20, 6)
    whole = nearest.nearest(x, c)
    monkeypatch.setattr(nearest, "TILE_ELEMENTS", 64)
    np.testing.assert_array_equal(nearest.nearest(x, c), whole)


def test_normalized_rows_have_norm_one_and_zero_stays_zero() -> None:
    x = torch.cat([random_matrix(20, 30) * 1e3, torch.zeros(1, 30)])
    norms = canonical.normalize(x).double().norm(dim=1)
    np.testing.assert_allclose(norms[:-1], 1.0, atol=1e-6)
    assert norms[-1] == 0


def test_smallest_breaks_ties_by_row() -> None:
    keys, rows = np.array([2.0, 1.0, 1.0, 1.0, 0.0] * 9), np.arange(45)[::-1].copy()
    expected = sorted(zip(keys.tolist(), rows.tolist(), strict=True))[:11]
    found = blocks.smallest(keys, rows, 11)
    assert list(zip(found[0].tolist(), found[1].tolist(), strict=True)) == expected


@given(st.lists(st.integers(0, 5), min_size=0, max_size=60), st.integers(0, 12), st.integers(1, 59))
def test_merging_is_the_same_as_taking_at_once(values: list[int], m: int, cut: int) -> None:
    keys, rows = np.array(values, dtype=np.float64), np.arange(len(values))
    left, right = blocks.smallest(keys[:cut], rows[:cut], m), blocks.smallest(keys[cut:], rows[cut:], m)
    merged, whole = blocks.merge_smallest(m, right, left), blocks.smallest(keys, rows, m)
    assert [part.tolist() for part in merged] == [part.tolist() for part in whole]


def test_fixed_point_sums_do_not_depend_on_order() -> None:
    x = random_matrix(1000, 17, 8)
    group = np.random.default_rng(1).integers(0, 5, 1000)
    scale = blocks.vector_scale(1000, float(x.abs().max()))
    whole = blocks.fixed_point_sums(x, np.arange(1000), group, 5, scale)
    order = np.random.default_rng(2).permutation(1000)
    halves = sum(blocks.fixed_point_sums(x, part, group[part], 5, scale) for part in np.array_split(order, 3))
    np.testing.assert_array_equal(whole, halves)
    exact = np.stack([x.numpy()[group == g].astype(np.float64).sum(axis=0) for g in range(5)])
    np.testing.assert_allclose(whole / scale, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("count", "largest"), [(1, 1e-30), (10**9, 1e20), (8192, 1.0), (3, 0.0)])
def test_fixed_point_never_overflows(count: int, largest: float) -> None:
    scale = blocks.fixed_point_scale(count, largest)
    assert count * largest * scale < 2**62
    assert np.log2(scale) == int(np.log2(scale))


def test_random_keys_are_a_function_of_seed_step_and_item() -> None:
    items = np.arange(1000, dtype=np.int64)
    keys = draws.random_keys(3, (1, 2), items)
    np.testing.assert_array_equal(keys[[5, 17]], draws.random_keys(3, (1, 2), np.array([5, 17])))
    others = [draws.random_keys(4, (1, 2), items), draws.random_keys(3, (2, 1), items), draws.random_keys(3, (1,), items)]
    assert all((keys != other).all() for other in others)
    assert len(np.unique(keys)) == 1000


def test_random_uniform_is_uniform() -> None:
    u = draws.random_uniform(0, (7,), np.arange(200_000, dtype=np.int64))
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 149  # 99 degrees of freedom, p = 0.001; a fixed seed, so not a matter of luck
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
