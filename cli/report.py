"""What `coresift report` says."""

from __future__ import annotations

from cli.session import Session
from engine.verbs import ReportOptions


def report(options: ReportOptions, flags: dict[str, bool]) -> None:
    """Run report, and say where the page is, how large, and whether images are lacking."""
    from engine.report import report as write

    ui = Session(flags)
    facts = write(options, ui.watch)
    said = f"{facts['out']}: {facts['bytes'] / 1e6:.1f} MB, {facts['num_images']:,} images"
    if facts["num_unreadable"]:
        said += f"; {facts['num_unreadable']:,} images can't be shown, the first because: {facts['why']}"
    ui.result({"command": "report", **facts}, said)
