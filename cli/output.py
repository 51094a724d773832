"""What a person sees: progress on stderr, the result on stdout."""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from engine.masks import masked

SHOW_AFTER_S = 2.0
LINE_EVERY_S = 10.0
EACH = ("rounds",)
"""Stages whose every step is told where no terminal shows it: they are few, and long."""


class RateAndRest(ProgressColumn):
    """Rate since the stage was first seen here, and the time left at that rate."""

    def render(self, task: Task) -> Text:
        """Return the column's text for one stage."""
        return Text(rate_and_rest(task.completed - task.fields["base"], (task.total or 0) - task.completed, task.elapsed or 0))


def rate_and_rest(done: float, left: float, elapsed_s: float) -> str:
    """Return e.g. '310.2/s, 2:05 left'; empty while nothing is done yet."""
    if done <= 0 or left < 0 or elapsed_s <= 0:
        return ""
    rate = done / elapsed_s
    if left <= 0:
        return f"{rate:,.1f}/s"
    minutes, seconds = divmod(round(left / rate), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    return f"{rate:,.1f}/s, {clock} left"


class Watcher:
    """Shows the progress of anything that takes longer than two seconds: a bar on a terminal, else a line now and then."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.started: dict[str, tuple[float, int]] = {}
        self.tasks: dict[str, Any] = {}
        self.last_line = 0.0

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        """Take note of progress; an engine's Progress."""
        now = time.monotonic()
        began, base = self.started.setdefault(stage, (now, done))
        if self.quiet or now - min(t for t, _ in self.started.values()) < SHOW_AFTER_S:
            return
        if self.console.is_terminal:
            self._draw(stage, done, total, note, began, base)
        elif now - self.last_line >= LINE_EVERY_S or stage in EACH:
            self.last_line = now
            counts = f"{done:,} of {total:,}" if total else f"{done:,}"
            words = [f"{stage}: {counts}", rate_and_rest(done - base, total - done, now - began), note]
            self.console.print(Text(", ".join(word for word in words if word)))

    def _draw(self, stage: str, done: int, total: int, note: str, began: float, base: int) -> None:
        if self.bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                RateAndRest(),
                TimeElapsedColumn(),
            )
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=self.console, transient=True)
            self.bar.start()
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total or None, note=note, base=base)
            self.bar.tasks[-1].start_time = self.bar.get_time() - (time.monotonic() - began)
        self.bar.update(self.tasks[stage], completed=done, total=total or None, note=note)

    def tell(self, text: str) -> None:
        """Print a line beside the progress, unless quiet."""
        if not self.quiet:
            self.console.print(Text(masked(text)))

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def print_json(result: dict[str, Any]) -> None:
    """Print one machine-readable line on stdout."""
    sys.stdout.write(masked(json.dumps(result, sort_keys=True, ensure_ascii=False)) + "\n")


def error(message: str) -> None:
    """Print one line on stderr."""
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {masked(' '.join(message.split()))}", style="red"))


def note(text: str) -> None:
    """Print a line that is no result, on stderr."""
    Console(stderr=True, soft_wrap=True).print(Text(masked(text)))


def raw(text: str) -> None:
    """Print part of a log on stdout, as it is; keys were left out where it was written."""
    sys.stdout.write(masked(text))
    sys.stdout.flush()


def log(text: str) -> None:
    """Print part of a log on stderr."""
    sys.stderr.write(masked(text))
    sys.stderr.flush()


def say(text: str) -> None:
    """Print a result for a person, on stdout."""
    Console(soft_wrap=True).print(Text(masked(text)))


def stack() -> None:
    """Print where the error that is being handled came from, on stderr."""
    sys.stderr.write(masked(traceback.format_exc()))


DISTANCES = ("mean_distance", "covering_radius", "emd")
BOXES = re.compile(r"(best_)?A[PR]([\d_/]|$)")


def digits_of(metric: str) -> int:
    """Return the decimals a metric is shown with: distances and box AP are around 1, the others are percentages."""
    return 4 if metric in DISTANCES or BOXES.match(metric) else 2


