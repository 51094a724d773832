"""Every strategy under conditions: exactly met, the picks of one-at-a-time picking, the same however it runs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import oracles
import pytest
from folding import Backwards
from scipy.optimize import Bounds, LinearConstraint, milp
from test_contract import QUICK, clustered, labels, probabilities, shards_of, worth

from engine.draws import random_keys
from engine.ledger import Groups, Ledger, Terms, cells_of, fill, network
from engine.runner import run_method
from engine.select import STRATEGIES, strategy_options
from engine.select.scored import WITHOUT_BOXES
from engine.shards import LocalShards, Request, Step, from_array, prepare

NOTHING = np.empty(0, dtype=np.int64)
N, BUDGET = 90, 14
LABELED = np.arange(4, N, 15, dtype=np.int64)
CLASS, VIDEO = labels(N), np.arange(N) // 4
FREE = 10**6
"""Five classes, by turns, and 23 videos of four images, so that the two lie across one another."""


def groups_of(kind: str, rows: np.ndarray) -> list[Groups]:
    """The conditions of a case, by column, on the eligible rows."""
    classes = Groups("class", CLASS[rows], np.zeros(5, dtype=np.int64), np.full(5, FREE))
    videos = Groups("video", VIDEO[rows], np.zeros(23, dtype=np.int64), np.full(23, FREE))
    quota = replace(classes, low=np.array([6, 0, 0, 1, 0]), high=np.array([6, 0, FREE, 1, FREE]))
    cap = replace(videos, high=np.full(23, 1))
    return {
        "quota": [quota],
        "balance": [classes],
        "cap": [cap],
        "quota and cap": [quota, cap],
        "balance and cap": [classes, cap],
    }[kind]


CASES = ["quota", "balance", "cap", "quota and cap", "balance and cap"]


def terms_of(groups: list[Groups], rows: np.ndarray, budget: int, even: int | None = None) -> Terms:
    cells, cell, counts = cells_of(groups)
    found, short = network(cells, counts, [(column.low, column.high) for column in groups], budget, budget)
    assert found is not None, short
    if even is not None:
        fill(budget, found, even, np.arange(len(groups[even].low)))
    return Terms(rows, cell, found)


def request_of(kind: str, budget: int = BUDGET, labeled: np.ndarray = LABELED) -> tuple[Request, list[Groups]]:
    """A request under a case's conditions, and the groups as they come out, an even split as exact bounds."""
    rows = np.setdiff1d(np.arange(N), labeled)
    groups = groups_of(kind, rows)
    terms = terms_of(groups, rows, budget, 0 if kind.startswith("balance") else None)
    if kind.startswith("balance"):
        arcs = terms.network.group_arcs[0]
        shares = np.where(arcs >= 0, terms.network.flow.low[arcs], 0)
        groups[0] = replace(groups[0], low=shares, high=shares)
    return Request(budget, 0, labeled, terms=terms), groups


def check_met(picks: np.ndarray, request: Request, groups: list[Groups]) -> None:
    assert len(set(picks.tolist())) == len(picks) == request.budget
    at = np.searchsorted(request.terms.rows, picks)
    assert (request.terms.rows[at] == picks).all()
    for column in groups:
        made = np.bincount(column.codes[at], minlength=len(column.low))
        assert (made >= column.low).all()
        assert (made <= column.high).all()


def run(name: str, shards: LocalShards, request: Request) -> Step:
    _, method, options = strategy_options(name, QUICK.get(name, {}))
    return run_method(method, shards, request, options)


