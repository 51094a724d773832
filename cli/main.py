"""The `coresift` command: one verb, one engine function."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cli import listings, output
from cli.options import no_options, verb
from engine import session
from engine.schema import InputError, Opt, RunError, nearest
from engine.verbs import (
    CompareOptions,
    CurvesOptions,
    DedupOptions,
    DemoOptions,
    EmbedOptions,
    EvaluateOptions,
    FinetuneOptions,
    ImportOptions,
    PredictOptions,
    RoundsOptions,
    SelectOptions,
)

UsageError = typer.BadParameter.__mro__[1]
"""Typer's own error for a command line that cannot be parsed."""

WAITING = 3
"""Exit code of rounds that wait for labels: neither done nor failed."""
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

    path: Annotated[str, Opt("Features, selection, checkpoint, metrics, comparison, rounds, or a pool.", positional=True)]


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check that the files of a published folder, and of those below it, are as they were written."""

    path: Annotated[str, Opt("Features, selection, checkpoint, metrics, comparison or rounds.", positional=True)]


class Session:
    """One command's surroundings: its watcher, its clock, and how it prints."""

    def __init__(self, flags: dict[str, bool]) -> None:
        self.json, self.quiet, self.verbose = flags["json"], flags["quiet"], flags["verbose"]
        self.watch = output.Watcher(self.quiet)
        self.began = time.time()
        session.verbose = self.verbose

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


def _predict(options: PredictOptions, flags: dict[str, bool]) -> None:
    from engine.predict import predict

    ui = Session(flags)
    _say_features("predict", options.out, predict(options, ui.watch), ui)


def _say_features(command: str, out: str, manifest: dict[str, Any], ui: Session) -> None:
    ui.result(*_features(command, out, manifest, ui))


def _features(command: str, out: str, manifest: dict[str, Any], ui: Session) -> tuple[dict[str, Any], str]:
    """Return what is told of a feature store: as facts, and as a sentence."""
    keys = ("num_rows", "num_vectors", "num_rejected", "num_labeled", "dim", "digest")
    facts = {"command": command, "out": out, "already_done": ui.is_old(manifest), **{key: manifest[key] for key in keys}}
    vectors = f"{manifest['num_vectors']:,} vectors of {manifest['dim']} floats"
    if "num_detections" in manifest:
        facts["num_detections"] = manifest["num_detections"]
        vectors = f"{manifest['num_detections']:,} boxes in {manifest['num_vectors']:,} images"
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


def _finetune(options: FinetuneOptions, flags: dict[str, bool]) -> None:
    from engine.finetune import finetune

    ui = Session(flags)
    manifest = finetune(options, ui.watch)
    done, metrics, seconds = ui.is_old(manifest), manifest["metrics"], manifest["time"]["seconds_s"]
    keys = ("steps", "epochs", "num_images", "metrics", "best")
    facts = {"command": "finetune", "out": options.out, "already_done": done, "seconds": seconds}
    trained = f"{manifest['steps']:,} steps ({manifest['epochs']:g} epochs) on {manifest['num_images']:,} images"
    ui.watch.close()
    if metrics and not ui.json:
        output.metrics_table(options.out, metrics)
    ui.result(
        {**facts, **{key: manifest[key] for key in keys}},
        f"{options.out}: {'done before, ' if done else ''}{trained}" + ("" if done else f" in {seconds:,.1f} s"),
    )


def _evaluate(options: EvaluateOptions, flags: dict[str, bool]) -> None:
    from engine.evaluate import evaluate

    ui = Session(flags)
    results = evaluate(options, ui.watch)
    ui.watch.close()
    title = options.selection or options.subject
    if ui.json:
        what = "selection" if options.selection else "checkpoint"
        output.print_json({"command": "evaluate", what: title, "metrics": results})
        return
    output.metrics_table(title, results)


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


def _curves(options: CurvesOptions, flags: dict[str, bool]) -> None:
    from engine.curves import curves

    ui = Session(flags)
    manifest = curves(options)
    if ui.json:
        facts = {key: manifest[key] for key in ("metric", "baseline", "table", "saved")}
        output.print_json({"command": "curves", "out": options.out, **facts})
        return
    output.curves_tables(manifest)
    output.say(f"{options.out}: {manifest['num_runs']} runs, picture in {options.out}/curves.html")


def _rounds(options: RoundsOptions, flags: dict[str, bool]) -> None:
    from engine.oracles import Waiting
    from engine.rounds import rounds

    ui = Session(flags)
    found = rounds(options, ui.watch)
    if isinstance(found, Waiting):
        place, count = found.place.uri, found.num_images
        facts = {"command": "rounds", "out": options.out, "state": "waiting", "round": found.number, "num_images": count}
        ui.result(
            {**facts, "folder": place},
            f"{count:,} images await labels ({place}/to_label.csv): put labels.csv (id,label) or COCO labels.json into {place} "
            "and run the same command again",
        )
        raise typer.Exit(WAITING)
    done, table = ui.is_old(found), found["table"]
    keys = ("strategy", "seed", "rounds", "criterion", "table")
    ui.watch.close()
    if not ui.json:
        output.rounds_table(options.out, found["criterion"], table)
    ui.result(
        {"command": "rounds", "out": options.out, "already_done": done, **{key: found[key] for key in keys}},
        f"{options.out}: {'done before, ' if done else ''}{found['rounds']} rounds by {found['strategy']}, "
        f"{table[-1]['labeled']:,} labels",
    )


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


VERBS: dict[str, tuple[type[Any], Any]] = {
    "embed": (EmbedOptions, _embed),
    "import": (ImportOptions, _import),
    "dedup": (DedupOptions, _dedup),
    "select": (SelectOptions, _select),
    "finetune": (FinetuneOptions, _finetune),
    "predict": (PredictOptions, _predict),
    "evaluate": (EvaluateOptions, _evaluate),
    "compare": (CompareOptions, _compare),
    "curves": (CurvesOptions, _curves),
    "rounds": (RoundsOptions, _rounds),
    "info": (InfoOptions, _info),
    "verify": (VerifyOptions, _verify),
    "strategies": (no_options(), listings.strategies),
    "encoders": (no_options(), listings.encoders),
    "recipes": (no_options(), listings.recipes),
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
