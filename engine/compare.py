"""Strategies x budgets x seeds on one feature store: what each was worth, as mean and spread over the seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from engine.arrays import Ints
from engine.conditions import Conditions, asked_of, read_conditions
from engine.curves import Curve, saved_by_seed, saved_table
from engine.evaluate import Known, Labelled, check_metrics, measure, read_test
from engine.folders import Claim, begin, digest_of, publish, read_manifest
from engine.page import Page, Section, render
from engine.page.curves import curves_section
from engine.placement import open_shards
from engine.places import Place
from engine.runner import Method, run_method
from engine.schema import InputError, Progress, no_progress, parse_budgets, parse_pairs, result_options
from engine.select import (
    Strategy,
    check_labels,
    check_vectors,
    constraints_facts,
    places_read,
    prefix,
    read_excluded,
    read_predictions,
    request_of,
    strategy_options,
    write_selection,
)
from engine.shards import Shards, Step
from engine.store import FeatureStore, table_bytes
from engine.verbs import CompareOptions

BASELINE = "random"
ACCURACIES = ("knn_", "linear")
"""How the metrics begin of which more is better, and for which labels are paid."""


@dataclass(frozen=True)
class Entrant:
    """One strategy with its options, as named on the command line: `kmeans:restarts=1`."""

    name: str
    strategy: Strategy
    method: Method
    options: Any


def entrant_of(spec: str) -> Entrant:
    """Return the strategy that `kmeans:restarts=1` names, with its options; raises InputError for what it does not have."""
    name, *pairs = spec.split(":")
    strategy, method, options = strategy_options(name, parse_pairs(pairs, "strategy option"))
    return Entrant(spec, strategy, method, options)


def specs(strategies: tuple[str, ...]) -> list[str]:
    """Return the strategies named; a part that begins with a digit is more of the value before it: `levels=1000,100`."""
    found: list[str] = []
    for part in (part.strip() for part in strategies):
        if found and part[:1].isdigit():
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


@dataclass(frozen=True)
class Arena:
    """What all cells share."""

    place: Place
    store: FeatureStore
    shards: Shards
    test: Labelled | None
    excluded: Ints
    conditions: Conditions | None
    predictions: FeatureStore | None
    options: CompareOptions


def _cell(arena: Arena, entrant: Entrant, seed: int, count: int) -> Place:
    return arena.place.at("cells", entrant.name.replace(":", ","), f"seed-{seed}", str(count))


def _read_cell(place: Place) -> list[dict[str, Any]] | None:
    manifest = read_manifest(place.at("metrics"))
    return None if manifest is None else list(manifest["metrics"])


def _publish_cell(arena: Arena, entrant: Entrant, seed: int, step: Step, facts: dict[str, Any]) -> None:
    """Write the selection and its metrics, each a folder as everywhere."""
    place, count, nothing = _cell(arena, entrant, seed, len(step.picks)), len(step.picks), np.empty(0, dtype=np.int64)
    inputs = {"features": arena.store.digest, "excluded": digest_of(arena.excluded.tolist())}
    if arena.predictions and entrant.strategy.predictions:
        inputs["predictions"] = arena.predictions.digest
    identity = {
        "strategy": entrant.strategy.name,
        "options": result_options(entrant.options),
        "seed": seed,
        "count": count,
        "normalize": True,
    }
    identity |= {"constraints": arena.conditions.asked.facts()} if arena.conditions else {}
    selection, seconds = place.at("selection"), facts["time"]["seconds_s"]
    if begin(selection, "selection", inputs, identity, overwrite=False) is None:
        write_selection(selection, arena.store, step, nothing, facts)
    begin(place.at("metrics"), "metrics", inputs, identity, overwrite=False)
    results = [{"metric": "seconds", "value": seconds, "note": "of the selection (of the largest budget, if nested)"}]
    known, rows = Known.of(arena.store), np.sort(step.picks)
    for metric, value, note in measure(known, arena.shards, rows, arena.test, arena.options, seed):
        results.append({"metric": metric, "value": value, "note": note})
    publish(place.at("metrics"), {"metrics": results})


def _run(arena: Arena, entrant: Entrant, seed: int, counts: list[int], done: Callable[[str], None]) -> None:
    """Run what is missing of one strategy and seed."""
    todo = [count for count in counts if _read_cell(_cell(arena, entrant, seed, count)) is None]
    for _ in range(len(counts) - len(todo)):
        done(entrant.name)
    nothing = np.empty(0, dtype=np.int64)
    for run in [todo] if entrant.strategy.nested and todo and not arena.conditions else [[count] for count in todo]:
        request, shares = request_of(arena.conditions, run[-1], seed, nothing, arena.excluded)
        began = time.perf_counter()
        step = run_method(entrant.method, arena.shards, request, entrant.options)
        facts: dict[str, Any] = {"time": {"seconds_s": round(time.perf_counter() - began, 3)}}
        facts |= constraints_facts(arena.conditions, shares, arena.shards, step, nothing)
        for count in run:
            _publish_cell(arena, entrant, seed, prefix(step, count), facts)
            done(f"{entrant.name}, {count} picks, seed {seed}")


def _summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each strategy, budget and metric: mean and sample standard deviation over the seeds."""
    groups: dict[tuple[str, int, str], list[float]] = {}
    for cell in cells:
        group = groups.setdefault((cell["strategy"], cell["budget"], cell["metric"]), [])
        if cell["value"] is not None:
            group.append(cell["value"])
    rows = []
    for (strategy, budget, metric), values in groups.items():
        mean = float(np.mean(values)) if values else None
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(
            {"strategy": strategy, "budget": budget, "metric": metric, "mean": mean, "std": spread, "seeds": len(values)}
        )
    return rows


