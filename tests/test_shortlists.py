"""Short lists: the same bits as comparing with every vector, however the vectors move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_contract import clustered

from engine.blocks import Block
from engine.nearest import most_similar
from engine.select import shortlists
from engine.select.shortlists import FEWEST, follow

K = 2 * FEWEST


def block_of(x: np.ndarray) -> Block:
    return Block(0, torch.from_numpy(x), np.arange(len(x), dtype=np.int64), np.ones(len(x), dtype=np.bool_))


def same(block: Block, vectors: np.ndarray, reach: float) -> None:
    index, product = follow(block, torch.from_numpy(vectors), reach)
    expected = most_similar(block.x, torch.from_numpy(vectors), block.norms)
    np.testing.assert_array_equal(index, expected[0])
    np.testing.assert_array_equal(product, expected[1])


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The reach of every comparison of all rows with all vectors."""
    made: list[float] = []
    compare = shortlists._compare_with_all

    def counted(block: Block, vectors: torch.Tensor, reach: float) -> Any:
        made.append(reach)
        return compare(block, vectors, reach)

    monkeypatch.setattr(shortlists, "_compare_with_all", counted)
    return made


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_small_moves_are_settled_by_the_lists(scale: float, listings: list[float]) -> None:
    rng = np.random.default_rng(0)
    x = clustered(3000, 16)
    x = (scale * x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    vectors = x[rng.choice(len(x), K, replace=False)]
    block = block_of(x)
    for _ in range(12):
        same(block, vectors, 0.2 * scale * scale)
        vectors = vectors + (0.005 * scale * rng.standard_normal(vectors.shape)).astype(np.float32)
        assert len(block.state["shortlists"].columns) < 3000 * K / 4
    assert 1 <= len(listings) <= 6


def test_large_moves_and_other_numbers_of_vectors(listings: list[float]) -> None:
    rng = np.random.default_rng(1)
    x = clustered(2000, 16).astype(np.float32)
    block = block_of(x)
    for k in (K, K, K + 1, K):
        same(block, x[rng.choice(len(x), k, replace=False)], 0.1)
    assert len(listings) == 4


def test_one_vector_that_comes_from_afar_is_found(listings: list[float]) -> None:
    x = clustered(2000, 16).astype(np.float32)
    vectors = x[:K].copy()
    block = block_of(x)
    same(block, vectors, 0.1)
    vectors[7] = 3 * x[1500]
    same(block, vectors, 0.1)
    assert follow(block, torch.from_numpy(vectors), 0.1)[0][1500] == 7


def test_equal_vectors_and_equal_rows() -> None:
    x = np.random.default_rng(2).integers(-1, 2, (1500, 4)).astype(np.float32)
    vectors = x[:K].copy()
    block = block_of(x)
    for column in range(3):
        same(block, vectors, 0.5)
        vectors[:, column] += 0.25


def test_lists_that_would_be_too_long_are_not_kept(listings: list[float]) -> None:
    x = clustered(2000, 16).astype(np.float32)
    block = block_of(x)
    for _ in range(3):
        same(block, x[:K], 1e3)
        assert "shortlists" not in block.state
    assert block.state["reach"] == 0.125
    for _ in range(20):
        same(block, x[:K], 1e3)
    assert len(block.state["shortlists"].columns) <= shortlists.LONGEST * len(x)
    assert len(listings) < 20


def test_few_vectors_or_no_reach_make_no_lists() -> None:
    x = clustered(500, 16).astype(np.float32)
    block = block_of(x)
    same(block, x[: FEWEST - 1], 0.1)
    same(block, x[:K], 0.0)
    assert "shortlists" not in block.state
