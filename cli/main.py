"""The `coresift` command: one verb, one engine function."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cli import output
from cli.options import no_options, verb
from engine.schema import InputError, Opt, RunError, nearest
from engine.verbs import CompareOptions, DedupOptions, DemoOptions, EmbedOptions, EvaluateOptions, ImportOptions, SelectOptions

UsageError = typer.BadParameter.__mro__[1]
"""Typer's own error for a command line that cannot be parsed."""

INTERRUPTED = 130
"""What typer returns for Ctrl-C."""

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

    path: Annotated[str, Opt("Features, selection, metrics, comparison, or a pool.", positional=True)]


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check that the files of a published folder, and of those below it, are as they were written."""

    path: Annotated[str, Opt("Features, selection, metrics or comparison.", positional=True)]


class Session:
    """One command's surroundings: its watcher, its clock, and how it prints."""

    def __init__(self, flags: dict[str, bool]) -> None:
        self.json, self.quiet, self.verbose = flags["json"], flags["quiet"], flags["verbose"]
        self.watch = output.Watcher(self.quiet)
        self.began = time.time()
        if self.verbose:
            from engine import session

            session.verbose = True

    def is_old(self, manifest: dict[str, Any]) -> bool:
        """Return whether a manifest was published before this command began: nothing was done again."""
        from datetime import datetime

        return datetime.fromisoformat(manifest["published"]).timestamp() < self.began

    def result(self, facts: dict[str, Any], sentence: str) -> None:
        """Print the command's result: `facts` with --json, else the sentence."""
        self.watch.close()
        if self.json:
            output.print_json(facts)
        else:
            output.say(sentence)


def _embed(options: EmbedOptions, flags: dict[str, bool]) -> None:
    from engine.embed import embed_all

    ui = Session(flags)
    manifests = embed_all(options, ui.watch)
    if len(manifests) == 1:
        _say_features("embed", options.out, manifests[0], ui)
        return
    told = [_features("embed", f"{options.out}/{found['encoder']['name']}", found, ui) for found in manifests]
    ui.result({"command": "embed", "stores": [facts for facts, _ in told]}, "\n".join(sentence for _, sentence in told))


def _import(options: ImportOptions, flags: dict[str, bool]) -> None:
    from engine.ingest import import_features

    ui = Session(flags)
    _say_features("import", options.out, import_features(options, ui.watch), ui)


def _say_features(command: str, out: str, manifest: dict[str, Any], ui: Session) -> None:
    ui.result(*_features(command, out, manifest, ui))


def _features(command: str, out: str, manifest: dict[str, Any], ui: Session) -> tuple[dict[str, Any], str]:
    """Return what is told of a feature store: as facts, and as a sentence."""
    keys = ("num_rows", "num_vectors", "num_rejected", "num_labeled", "dim", "digest")
    facts = {"command": command, "out": out, "already_done": ui.is_old(manifest), **{key: manifest[key] for key in keys}}
    vectors = f"{manifest['num_vectors']:,} vectors of {manifest['dim']} floats"
    rejected = f", {manifest['num_rejected']} images rejected (see {out}/rejected.parquet)" if manifest["num_rejected"] else ""
    timing = manifest.get("time", {})
    if timing:
        facts["seconds"], facts["rows_per_s"] = timing["seconds_s"], timing["rows_per_s"]
    if facts["already_done"]:
        return facts, f"{out}: done before, {vectors}{rejected}"
    spent = f" in {timing['seconds_s']:.1f} s ({timing['rows_per_s']:,.1f} images/s)" if timing else ""
    return facts, f"{out}: {vectors}{rejected}{spent}"


def _select(options: SelectOptions, flags: dict[str, bool]) -> None:
    from engine.select import select

    ui = Session(flags)
    manifests = select(options, ui.watch)
    several = len(manifests) > 1
    folders = []
    for manifest in manifests:
        out = f"{options.out}/{manifest['num_picks']}" if several else options.out
        folders.append(
            {
                "out": out,
                "num_picks": manifest["num_picks"],
                "digest": manifest["digest"],
                "seconds": manifest["time"]["seconds_s"],
                "already_done": ui.is_old(manifest),
            }
        )
    lines = [
        f"{f['out']}: {'done before, ' if f['already_done'] else ''}{f['num_picks']:,} picks by {options.strategy}"
        + ("" if f["already_done"] else f" in {f['seconds']:.1f} s")
        for f in folders
    ]
    ui.result({"command": "select", "strategy": options.strategy, "selections": folders}, "\n".join(lines))