def comparison_section(cells: Sequence[dict[str, Any]], id: str = "comparison", title: str = "Comparison") -> Section:
    """Return the section of a page that shows a comparison: from its results.parquet's rows, curves and the labels saved.

    Labels are saved beside the strategy BASELINE, by the metrics of ACCURACIES.
    """
    table = [{**row, "labeled": row["budget"]} for row in _summarise(cells)]
    metrics = sorted(dict.fromkeys(row["metric"] for row in table), key=lambda name: name == "seconds")
    rows_of: dict[str, Sequence[dict[str, Any]]] = {name: [row for row in table if row["metric"] == name] for name in metrics}
    shares, notes = list[dict[str, Any]](), list[str]()
    if BASELINE not in {cell["strategy"] for cell in cells}:
        notes.append(f"Labels saved are told beside {BASELINE}, which is not among the strategies.")
    else:
        for name in (name for name in metrics if name.startswith(ACCURACIES)):
            curves = _curves_of([cell for cell in cells if cell["metric"] == name])
            shares += [{**row, "metric": name} for row in saved_table(list(saved_by_seed(curves, BASELINE)))]
    return curves_section(id, title, rows_of, shares, BASELINE, notes)


def _curves_of(cells: Sequence[dict[str, Any]]) -> list[Curve]:
    """Return a curve over the budgets for each strategy and seed, without the budgets at which some run has no value."""
    undefined = {cell["budget"] for cell in cells if cell["value"] is None}
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["budget"] not in undefined:
            runs.setdefault((cell["strategy"], cell["seed"]), []).append(cell)
    return [
        Curve(name, seed, name, mine[0]["metric"], *(np.array([c[key] for c in mine], float) for key in ("budget", "value")))
        for (name, seed), mine in runs.items()
    ]


def _page(cells: Sequence[dict[str, Any]], store: FeatureStore) -> bytes:
    lead = f"What the picks of each strategy are worth, by the number of labels, on {store.place.uri}."
    return render(Page("Strategies compared", lead, [comparison_section(cells)]))


def compare(options: CompareOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Select and measure every combination; return the manifest, whose `table` has a row per strategy, budget, metric.

    Each cell is published as it is finished, so the same command run again goes on where it stopped. Also writes
    results.parquet with every single value, and comparison.html, the picture: curves with spread, and the labels saved.
    """
    check_metrics(options.metrics, options.test)
    store = FeatureStore.of_vectors(options.features)
    entrants = [entrant_of(spec) for spec in specs(options.strategies)]
    for entrant in entrants:
        check_vectors(entrant.strategy, store)
        check_labels(entrant.strategy, store)
    strategies = [entrant.strategy for entrant in entrants]
    predictions = read_predictions(strategies, store, options.predictions)
    names = [entrant.name for entrant in entrants]
    if len(set(names)) != len(names):
        raise InputError(f"--strategies {','.join(names)} names one twice")
    excluded = read_excluded(options.exclude, store)
    asked, nothing = asked_of(options), np.empty(0, dtype=np.int64)
    conditions = read_conditions(asked, store, nothing, excluded) if asked else None
    available = len(conditions.rows) if conditions else store.num_vectors - len(excluded)
    counts = sorted(parse_budgets(options.budget, store.num_vectors, available))
    for count in counts:
        request_of(conditions, count, 0, nothing, excluded)
    test = read_test(options.test, store) if options.test else None
    place = Place(options.out)
    inputs = {"features": store.digest, "test": FeatureStore(options.test).digest if options.test else None}
    inputs |= {"excluded": digest_of(excluded.tolist())} if options.exclude else {}
    inputs |= {"predictions": predictions.digest} if predictions else {}
    reads = places_read(options.features, options.test, options.exclude, options.predictions)
    identity = result_options(options) | ({"constraints": asked.facts()} if asked else {})
    claim = Claim.of(place, "comparison", inputs, identity, options.overwrite, reads)
    published = claim.published()
    if published is not None:
        return published
    columns = tuple(dict.fromkeys(name for strategy in strategies for name in strategy.columns))
    with open_shards(store, options, True, columns, predictions) as shards:
        claim.take()
        arena = Arena(place, store, shards, test, excluded, conditions, predictions, options)
        finished, total = 0, len(entrants) * options.seeds * len(counts)

        def done(note: str) -> None:
            nonlocal finished
            finished += 1
            progress("compare", finished, total, note)

        cells = []
        progress("compare", 0, total, "")
        for seed in range(options.seeds):
            for entrant in entrants:
                _run(arena, entrant, seed, counts, done)
    for entrant in entrants:
        for count in counts:
            for seed in range(options.seeds):
                for result in _read_cell(_cell(arena, entrant, seed, count)) or []:
                    cells.append({"strategy": entrant.name, "budget": count, "seed": seed, **result})
    place.at("results.parquet").write(table_bytes(pa.Table.from_pylist(cells)))
    place.at("comparison.html").write(_page(cells, store))
    return publish(place, {"table": _summarise(cells), "num_cells": total})
