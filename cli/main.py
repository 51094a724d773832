"""The `coresift` command: one verb, one engine function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

import engine.verbs
from cli import export, jobs, listings, output, plans, report
from cli.options import no_options, verb
from cli.results import RESULTS
from cli.session import INTERRUPTED, WAITING, Session
from engine.schema import InputError, Opt, RunError, known_error, nearest
from engine.verbs import ExportOptions, ImportLabelsOptions, ReportOptions, Verb

UsageError = typer.BadParameter.__mro__[1]
"""Typer's own error for a command line that cannot be parsed."""

app = typer.Typer(
    name="coresift",
    help="Pick, from a pool of images too large to label, the few that are worth labelling.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Describe a folder that coresift wrote, finished or not, or a pool of images."""

    path: Annotated[str, Opt("Features, selection, checkpoint, metrics, comparison, rounds, or a pool.", positional=True)]


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check that the files of a published folder, and of those below it, are as they were written."""

    path: Annotated[str, Opt("Features, selection, checkpoint, metrics, comparison or rounds.", positional=True)]


def _work(name: str, entry: Verb) -> Callable[[Any, dict[str, bool]], None]:
    """Return what runs a verb that one function of the engine does."""

    def work(options: Any, flags: dict[str, bool]) -> None:
        ui = Session(flags)
        told = RESULTS[name](options, entry.load()(options, ui.watch), ui.is_old)
        ui.told(told)
        if told.waits:
            raise typer.Exit(WAITING)

    return work


def _info(options: InfoOptions, flags: dict[str, bool]) -> None:
    from engine.info import describe

    facts = describe(options.path)
    if flags["json"]:
        output.print_json(facts)
        return
    import json

    output.table(
        options.path,
        ["fact", "value"],
        [[key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)] for key, value in facts.items()],
        figures=0,
    )


def _verify(options: VerifyOptions, flags: dict[str, bool]) -> None:
    from engine.verify import verify

    ui = Session(flags)
    facts = verify(options.path, ui.watch)
    bad = facts["bad"]
    if ui.json or not bad:
        size = f"{facts['num_files']:,} files, {facts['bytes']:,} bytes"
        ui.result({"command": "verify", **facts}, f"{options.path}: {size}, all as written")
    ui.watch.close()
    if bad:
        shown = "; ".join(f"{entry['file']} {entry['problem']}" for entry in bad[:4])
        more = f"; and {len(bad) - 4:,} more" if len(bad) > 4 else ""
        raise RunError(
            f"{len(bad):,} of {facts['num_files']:,} files are not as they were written: {shown}{more}. Delete them and the "
            "manifest.json beside them (of a part: above it), and run the command that wrote them again"
        )


VERBS: dict[str, tuple[type[Any], Callable[[Any, dict[str, bool]], None]]] = {
    **{name: (entry.options, _work(name, entry)) for name, entry in engine.verbs.VERBS.items()},
    **jobs.VERBS,
    **plans.VERBS,
    "report": (ReportOptions, report.report),
    "export": (ExportOptions, export.export),
    "import-labels": (ImportLabelsOptions, export.import_labels),
    "info": (InfoOptions, _info),
    "verify": (VerifyOptions, _verify),
    "strategies": (no_options(listings.strategies), listings.strategies),
    "encoders": (no_options(listings.encoders), listings.encoders),
    "recipes": (no_options(listings.recipes), listings.recipes),
}

for _name, (_options, _run) in VERBS.items():
    _text = _options.__doc__ or _run.__doc__
    app.command(_name, help=_text)(verb(_options, _run, _name))


def _usage(failure: Exception) -> str:
    """Return typer's complaint in one line, with the nearest verb for an unknown one."""
    message = str(getattr(failure, "format_message", lambda: failure)())
    if message.startswith("No such command"):
        typed = message.split("'")[1]
        return f"unknown verb {typed!r}{nearest(typed, VERBS)} (one of: {', '.join(VERBS)})"
    context = getattr(failure, "ctx", None)
    path = getattr(context, "command_path", "coresift")
    return f"{message.rstrip('.')} (see `{path} --help`)"


def run(arguments: list[str]) -> int:
    """Run one command; return the exit code: 0 done, 1 failed, 2 wrong usage or input, 3 waiting, 130 interrupted."""
    try:
        code = int(app(arguments or ["--help"], prog_name="coresift", standalone_mode=False) or 0)
        if code == INTERRUPTED:
            output.error("interrupted; run the same command again to go on")
        return code
    except Exception as failure:
        if isinstance(failure, UsageError):
            output.error(_usage(failure))
            return 2
        known = known_error(failure)
        if known is None:
            output.stack()
            return 1
        if {"-v", "--verbose"} & set(arguments):
            output.stack()
        output.error(str(known))
        return 2 if isinstance(known, InputError) else 1


def main() -> None:
    """Entry point of the `coresift` command."""
    sys.exit(run(sys.argv[1:]))