def _dedup(options: DedupOptions, flags: dict[str, bool]) -> None:
    from engine.dedup import dedup

    ui = Session(flags)
    manifest = dedup(options, ui.watch)
    keys = ("num_vectors", "num_clusters", "num_excluded", "num_kept", "digest")
    done, seconds = ui.is_old(manifest), manifest["time"]["seconds_s"]
    facts = {"command": "dedup", "out": options.out, "already_done": done, "seconds": seconds}
    found = f"{manifest['num_excluded']:,} of {manifest['num_vectors']:,} images are near copies of the others"
    ui.result(
        {**facts, **{key: manifest[key] for key in keys}},
        f"{options.out}: {'done before, ' if done else ''}{found}" + ("" if done else f" ({seconds:.1f} s)"),
    )


def _evaluate(options: EvaluateOptions, flags: dict[str, bool]) -> None:
    from engine.evaluate import evaluate

    ui = Session(flags)
    results = evaluate(options, ui.watch)
    ui.watch.close()
    if ui.json:
        output.print_json({"command": "evaluate", "selection": options.selection, "metrics": results})
        return
    rows = [[r["metric"], output.number(r["value"], output.digits_of(r["metric"])), r["note"]] for r in results]
    output.table(options.selection, ["metric", "value", "what"], rows, figures=1)


def _compare(options: CompareOptions, flags: dict[str, bool]) -> None:
    from engine.compare import compare

    ui = Session(flags)
    _say_comparison("compare", options.out, compare(options, ui.watch), ui)


def _demo(options: DemoOptions, flags: dict[str, bool]) -> None:
    from engine.demo import demo

    ui = Session(flags)
    _say_comparison("demo", options.out, demo(options, ui.watch), ui)


def _say_comparison(command: str, out: str, manifest: dict[str, Any], ui: Session) -> None:
    ui.watch.close()
    if ui.json:
        output.print_json({"command": command, "out": out, "table": manifest["table"]})
        return
    output.comparison_tables(manifest["table"])
    output.say(f"{out}: {manifest['num_cells']} selections compared{' (done before)' if ui.is_old(manifest) else ''}")


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


def _strategies(options: Any, flags: dict[str, bool]) -> None:
    """List the strategies, what they read, and their options."""
    from engine.select import describe_strategies

    found = describe_strategies()
    if flags["json"]:
        output.print_json({"strategies": found})
        return
    for strategy in found:
        nested = "; nested: smaller budgets are prefixes" if strategy["nested"] else ""
        output.say(f"{strategy['name']}: {strategy['summary']} (reads {', '.join(strategy['reads'])}{nested})")
        for option in strategy["options"]:
            output.say(f"    --option {option['name']}={option['default']}  {option['help']}")


def _encoders(options: Any, flags: dict[str, bool]) -> None:
    """List the encoders."""
    from engine.encoders import encoder_help

    if flags["json"]:
        output.print_json({"encoders": encoder_help()})
        return
    for name, text in encoder_help().items():
        output.say(f"{name}: {text}")


VERBS: dict[str, tuple[type[Any], Any]] = {
    "embed": (EmbedOptions, _embed),
    "import": (ImportOptions, _import),
    "dedup": (DedupOptions, _dedup),
    "select": (SelectOptions, _select),
    "evaluate": (EvaluateOptions, _evaluate),
    "compare": (CompareOptions, _compare),
    "info": (InfoOptions, _info),
    "verify": (VerifyOptions, _verify),
    "strategies": (no_options(), _strategies),
    "encoders": (no_options(), _encoders),
    "demo": (DemoOptions, _demo),
}

for _name, (_options, _run) in VERBS.items():
    _text = _run.__doc__ or _options.__doc__
    app.command(_name, help=_text)(verb(_options, _run, _name))


def _known(failure: BaseException) -> BaseException | None:
    """Return our own error behind what was raised: itself, or the cause that Ray wrapped on its way from an actor."""
    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, (InputError, RunError)):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None


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
    """Run one command; return the exit code: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted."""
    try:
        code = int(app(arguments or ["--help"], prog_name="coresift", standalone_mode=False) or 0)
        if code == INTERRUPTED:
            output.error("interrupted; run the same command again to go on")
        return code
    except Exception as failure:
        if isinstance(failure, UsageError):
            output.error(_usage(failure))
            return 2
        known = _known(failure)
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
