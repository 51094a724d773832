"""What every strategy owes its caller, whatever it does. A new line in STRATEGIES is tested here by itself."""

from __future__ import annotations

import numpy as np
import pytest

from engine.runner import run_method
from engine.select import STRATEGIES, strategy_options
from engine.shards import LocalShards, Request, Shards, from_array, prepare

NOTHING = np.empty(0, dtype=np.int64)
QUICK = {"activeft": {"steps": 25}, "kmeans": {"restarts": 2, "iterations": 4}}
"""Options that make a strategy quick enough to be run dozens of times here."""
SCORED = {"influence", "gradient_similarity", "stability"}
SEEDLESS = {"facility_location", "maxherding", "entropy", "margin", "least_confidence", *SCORED}
"""Strategies that draw only once no row gains anything, from more rows than here, or among images without boxes."""


def clustered(n: int = 300, d: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((9, d)) * 3
    return (centres[rng.integers(0, 9, n)] + rng.standard_normal((n, d))).astype(np.float32)


def labels(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int64) * 7 % 5


def probabilities(x: np.ndarray, classes: int = 5) -> np.ndarray:
    """Probabilities (n, classes) float32 that follow the vectors (n, d), as a linear model's would."""
    logits = x.astype(np.float64) @ np.random.default_rng(1).standard_normal((x.shape[1], classes))
    logits *= 4 / max(np.abs(logits).max(), 1e-300)
    odds = np.exp(logits)
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)


def worth(x: np.ndarray) -> np.ndarray:
    """A score for each vector (n, 1) float32, of either sign, with equal ones; NaN, none, for every ninth."""
    values = np.round(np.tanh(x[:, :1].astype(np.float64)), 2).astype(np.float32)
    values[4::9] = np.nan
    return values


def shards_of(x: np.ndarray, block_rows: int = 64) -> LocalShards:
    scored = {"influence": worth(x), "stability": worth(x)}
    return from_array(x, labels(len(x)), block_rows, predictions={"probs": probabilities(x), **scored})


def pick(name: str, shards: Shards, budget: int, seed: int = 0, labeled: np.ndarray = NOTHING) -> list[int]:
    _, method, options = strategy_options(name, QUICK.get(name, {}))
    return run_method(method, shards, Request(budget, seed, labeled), options).picks.tolist()


every_strategy = pytest.mark.parametrize("name", sorted(STRATEGIES))


@every_strategy
@pytest.mark.parametrize("budget", [0, 1, 2, 17, 299, 300])
def test_exactly_the_budget_distinct_and_in_the_pool(name: str, budget: int) -> None:
    picks = pick(name, shards_of(clustered()), budget)
    assert len(picks) == len(set(picks)) == budget
    assert set(picks) <= set(range(300))


@every_strategy
def test_labeled_rows_are_never_picked(name: str) -> None:
    labeled = np.arange(0, 300, 3, dtype=np.int64)
    shards = shards_of(clustered())
    for budget in (1, 50, 200):
        picks = pick(name, shards, budget, labeled=labeled)
        assert len(set(picks)) == budget
        assert not set(picks) & set(labeled.tolist())
    assert set(pick(name, shards, 200, labeled=labeled)) == set(range(300)) - set(labeled.tolist())


@every_strategy
def test_same_seed_same_picks_other_seed_other_picks(name: str) -> None:
    shards = shards_of(clustered())
    assert pick(name, shards, 20, seed=1) == pick(name, shards, 20, seed=1)
    assert (pick(name, shards, 20, seed=1) == pick(name, shards, 20, seed=2)) == (name in SEEDLESS)


@every_strategy
def test_nothing_is_left_over_from_a_run_before(name: str) -> None:
    shards = shards_of(clustered())
    fresh = pick(name, shards_of(clustered()), 30)
    pick(name, shards, 11, seed=5, labeled=np.arange(40, dtype=np.int64))
    assert pick(name, shards, 30) == fresh


@every_strategy
@pytest.mark.parametrize("pool", ["duplicates", "constant", "zeros", "two points", "one row", "huge", "tiny"])
def test_degenerate_pools(name: str, pool: str) -> None:
    x = {
        "duplicates": np.repeat(clustered(30), 5, axis=0),
        "constant": np.full((100, 4), 0.3, dtype=np.float32),
        "zeros": np.zeros((100, 4), dtype=np.float32),
        "two points": np.array([[0.0, 1.0], [1.0, 0.0]] * 40, dtype=np.float32),
        "one row": clustered(1),
        "huge": clustered(80) * 1e15,
        "tiny": clustered(80) * 1e-15,
    }[pool]
    for budget in {1, len(x) // 2 or 1, len(x)}:
        picks = pick(name, shards_of(x), budget)
        assert len(set(picks)) == budget


@every_strategy
def test_blocks_without_rows(name: str) -> None:
    """A block all of whose images were rejected has no vectors."""
    shards = shards_of(clustered(130))
    kept = [block for block in shards.blocks if block.index != 1]
    empty = shards.blocks[1]
    empty.data, empty.rows, empty.eligible = empty.x[:0], empty.rows[:0], empty.eligible[:0]
    empty.columns = {key: value[:0] for key, value in empty.columns.items()}
    empty.predictions = {name: empty.predicted(name)[:0] for name in empty.predictions}
    holed = LocalShards([kept[0], empty, kept[1]], shards.d)
    picks = pick(name, holed, 20)
    assert len(set(picks)) == 20
    assert all(row < 64 or row >= 128 for row in picks)


@pytest.mark.parametrize("name", sorted(name for name, strategy in STRATEGIES.items() if strategy.nested))
def test_nested_strategies_give_prefixes(name: str) -> None:
    shards = shards_of(clustered())
    longest = pick(name, shards, 60)
    for budget in (1, 13, 59):
        assert pick(name, shards, budget) == longest[:budget]


@every_strategy
def test_steps_count_up_to_their_total(name: str) -> None:
    _, method, options = strategy_options(name, QUICK.get(name, {}))
    shards = shards_of(clustered())
    prepare(shards, NOTHING)
    steps = list(method(shards, Request(25, 0, NOTHING), options))
    assert [step.number for step in steps] == sorted(step.number for step in steps)
    assert steps[-1].number == steps[-1].total
    for column in steps[-1].columns.values():
        assert len(column) == 25
