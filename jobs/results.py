"""The tables that a job ends with: one metric of some steps' passes each, ours beside what was published."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.folders import read_manifest
from engine.masks import masked
from engine.places import Place
from engine.schema import InputError, nearest
from jobs.jobfile import JobFile, Table
from jobs.step import Step

DASH = "-"


@dataclass(frozen=True)
class Cell:
    """A row and a column of the table: our mean and sample standard deviation over `passes`, and the published figure."""

    row: str
    column: str
    mean: float | None
    std: float | None
    passes: int
    published: float | None


def make_tables(file: JobFile, steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return a job's tables as JSON-ready facts, of the passes that are done; write them to OUT, if there are any.

    Raises InputError where no pass has such a metric.
    """
    tables = [_facts(table, steps, file.source) for table in file.all_tables]
    if tables:
        out = Place(file.out)
        out.at("table.json").write(masked(json.dumps(tables, indent=2, ensure_ascii=False) + "\n").encode())
        out.at("table.md").write(masked("\n".join(map(_markdown, tables))).encode())
    return tables


def _facts(table: Table, steps: Sequence[Step], source: str | None) -> dict[str, Any]:
    named = f"{table.metric} of {' and '.join(table.steps)}" + (f" x {table.scale:g}" if table.scale != 1 else "")
    return {
        "title": table.title or named,
        "metric": table.metric,
        "scale": table.scale,
        "rows": table.rows,
        "columns": table.columns,
        "source": source,
        "cells": [cell.__dict__ for cell in _cells(table, [step for step in steps if step.name in table.steps])],
    }


def _cells(table: Table, steps: Sequence[Step]) -> list[Cell]:
    """Return every cell that has a figure, ours or a published one: our rows and columns first, in the order of the passes."""
    values: dict[tuple[str, str], list[float]] = {}
    spread: dict[tuple[str, str], tuple[float | None, int]] = {}
    measured: set[str] = set()
    some = False
    for step in steps:
        manifest = read_manifest(Place(step.out))
        for record in _records(manifest) if manifest is not None else ():
            some = True
            measured.add(record["metric"])
            if record["metric"] != table.metric:
                continue
            names = {**step.variables, **{key: str(value) for key, value in record["names"].items()}}
            if any(names.get(variable) != value for variable, value in table.only.items()):
                continue
            key = names[table.rows], names[table.columns] if table.columns is not None else table.metric
            values.setdefault(key, [])
            if record["value"] is not None:
                values[key].append(table.scale * record["value"])
            if record.get("std") is not None:
                spread[key] = table.scale * record["std"], record["seeds"]
    if some and table.metric not in measured:
        shown = ", ".join(sorted(measured))
        near = nearest(table.metric, measured)
        named = ", ".join(table.steps)
        raise InputError(f"every step is done, but table.metric is {table.metric!r}{near}: {named} measures {shown}")
    return [_cell(key, values.get(key, []), spread.get(key), table.published) for key in _order(values, table.published)]


def _order(
    values: Mapping[tuple[str, str], Any], published: Mapping[str, Mapping[str, float | None]]
) -> Iterator[tuple[str, str]]:
    """Yield every (row, column), ours first."""
    columns = dict.fromkeys([column for _, column in values] + [column for row in published.values() for column in row])
    for row in dict.fromkeys([*(row for row, _ in values), *published]):
        for column in columns:
            if (row, column) in values or published.get(row, {}).get(column) is not None:
                yield row, column


def _cell(
    key: tuple[str, str],
    values: Sequence[float],
    known: tuple[float | None, int] | None,
    published: Mapping[str, Mapping[str, float | None]],
) -> Cell:
    row, column = key
    mean = statistics.fmean(values) if values else None
    std = statistics.stdev(values) if len(values) > 1 else None
    passes = len(values)
    if known is not None and passes == 1:
        std, passes = known
    return Cell(row, column, mean, std, passes, published.get(row, {}).get(column))


def _records(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the figures of a folder: metric, value, by what names it goes, and its spread where it is a mean already."""
    kind = manifest["kind"]
    if kind == "comparison":
        for row in manifest["table"]:
            names = {"strategy": row["strategy"], "budget": row["budget"]}
            yield {"metric": row["metric"], "value": row["mean"], **_spread(row), "names": names}
    elif kind == "rounds":
        for row in manifest["table"]:
            names = {"round": row["round"], "labeled": row["labeled"]}
            for metric in row["metrics"]:
                yield {**metric, "names": names}
    elif kind == "curves":
        for row in manifest["saved"]:
            yield {"metric": "saved", "value": row["mean"], **_spread(row), "names": {"strategy": row["strategy"]}}
        for row in manifest["table"]:
            names = {"strategy": row["strategy"], "labeled": row["labeled"]}
            yield {"metric": manifest["metric"], "value": row["mean"], **_spread(row), "names": names}
    elif kind == "selection":
        yield {"metric": "seconds", "value": manifest["time"]["seconds_s"], "names": {}}
    else:
        for metric in manifest["metrics"]:
            yield {**metric, "names": {}}


def _spread(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"std": row["std"], "seeds": row["seeds"]}


def grid(facts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return a table's header and rows as texts: for each column ours, and the published figure where there are any."""
    cells = {(cell["row"], cell["column"]): cell for cell in facts["cells"]}
    columns = list(dict.fromkeys(column for _, column in cells))
    told = any(cell["published"] is not None for cell in cells.values())
    figures = [cell[key] for cell in cells.values() for key in ("mean", "published") if cell[key] is not None]
    digits = 4 if figures and max(map(abs, figures)) <= 1 else 2
    header = [facts["rows"], *(name for column in columns for name in ([column, "published"] if told else [column]))]
    rows = []
    for row in dict.fromkeys(row for row, _ in cells):
        line = [row]
        for column in columns:
            cell = cells.get((row, column), {})
            spread = "" if cell.get("std") is None else f" ± {cell['std']:.{digits}f}"
            line.append(_figure(cell.get("mean"), digits) + spread)
            line += [_figure(cell.get("published"), digits)] if told else []
        rows.append(line)
    return header, rows


def _figure(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _markdown(facts: Mapping[str, Any]) -> str:
    header, rows = grid(facts)
    lines = [header, ["---"] * len(header), *rows]
    told = facts["source"] and any(cell["published"] is not None for cell in facts["cells"])
    source = f"\nPublished: {facts['source'].strip()}\n" if told else ""
    return f"{facts['title']}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n{source}"
