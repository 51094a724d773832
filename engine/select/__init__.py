"""Selection: the STRATEGIES table, and `select`, which runs a strategy and publishes what it picked."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from engine.arrays import Ints
from engine.conditions import Conditions, asked_of, read_conditions
from engine.folders import Claim, digest_of
from engine.placement import open_shards
from engine.places import Place
from engine.runner import Journal, run_method
from engine.schema import InputError, Progress, no_progress, parse_budgets, parse_pairs, result_options
from engine.select.given import places_read, read_excluded, read_labeled, read_predictions, read_selection
from engine.select.quality import cost_in_quality
from engine.select.strategies import (
    STRATEGIES,
    Strategy,
    check_labels,
    check_vectors,
    describe_strategies,
    strategy_options,
)
from engine.select.written import prefix, write_selection
from engine.shards import Request, Shards, Step
from engine.store import FeatureStore
from engine.verbs import SelectOptions

__all__ = [
    "STRATEGIES",
    "Strategy",
    "check_labels",
    "check_vectors",
    "constraints_facts",
    "describe_strategies",
    "places_read",
    "prefix",
    "read_excluded",
    "read_labeled",
    "read_predictions",
    "read_selection",
    "request_of",
    "select",
    "strategy_options",
    "write_selection",
]


Shares = list[Ints | None]
"""The even split of each column that has conditions, None where it has none."""


def request_of(conditions: Conditions | None, budget: int, seed: int, labeled: Ints, excluded: Ints) -> tuple[Request, Shares]:
    """Return what a method is asked for, and the even splits; raises InputError, a report, where it can't be met."""
    if conditions is None:
        return Request(budget, seed, labeled, excluded), []
    terms, shares = conditions.terms(budget, seed)
    return Request(budget, seed, labeled, conditions.excluded, terms=terms), shares


def constraints_facts(
    conditions: Conditions | None, shares: Shares, shards: Shards, step: Step, labeled: Ints
) -> dict[str, Any]:
    """Return what a manifest says of the conditions that picks were made under."""
    if conditions is None:
        return {}
    quality = cost_in_quality(shards, step, labeled)
    return {"constraints": {**conditions.facts(step.picks, shares), **({"quality": quality} if quality else {})}}


def _budgets(options: SelectOptions, store: FeatureStore, conditions: Conditions | None, available: int) -> list[int]:
    """Return how many picks are asked for, or about how many a sum pays for."""
    if conditions is not None and conditions.costs is not None:
        if options.budget is not None:
            raise InputError("--budget counts picks and --budget-cost what they cost: give one of them")
        return [conditions.budget()]
    if options.budget is None:
        raise InputError("--budget is missing: how many new labels, 1000 or 2% (or what they may cost, --budget-cost)")
    return parse_budgets(options.budget, store.num_vectors, available)


def select(options: SelectOptions, progress: Progress = no_progress) -> list[dict[str, Any]]:
    """Pick images from a feature store; return the manifest of each selection folder, one a budget.

    One budget is published at `options.out`, several each in a folder below it named by its count. Raises InputError
    for unusable input, and conditions that can't be met.
    """
    store = FeatureStore(options.features)
    strategy, method, chosen = strategy_options(options.strategy, parse_pairs(options.option, "--option"))
    check_vectors(strategy, store)
    check_labels(strategy, store)
    predictions = read_predictions([strategy], store, options.predictions)
    labeled = read_labeled(options.labeled, store)
    excluded = read_excluded(options.exclude, store)
    asked = asked_of(options, options.budget_cost, options.cost_column)
    conditions = read_conditions(asked, store, labeled, excluded) if asked else None
    available = len(conditions.rows) if conditions else store.num_vectors - len(np.union1d(labeled, excluded))
    budgets = _budgets(options, store, conditions, available)
    requests = {count: request_of(conditions, count, options.seed, labeled, excluded) for count in budgets}
    out = Place(options.out)
    places = {count: out.at(str(count)) if len(budgets) > 1 else out for count in budgets}
    inputs = {"features": store.digest, "labeled": digest_of(labeled.tolist()), "excluded": digest_of(excluded.tolist())}
    inputs |= {"predictions": predictions.digest} if predictions else {}
    identity = {**result_options(options), "options": result_options(chosen)}
    identity |= {"constraints": asked.facts()} if asked else {}
    reads = places_read(options.features, options.labeled, options.exclude, options.predictions)
    claims = {
        count: Claim.of(place, "selection", inputs, {**identity, "count": count}, options.overwrite, reads)
        for count, place in places.items()
    }
    manifests = {count: manifest for count, claim in claims.items() if (manifest := claim.published()) is not None}
    todo = sorted(set(budgets) - set(manifests))
    if todo:
        read = (strategy.columns, predictions, strategy.vectors)
        with open_shards(store, options, options.normalize, *read) as shards:
            for count in todo:
                claims[count].take()
            for counts in [todo] if strategy.nested and not asked else [[count] for count in todo]:
                journal = Journal(places[counts[-1]].at("journal.npz"), options.journal_s)
                began = time.perf_counter()
                request, shares = requests[counts[-1]]
                step = run_method(method, shards, request, chosen, progress, journal)
                facts = {"num_excluded": len(excluded), "time": {"seconds_s": round(time.perf_counter() - began, 3)}}
                facts |= constraints_facts(conditions, shares, shards, step, labeled)
                for count in counts:
                    some = step if asked else prefix(step, count)
                    manifests[count] = write_selection(places[count], store, some, labeled, facts)
                journal.remove()
    return [manifests[count] for count in budgets]