POOLS = {
    "clustered": clustered(N),
    "duplicates": np.repeat(clustered(15), 6, axis=0),
    "constant": np.full((N, 4), 0.3, dtype=np.float32),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_exactly_met(name: str, kind: str) -> None:
    for pool, x in POOLS.items():
        request, groups = request_of(kind)
        step = run(name, shards_of(x, 32), request)
        check_met(step.picks, request, groups)
        if pool == "clustered":
            assert len(step.gains) == BUDGET
            free = run(name, shards_of(x, 32), Request(BUDGET, 0, LABELED))
            assert "unconditional" not in step.arrays or step.arrays["unconditional"].tolist() == free.picks.tolist()


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_everything_that_is_eligible(name: str) -> None:
    """The budget is all of one class and the one row that there is of another: there is no choice but in the order."""
    rows = np.flatnonzero((CLASS == 2) | (np.arange(N) == 1))
    excluded = np.setdiff1d(np.arange(N), rows)
    low = np.bincount(CLASS[rows], minlength=5)
    groups = [Groups("class", CLASS[rows], low, low)]
    request = Request(len(rows), 0, NOTHING, excluded, terms=terms_of(groups, rows, len(rows)))
    assert sorted(run(name, shards_of(POOLS["clustered"], 32), request).picks.tolist()) == rows.tolist()


Allow = Callable[[int, list[int]], bool]


def allowing(request: Request, groups: list[Groups]) -> Allow:
    """Whether a row may be picked after others: by an integer program over all rows, which knows nothing of flows."""
    rows = request.terms.rows
    table = np.concatenate([np.stack([column.codes == g for g in range(len(column.low))]) for column in groups])
    low, high = (np.concatenate([getattr(column, side) for column in groups]) for side in ("low", "high"))
    table = np.concatenate([table, np.ones((1, len(rows)))]).astype(float)
    met = LinearConstraint(table, np.append(low, request.budget), np.append(high, request.budget))

    def allow(row: int, made: list[int]) -> bool:
        fixed = np.isin(rows, [*made, row]).astype(float)
        found = milp(np.zeros(len(rows)), constraints=met, bounds=Bounds(fixed, 1), integrality=np.ones(len(rows)))
        return bool(found.success)

    return allow


def walk(order: list[int], budget: int, allow: Allow) -> list[int]:
    made: list[int] = []
    for row in order:
        if len(made) < budget and allow(row, made):
            made.append(row)
    return made


def one_at_a_time(name: str, x: np.ndarray, request: Request, allow: Allow) -> list[int]:
    """What a strategy that ranks, or weighs each pick against those before, picks by the book."""
    rows, budget = request.terms.rows, request.budget
    eligible = np.isin(np.arange(N), rows)
    if name == "random":
        return walk(rows[np.argsort(random_keys(0, (), rows))].tolist(), budget, allow)
    if name in ("influence", "gradient_similarity", "stability"):
        scores = worth(x)[rows, 0].astype(np.float64)
        known, rest = rows[~np.isnan(scores)], rows[np.isnan(scores)]
        rest = rest[np.argsort(random_keys(0, (WITHOUT_BOXES,), rest))]
        return walk([*known[np.lexsort((known, scores[~np.isnan(scores)]))].tolist(), *rest.tolist()], budget, allow)
    if name == "margin":
        first, second = np.sort(probabilities(x).astype(np.float64), axis=1)[:, :-3:-1].T
        return walk(rows[np.lexsort((rows, (first - second)[rows]))].tolist(), budget, allow)
    if name == "coreset":
        return oracles.coreset(x, budget, LABELED.tolist(), None, eligible, allow)
    if name == "facility_location":
        k = oracles.neighbor_similarity(x, 50)
    else:
        k = np.exp(-((x[:, None].astype(np.float64) - x[None]) ** 2).sum(axis=2))
    return oracles.coverage(k, budget, LABELED.tolist(), eligible, allow)[0]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", ["random", "influence", "stability", "margin", "coreset", "facility_location", "maxherding"])
def test_as_one_at_a_time(name: str, kind: str) -> None:
    x = POOLS["clustered"] * np.float32(0.1 if name == "maxherding" else 1)
    request, groups = request_of(kind)
    picks = run(name, shards_of(x, 32), request).picks.tolist()
    assert picks == one_at_a_time(name, x, request, allowing(request, groups))


@pytest.mark.parametrize("kind", ["quota", "quota and cap"])
@pytest.mark.parametrize("name", ["kmeans", "activeft", "typiclust", "hierarchical", "uniform"])
def test_snapping_as_one_at_a_time(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same picks when shelves hold one row only, and the ledger is the integer program."""
    from engine.select import picking, typiclust

    request, groups = request_of(kind)
    whole = run(name, shards_of(POOLS["clustered"], 32), request)
    allow = allowing(request, groups)
    monkeypatch.setattr(picking, "SPARE_ROWS", 0)
    monkeypatch.setattr(typiclust, "SPARE_ROWS", 0)
    monkeypatch.setattr(picking, "SPARE", 1)

    def takes(self: Ledger, row: int) -> bool:
        made = self.terms.rows[self.taken].tolist() if self.bound else []
        expected = not self.bound or (row not in made and allow(row, made))
        assert entered(self, row) == expected
        return expected

    entered = Ledger.takes
    monkeypatch.setattr(Ledger, "takes", takes)
    assert run(name, shards_of(POOLS["clustered"], 32), request).picks.tolist() == whole.picks.tolist()


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_goes_on_from_any_step(name: str) -> None:
    """The ledger is made again from the picks of the step."""
    _, method, options = strategy_options(name, QUICK.get(name, {}))
    request, _ = request_of("quota and cap")
    x = POOLS["clustered"]

    def steps(resume: Step | None) -> list[Step]:
        shards = shards_of(x, 32)
        prepare(shards, LABELED, request.terms)
        ledger = Ledger(request.terms, resume.picks.tolist() if resume else ())
        return list(method(shards, replace(request, resume=resume, ledger=ledger), options))

    whole = steps(None)
    for step in whole[:-1][:: max(1, len(whole) // 4)]:
        last = steps(step)[-1]
        assert last.picks.tolist() == whole[-1].picks.tolist()
        assert last.gains.tobytes() == whole[-1].gains.tobytes()
        assert last.objective == whole[-1].objective


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_threads_and_order_of_combining_change_nothing(name: str) -> None:
    request, _ = request_of("balance and cap")
    whole = run(name, shards_of(POOLS["clustered"], 16), request)
    local = shards_of(POOLS["clustered"], 16)

    assert run(name, Backwards(local.blocks, local.d), request).picks.tolist() == whole.picks.tolist()


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_sum_is_spent_until_it_pays_for_nothing(name: str) -> None:
    rows = np.setdiff1d(np.arange(N), LABELED)
    cost = np.random.default_rng(3).integers(1, 60, len(rows)) / 10
    for pool in ("clustered", "constant"):
        cap = Groups("video", VIDEO[rows], np.zeros(23, dtype=np.int64), np.full(23, 2))
        cells, cell, counts = cells_of([cap])
        found, _ = network(cells, counts, [(cap.low, cap.high)], 0, len(rows))
        terms = Terms(rows, cell, found, cost, Fraction(40))
        step = run(name, shards_of(POOLS[pool], 32), Request(13, 0, LABELED, terms=terms))
        at = np.searchsorted(rows, step.picks)
        spent, videos = sum(map(Fraction, map(str, cost[at]))), np.bincount(cap.codes[at], minlength=23)
        assert spent <= 40
        assert videos.max() <= 2
        left = np.setdiff1d(np.flatnonzero(videos[cap.codes] < 2), at)
        assert all(Fraction(str(cost[row])) > 40 - spent for row in left)
        assert len(step.gains) == len(step.picks) == len(set(step.picks.tolist()))


def test_draws_are_those_made_one_at_a_time_among_what_is_allowed() -> None:
    """Six rows in two classes, two of the one and one of the other: how often each sequence comes, by D^2 over what is open."""
    x = np.array([[1, 0], [0, 1], [1, 1], [-1, 0.2], [0.3, -1], [0.6, 0.8]], dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    classes, limits = np.array([0, 0, 0, 0, 1, 1]), np.array([2, 1])
    terms = terms_of([Groups("class", classes, limits, limits)], np.arange(6), 3)
    distance = (1 - x.astype(np.float64) @ x.T.astype(np.float64)) ** 2

    def probability(sequence: tuple[int, ...]) -> float:
        value = 1.0
        for place, row in enumerate(sequence):
            made = list(sequence[:place])
            full = np.bincount(classes[made], minlength=2) >= limits
            weight = distance[:, made].min(axis=1) if made else np.ones(6)
            weight = np.where(full[classes] | np.isin(np.arange(6), made), 0, weight)
            value *= weight[row] / weight.sum()
        return value

    trials, counts = 1200, dict[tuple[int, ...], int]()
    for seed in range(trials):
        picks = tuple(run("freesel", from_array(x, block_rows=4), Request(3, seed, NOTHING, terms=terms)).picks.tolist())
        counts[picks] = counts.get(picks, 0) + 1
    expected = {s: trials * probability(s) for s in itertools.permutations(range(6), 3) if probability(s) > 1e-12}
    oracles.check_frequencies(Counter(counts), expected, trials)


def test_an_image_of_several_patterns_is_one_pick() -> None:
    """Patterns of an image stand under its row, and the condition is on the row."""
    x = clustered(120)
    rows = np.repeat(np.arange(40), 3)
    video = Groups("video", np.arange(40) // 4, np.zeros(10, dtype=np.int64), np.full(10, 1))
    terms = terms_of([video], np.arange(40), 9)
    for sampling in ("d2", "fds"):
        _, method, options = strategy_options("freesel", {"sampling": sampling})
        picks = run_method(method, from_array(x, block_rows=16, rows=rows), Request(9, 0, NOTHING, terms=terms), options).picks
        assert len(set((picks // 4).tolist())) == 9


@pytest.mark.parametrize("name", ["maxherding", "probcover"])
def test_a_sample_of_candidates_can_meet_the_conditions(name: str) -> None:
    """Of 86 eligible rows 10 are candidates, and one selection that was drawn."""
    _, method, options = strategy_options(name, {"candidates": 10})
    request, groups = request_of("quota and cap")
    step = run_method(method, shards_of(POOLS["clustered"], 32), request, options)
    check_met(step.picks, request, groups)
    assert np.isfinite(step.gains).sum() > 5
