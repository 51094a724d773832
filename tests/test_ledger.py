"""What may be picked under conditions on groups, against every possible way of picking."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ledger import Groups, Ledger, Terms, cells_of, fill, network, two_chains
from engine.schema import InputError

NONE = 10**6


def terms_of(groups: list[Groups], budget: int) -> Terms | None:
    cells, cell, counts = cells_of(groups)
    found, _ = network(cells, counts, [(column.low, column.high) for column in groups], budget, budget)
    return Terms(np.arange(len(cell)), cell, found) if found else None


def met(groups: list[Groups], picks: tuple[int, ...]) -> bool:
    for column in groups:
        made = np.bincount(column.codes[list(picks)], minlength=len(column.low))
        if (made < column.low).any() or (made > column.high).any():
            return False
    return True


@st.composite
def pools(draw: st.DrawFn, columns: int = 2) -> tuple[list[Groups], int]:
    """Up to 8 rows in up to three groups a column, with bounds on each that may or may not be met together."""
    n = draw(st.integers(1, 8))
    found = []
    for index in range(columns):
        groups = draw(st.integers(1, 3))
        codes = np.array(draw(st.lists(st.integers(0, groups - 1), min_size=n, max_size=n)))
        low = np.array(draw(st.lists(st.integers(0, 2), min_size=groups, max_size=groups)))
        more = np.array(draw(st.lists(st.sampled_from([0, 1, NONE]), min_size=groups, max_size=groups)))
        found.append(Groups(str(index), codes, low, low + more))
    return found, draw(st.integers(0, n))


@settings(max_examples=150, deadline=None)
@given(pools(), st.randoms(use_true_random=False))
def test_every_order_of_picks_ends_exactly_met(pool: tuple[list[Groups], int], random) -> None:  # type: ignore[no-untyped-def]
    """A pick is allowed just where picks that meet everything can follow; so no order of asking ends in a dead end."""
    groups, budget = pool
    n = len(groups[0].codes)
    good = [set(picks) for picks in itertools.combinations(range(n), budget) if met(groups, picks)]
    terms = terms_of(groups, budget)
    assert (terms is not None) == bool(good)
    if terms is None:
        return
    ledger, made = Ledger(terms), list[int]()
    order = list(range(n))
    random.shuffle(order)
    for row in order:
        can = [r for r in range(n) if r not in made and any({*made, r} <= picks for picks in good)]
        assert ledger.allowed(np.arange(n)).nonzero()[0].tolist() == can
        assert Ledger(terms, made).allowed(np.arange(n)).nonzero()[0].tolist() == can
        if ledger.takes(row):
            assert row in can
            made.append(row)
        else:
            assert row not in can
    assert set(made) in good


@settings(max_examples=80, deadline=None)
@given(pools(), st.permutations(range(3)))
def test_an_even_split_is_the_fairest_of_all(pool: tuple[list[Groups], int], order: list[int]) -> None:
    """Of all ways to meet the other bounds, the one whose shares, sorted, come last in the dictionary: max-min fair."""
    groups, budget = pool
    groups = [groups[0], Groups("even", groups[1].codes, np.zeros_like(groups[1].low), groups[1].high)]
    cells, _, counts = cells_of(groups)
    found, _ = network(cells, counts, [(column.low, column.high) for column in groups], budget, budget)
    n, many = len(groups[0].codes), len(groups[1].low)
    shares = {
        tuple(np.bincount(groups[1].codes[list(picks)], minlength=many).tolist())
        for picks in itertools.combinations(range(n), budget)
        if met(groups, picks)
    }
    if found is None:
        assert not shares
        return
    split = tuple(fill(budget, found, 1, np.array([g for g in order if g < many])).tolist())
    assert split in shares
    there = [g for g in range(many) if (groups[1].codes == g).any()]
    assert sorted(split[g] for g in there) == max(sorted(share[g] for g in there) for share in shares)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_nested_columns_are_decided_exactly_too(data: st.DataObject) -> None:
    """Scenes, the videos in them, and classes across: three columns in two chains."""
    n = data.draw(st.integers(1, 8))
    video = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    label = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    columns = [(video // 2, 2), (label, 2), (video, 4)]
    groups = []
    for codes, many in columns:
        low = np.array(data.draw(st.lists(st.integers(0, 1), min_size=many, max_size=many)))
        groups.append(Groups("", codes, low, low + data.draw(st.integers(0, 3))))
    budget = data.draw(st.integers(0, n))
    good = [picks for picks in itertools.combinations(range(n), budget) if met(groups, picks)]
    terms = terms_of(groups, budget)
    assert (terms is not None) == bool(good)
    if terms is not None:
        ledger = Ledger(terms)
        made = tuple(row for row in reversed(range(n)) if ledger.takes(row))
        assert len(made) == budget
        assert met(groups, made)


def test_three_columns_across_one_another_are_refused() -> None:
    cells = np.array(list(itertools.product((0, 1), repeat=3)))
    assert two_chains(cells) is None
    assert two_chains(cells[:, :2]) == ([0, 1], []) or two_chains(cells[:, :2]) == ([0], [1])
    bounds = [(np.zeros(2, dtype=np.int64), np.ones(2, dtype=np.int64))] * 3
    with pytest.raises(InputError, match="three columns"):
        network(cells, np.ones(8, dtype=np.int64), bounds, 1, 1)


def priced(costs: list[float], total: str) -> Ledger:
    rows = np.arange(len(costs))
    return Ledger(Terms(rows, np.zeros_like(rows), None, np.array(costs), Fraction(total)))


def test_costs_are_the_decimals_that_were_written() -> None:
    """Ten times 0.1 is 1, though the sum of ten floats 0.1 is another number."""
    ledger = priced([0.1] * 11, "1")
    assert [ledger.takes(row) for row in range(11)] == [True] * 10 + [False]
    assert ledger.at_most() == 0


def test_spending_ends_when_nothing_is_affordable() -> None:
    ledger = priced([5, 3, 2, 2.5, 9], "7.5")
    assert ledger.at_most() == 3
    assert ledger.allowed(np.arange(5)).tolist() == [True, True, True, True, False]
    assert ledger.takes(0)
    assert ledger.allowed(np.arange(5)).tolist() == [False, False, True, True, False]
    assert not ledger.takes(1)
    assert ledger.takes(3)
    assert ledger.left == 0
    assert ledger.at_most() == 0
