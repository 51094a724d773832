"""Charts as plotly.js reads them, {"data": [...], "layout": {...}}: colours are names that the page's style sheet defines."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.masks import masked

Chart = dict[str, Any]

SERIES = 6
"""Colours that the style sheet defines for series, --series-1 and on."""
BASELINE = "var(--baseline)"
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


@dataclass(frozen=True)
class Line:
    """A curve: its points, and the standard deviation at each, 0 or None where there is none."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    std: Sequence[float | None]
    colour: str
    dash: str = "solid"


def colour_of(index: int) -> str:
    """Return the colour of a series by its number."""
    return f"var(--series-{index % SERIES + 1})"


def dash_of(index: int) -> str:
    """Return the dash of a series by its number: another once colours come again."""
    return DASHES[index // SERIES % len(DASHES)]


def symbol_of(index: int) -> str:
    """Return the marker of a series by its number."""
    return SYMBOLS[index % len(SYMBOLS)]


def plain(text: str) -> str:
    """Return a text as plotly shows it letter for letter, where it reads a few tags and entities otherwise."""
    return html.escape(masked(text), quote=False)


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": plain(title)}, "automargin": True, "zeroline": False, **more}


def layout(x_title: str, y_title: str, **more: Any) -> dict[str, Any]:
    """Return a layout with two titled axes and the legend above."""
    return {
        "xaxis": _axis(x_title),
        "yaxis": _axis(y_title, hoverformat=".4~g"),
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "x",
        "dragmode": False,
        **more,
    }


def _band(line: Line) -> Chart:
    """Return the band of one standard deviation around a line."""
    points = [(x, y, s or 0.0) for x, y, s in zip(line.x, line.y, line.std, strict=True) if y is not None]
    return {
        "type": "scatter",
        "x": [*(x for x, _, _ in points), *(x for x, _, _ in reversed(points))],
        "y": [*(y + s for _, y, s in points), *(y - s for _, y, s in reversed(points))],
        "fill": "toself",
        "fillcolor": line.colour,
        "opacity": 0.16,
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": plain(line.name),
    }


def lines(series: Sequence[Line], x_title: str, y_title: str) -> Chart:
    """Return curves, each with a band of a standard deviation where it has one."""
    data: list[Chart] = [_band(line) for line in series if any(line.std)]
    for line in series:
        data.append(
            {
                "type": "scatter",
                "x": list(line.x),
                "y": list(line.y),
                "name": plain(line.name),
                "legendgroup": plain(line.name),
                "mode": "lines+markers",
                "line": {"color": line.colour, "dash": line.dash, "width": 2},
                "marker": {"size": 5},
                "hoverinfo": "x+y+name",
            }
        )
    return {"data": data, "layout": layout(x_title, y_title)}


def steps(edges: Sequence[float], series: Sequence[Line], x_title: str, y_title: str) -> Chart:
    """Return histograms on the same bins as outlines; a line's `y` are the heights of the bins."""
    data = [
        {
            "type": "scatter",
            "x": list(edges),
            "y": [*line.y, line.y[-1] if line.y else 0],
            "name": plain(line.name),
            "mode": "lines",
            "line": {"shape": "hv", "color": line.colour, "dash": line.dash, "width": 2},
            "hoverinfo": "x+y+name",
        }
        for line in series
    ]
    return {"data": data, "layout": layout(x_title, y_title)}
