"""`random` and `uniform`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_contract import NOTHING, labels, pick, shards_of
from test_scored import detections, import_as, picked

from engine.runner import run_method
from engine.schema import InputError
from engine.select import strategy_options
from engine.shards import Request, from_array


def uniform(y: np.ndarray, budget: int, labeled: np.ndarray = NOTHING, seed: int = 0) -> np.ndarray:
    shards = from_array(np.zeros((len(y), 2), dtype=np.float32), y, block_rows=16)
    _, method, options = strategy_options("uniform", {})
    return run_method(method, shards, Request(budget, seed, labeled), options).picks


def test_random_is_a_permutation_that_looks_random() -> None:
    shards = shards_of(np.zeros((1000, 1), dtype=np.float32))
    order = np.array(pick("random", shards, 1000))
    assert sorted(order.tolist()) == list(range(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_random_draws_every_row_equally_often() -> None:
    shards = shards_of(np.zeros((20, 1), dtype=np.float32))
    counts = np.bincount([row for seed in range(2000) for row in pick("random", shards, 5, seed=seed)], minlength=20)
    assert (((counts - 500) ** 2) / 500).sum() < 43.8  # 19 degrees of freedom, p = 0.001


def test_uniform_takes_equally_many_of_each_class_by_turns() -> None:
    y = labels(200)
    picks = uniform(y, 25)
    assert np.bincount(y[picks]).tolist() == [5] * 5
    assert [sorted(turn) for turn in y[picks].reshape(5, 5).tolist()] == [[0, 1, 2, 3, 4]] * 5


def test_uniform_draws_what_a_small_class_lacks_from_the_others() -> None:
    y = np.array([0] * 3 + [1] * 50 + [2] * 50)
    picks = uniform(y, 32)
    counts = np.bincount(y[picks])
    assert counts[0] == 3
    assert counts[1] >= 10
    assert counts[2] >= 10
    assert counts.sum() == 32


def test_uniform_counts_new_labels_only() -> None:
    y = np.array([0, 1] * 20)
    labeled = np.flatnonzero(y == 0)[:15].astype(np.int64)
    picks = uniform(y, 10, labeled)
    assert np.bincount(y[picks]).tolist() == [5, 5]


def test_uniform_without_labels_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"some rows have none: use 'random'"):
        uniform(np.array([0, 1, -1]), 2)


def test_images_with_several_vectors_are_drawn_once() -> None:
    x, y = np.zeros((60, 2), dtype=np.float32), np.arange(20) % 2
    rows = np.repeat(np.arange(20), 3)
    for name in ("random", "uniform"):
        _, method, options = strategy_options(name, {})
        request = Request(12, 0, NOTHING)
        picks = run_method(method, from_array(x, y, block_rows=8, rows=rows), request, options).picks
        alone = run_method(method, from_array(x[:20], y, block_rows=8), request, options).picks
        assert picks.tolist() == alone.tolist()
        assert len(set(picks.tolist())) == 12


def test_both_take_boxes(tmp_path: Path) -> None:
    """They read no vectors: any store will do, with the same picks as of vectors."""
    boxes = detections(tmp_path, "boxes", [[0.5] * (row % 3) for row in range(90)])
    vectors = import_as(tmp_path, "vectors", np.ones((90, 3), dtype=np.float32))
    assert picked(boxes, tmp_path / "a", "random") == picked(vectors, tmp_path / "b", "random")
    with pytest.raises(InputError, match="have none: use 'random'"):
        picked(boxes, tmp_path / "c", "uniform")
    labelled = detections(tmp_path, "labelled", [[0.5] * (row % 3) for row in range(90)], labels=np.arange(90) % 4)
    assert np.bincount(np.array(picked(labelled, tmp_path / "d", "uniform")) % 4).tolist() == [5] * 4
