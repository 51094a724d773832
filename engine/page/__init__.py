"""A self-contained HTML page out of sections: templates, one style sheet, one script, plotly's own; nothing is fetched.

Texts are escaped by jinja2 (autoescape), what scripts read is JSON that cannot end its element, and plotly, which reads a few
tags in texts, gets them escaped (`charts.plain`). Keys of URIs are masked in everything.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from engine.masks import masked

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = "coresift"
"""What the page's <meta name="generator"> says: a file that says so may be written over."""


@dataclass(frozen=True)
class Section:
    """A part of a page: the name of its template, `<template>.html`, and what that reads."""

    id: str
    title: str
    template: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A page: its title, what it is about in a sentence or two, and its sections.

    `images` are the base64 WebP images that scripts show, by pool row; `command` made the page.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    images: dict[int, str] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()
    command: str | None = None


def count(value: float) -> str:
    """Return a whole number with commas between thousands."""
    return f"{round(value):,}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a figure to some significant digits, never in powers of ten below a million; a dash where there is none."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 10**digits:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-4 else f"{value:.2e}"


def spread(mean: float | None, std: float | None, digits: int = 3) -> str:
    """Return `mean ± std`, or what there is of it."""
    return number(mean, digits) + ("" if std is None or mean is None else f" ± {number(std, 2)}")


def percent(share: float) -> str:
    """Return a share of 1 as a percentage with one decimal."""
    return f"{100 * share:.1f}\u00a0%"


def signed(value: float) -> str:
    """Return a figure with its sign and one decimal."""
    return f"{value:+.1f}".replace("-", "−")


def when(iso: str) -> str:
    """Return an ISO 8601 time in UTC to the second, as people write it."""
    return f"{iso[:10]} {iso[11:19]} UTC"


def _clean(value: Any) -> Any:
    """Return what a page prints without the keys of URIs in it."""
    return masked(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _json(value: Any, **options: Any) -> str:
    """Return what a page's scripts read, without the keys of URIs in it."""
    return masked(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, **options))


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    environment.policies["json.dumps_function"] = _json
    environment.filters |= {"count": count, "number": number, "percent": percent, "signed": signed, "when": when}
    environment.globals |= {"spread": spread}
    return environment


def _file(name: str) -> Markup:
    """Return a file of ours, as it stands."""
    return Markup((TEMPLATES / name).read_text())


def render(page: Page) -> bytes:
    """Return the page as HTML in UTF-8; plotly's script is in it where a section has a chart."""
    has_charts = any("chart" in key for section in page.sections for key in section.data)
    plotly = Markup()
    if has_charts:
        from plotly.offline import get_plotlyjs

        plotly = Markup(get_plotlyjs())
    template = _environment().get_template("page.html")
    return template.render(
        page=page, generator=GENERATOR, style=_file("style.css"), script=_file("page.js"), plotly=plotly
    ).encode()