def table(title: str, header: list[str], rows: list[list[str]], figures: int = 1_000_000) -> None:
    """Print a table on stdout; after the first column, `figures` columns are figures and set to the right."""
    grid = Table(title=Text(masked(title)), title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        grid.add_column(name, justify="right" if 0 < index <= figures else "left", no_wrap=index == 0)
    for row in rows:
        grid.add_row(*(Text(masked(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(grid)


def number(value: float | None, digits: int = 1) -> str:
    """Return a figure for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def metrics_table(title: str, metrics: list[dict[str, Any]]) -> None:
    """Print [{metric, value, note}] in their order."""
    rows = [[m["metric"], number(m["value"], digits_of(m["metric"])), m["note"]] for m in metrics]
    table(title, ["metric", "value", "what"], rows, figures=1)


def rounds_table(title: str, criterion: str, rounds: list[dict[str, Any]]) -> None:
    """Print a row for each round: labels paid for, images trained on, the metrics (the one that counts first), seconds.

    Of the metrics those of single classes stay in rounds.parquet, and the best evaluation's.
    """
    measured = [m["metric"] for found in rounds for m in found["metrics"]]
    names = [criterion, *(name for name in measured if "/" not in name and not name.startswith("best_"))]
    names = list(dict.fromkeys(names))
    lines = []
    for found in rounds:
        values = {m["metric"]: m["value"] for m in found["metrics"]}
        shown = [number(values.get(name), digits_of(name)) for name in names]
        lines.append([str(found["round"]), f"{found['labeled']:,}", f"{found['trained']:,}", *shown, number(found["seconds"])])
    table(title, ["round", "labels", "trained on", *names, "seconds"], lines)


def comparison_tables(rows: list[dict[str, Any]]) -> None:
    """Print one table a budget: a row for each strategy, a column for each metric, mean and spread over the seeds."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    for budget in budgets:
        lines: dict[str, list[str]] = {}
        for metric in metrics:
            for row in rows:
                if row["budget"] == budget and row["metric"] == metric:
                    digits = digits_of(metric) - 1
                    spread = "" if row["std"] is None else f" ± {row['std']:.{digits}f}"
                    lines.setdefault(row["strategy"], [row["strategy"]]).append(number(row["mean"], digits) + spread)
        seeds = max(row["seeds"] for row in rows)
        table(f"{budget} labels, mean ± standard deviation over {seeds} seeds", ["strategy", *metrics], list(lines.values()))


def assessment_tables(title: str, facts: dict[str, Any]) -> None:
    """Print the figures and the curve, each beside random draws."""
    lines = [
        [
            figure["metric"],
            number(figure["value"], 4),
            f"{figure['random_mean']:.4f} ± {figure['random_std']:.4f}",
            f"{100 * (figure['value'] / figure['random_mean'] - 1):+.1f} %" if figure["random_mean"] else "-",
        ]
        for figure in facts["figures"]
    ]
    draws = facts["figures"][0]["draws"]
    table(title, ["figure", "selection", f"random, mean ± std of {draws}", "difference"], lines)
    header = ["first picks", "mean_distance", "random", "covering_radius", "random"]
    points = [
        [
            f"{point['num_picks']:,}",
            number(point["mean_distance"], 4),
            f"{point['random_mean_distance']:.4f} ± {point['random_std_mean_distance']:.4f}",
            number(point["covering_radius"], 4),
            f"{point['random_covering_radius']:.4f} ± {point['random_std_covering_radius']:.4f}",
        ]
        for point in facts["curve"]
    ]
    table("what a smaller budget would have covered (in pick order)", header, points)


def curves_tables(manifest: dict[str, Any]) -> None:
    """Print a row for each strategy and a column for each number of labels; then the labels saved."""
    digits, rows = digits_of(manifest["metric"]) - 1, manifest["table"]
    labels = sorted({row["labeled"] for row in rows})
    lines = {row["strategy"]: [row["strategy"], *("-" for _ in labels)] for row in rows}
    for row in rows:
        spread = "" if row["std"] is None else f" ± {row['std']:.{digits}f}"
        lines[row["strategy"]][1 + labels.index(row["labeled"])] = number(row["mean"], digits) + spread
    seeds = max(row["seeds"] for row in rows)
    of = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    table(f"{manifest['metric']} by labels{of}", ["strategy", *(f"{count:,}" for count in labels)], list(lines.values()))
    if manifest["saved"]:
        header = ["strategy", "labels saved %", f"at {manifest['metric']}"]
        found = [
            [
                row["strategy"],
                number(row["mean"]) + ("" if row["std"] is None else f" ± {row['std']:.1f}"),
                number(row["level"], digits),
            ]
            for row in manifest["saved"]
        ]
        table(f"beside {manifest['baseline']}, at equal {manifest['metric']}", header, found)
