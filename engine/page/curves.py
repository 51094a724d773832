"""The section of learning curves that comparisons, rounds and reports share: curves with spread, and labels saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.page import Section
from engine.page.charts import BASELINE, Line, colour_of, dash_of, lines

Row = dict[str, Any]


def curve_lines(rows: Sequence[Row], baseline: str) -> list[Line]:
    """Return a line for each strategy of rows of `strategy`, `labeled`, `mean` and `std`; the baseline's in its own colour."""
    found, number = list[Line](), 0
    for name in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == name]
        is_base = name == baseline
        colour, dash = (BASELINE, "dash") if is_base else (colour_of(number), dash_of(number))
        number += not is_base
        x, y, std = ([row[key] for row in mine] for key in ("labeled", "mean", "std"))
        found.append(Line(name, x, y, std, colour, dash))
    return found


def curves_section(
    id: str,
    title: str,
    rows_of: dict[str, Sequence[Row]],
    saved: Sequence[Row] = (),
    baseline: str = "random",
    notes: Sequence[str] = (),
) -> Section:
    """Return the section: a chart and a table for each metric of `rows_of`, and the labels saved, as `engine.curves` has them.

    A row is {strategy, labeled, mean, std, seeds}; a row of `saved` is {strategy, metric, level, mean, std, seeds}.
    """
    metrics = []
    for metric, rows in rows_of.items():
        table: dict[str, dict[int, Row]] = {}
        for row in rows:
            table.setdefault(row["strategy"], {})[row["labeled"]] = row
        chart = lines(curve_lines(rows, baseline), "labels", metric)
        labels = sorted({row["labeled"] for row in rows})
        metrics.append({"metric": metric, "chart": chart, "labels": labels, "table": table})
    seeds = max((row["seeds"] for rows in rows_of.values() for row in rows), default=0)
    data = {"charts": metrics, "saved": list(saved), "baseline": baseline, "seeds": seeds, "notes": list(notes)}
    return Section(id, title, "curves", data)
