"""The section that says how well selections cover their pool, beside random draws: `engine.assess`, as charts and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.page import Section
from engine.page.charts import BASELINE, Line, colour_of, dash_of, lines, steps
from engine.report.subjects import Subject

Found = dict[str, Any]
BINS = 40
"""Bars of a histogram, at most."""
SAID = {
    "mean_distance": "mean distance",
    "covering_radius": "covering radius",
    "emd": "earth mover's distance",
}


def _curve(subjects: Sequence[Subject], found: Sequence[Found], figure: str) -> dict[str, Any]:
    """Return the chart of a figure over the first picks, each selection's, and the random draws of the largest one."""
    series = list[Line]()
    for index, (subject, facts) in enumerate(zip(subjects, found, strict=True)):
        x, y = ([point[key] for point in facts["curve"]] for key in ("num_picks", figure))
        series.append(Line(subject.name, x, y, [None] * len(x), colour_of(index), dash_of(index)))
    largest = max(found, key=lambda facts: facts["curve"][-1]["num_picks"])["curve"]
    x, y, std = ([point[key] for point in largest] for key in ("num_picks", f"random_{figure}", f"random_std_{figure}"))
    chart = lines([Line("random draws", x, y, std, BASELINE, "dash"), *series], "picks (log scale)", f"{SAID[figure]} (L2)")
    chart["layout"]["xaxis"]["type"] = "log"
    return chart


def _histogram(subject: Subject, facts: Found, index: int) -> dict[str, Any]:
    """Return the chart of the distances from the pool to the nearest labelled image, in % of the pool."""
    held, total = facts["histogram"], max(1, sum(facts["histogram"]["selection"]))
    width = -(-len(held["selection"]) // BINS)
    starts = range(0, len(held["selection"]), width)
    own, random = ([100 * sum(held[name][at : at + width]) / total for at in starts] for name in ("selection", "random"))
    edges, none = [*(held["edges"][at] for at in starts), held["edges"][-1]], [None] * len(own)
    series = [
        Line("random draws", edges, random, none, BASELINE, "dash"),
        Line(subject.name, edges, own, none, colour_of(index), dash_of(index)),
    ]
    return steps(edges, series, "distance to the nearest label (L2)", "% of the pool")


def _row(figure: Found) -> dict[str, Any]:
    change = 100 * (figure["value"] / figure["random_mean"] - 1) if figure["random_mean"] else 0.0
    return {
        **figure,
        "said": SAID.get(figure["metric"], figure["metric"]),
        "change": change,
    }


def coverage_section(subjects: Sequence[Subject], found: Sequence[Found]) -> Section:
    """Return the section; `found` are what `assess` gave of each selection."""
    each = [
        {
            "name": subject.name,
            "index": index,
            "figures": [_row(figure) for figure in facts["figures"]],
            "knee": facts["knee"],
            "num_picks": len(subject.rows),
            "warnings": facts["warnings"],
            "chart": _histogram(subject, facts, index),
        }
        for index, (subject, facts) in enumerate(zip(subjects, found, strict=True))
    ]
    curves = [(SAID[figure], _curve(subjects, found, figure)) for figure in ("mean_distance", "covering_radius")]
    table = [(subject.name, facts["curve"]) for subject, facts in zip(subjects, found, strict=True)]
    data = {
        "each": each,
        "charts": curves,
        "table": table,
        "sample": found[0]["sample"],
        "draws": found[0]["figures"][0]["draws"],
    }
    return Section("coverage", "Coverage", "coverage", data)
