"""What each verb's result is told as: facts for --json, a sentence and tables for a person."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cli import output
from cli.conditions import condition_lines

IsOld = Callable[[dict[str, Any]], bool]
"""Whether a manifest was published before the command began."""


@dataclass(frozen=True)
class Told:
    """One result: facts, a sentence (empty where tables say it all), what prints its tables, and whether it awaits labels."""

    facts: dict[str, Any]
    sentence: str
    tables: Callable[[], None] | None = None
    waits: bool = False


def _before(done: bool) -> str:
    return "done before, " if done else ""


def _embed(options: Any, manifests: list[dict[str, Any]], is_old: IsOld) -> Told:
    if len(manifests) == 1:
        return _features("embed", options.out, manifests[0], is_old)
    told = [_features("embed", f"{options.out}/{found['encoder']['name']}", found, is_old) for found in manifests]
    return Told({"command": "embed", "stores": [one.facts for one in told]}, "\n".join(one.sentence for one in told))


def _import(options: Any, manifest: dict[str, Any], is_old: IsOld) -> Told:
    return _features("import", options.out, manifest, is_old)


def _predict(options: Any, manifest: dict[str, Any], is_old: IsOld) -> Told:
    return _features("predict", options.out, manifest, is_old)


def _features(command: str, out: str, manifest: dict[str, Any], is_old: IsOld) -> Told:
    """Return what is told of a feature store."""
    keys = ("num_rows", "num_vectors", "num_rejected", "num_labeled", "dim", "digest")
    done = is_old(manifest)
    facts = {"command": command, "out": out, "already_done": done, **{key: manifest[key] for key in keys}}
    vectors = f"{manifest['num_vectors']:,} vectors of {manifest['dim']} floats"
    if "num_detections" in manifest:
        facts["num_detections"] = manifest["num_detections"]
        vectors = f"{manifest['num_detections']:,} boxes in {manifest['num_vectors']:,} images"
    rejected = f", {manifest['num_rejected']} images rejected (see {out}/rejected.parquet)" if manifest["num_rejected"] else ""
    timing = manifest.get("time", {})
    if timing:
        facts["seconds"], facts["rows_per_s"] = timing["seconds_s"], timing["rows_per_s"]
    if "num_reused" in timing:
        facts["num_reused"] = timing["num_reused"]
        vectors += f", {timing['num_reused']:,} of them from earlier features"
    spent = f" in {timing['seconds_s']:.1f} s ({timing['rows_per_s']:,.1f} images/s)" if timing and not done else ""
    return Told(facts, f"{out}: {_before(done)}{vectors}{rejected}{spent}")


def _select(options: Any, manifests: list[dict[str, Any]], is_old: IsOld) -> Told:
    folders = [
        {
            "out": f"{options.out}/{manifest['num_picks']}" if len(manifests) > 1 else options.out,
            "num_picks": manifest["num_picks"],
            "digest": manifest["digest"],
            "seconds": manifest["time"]["seconds_s"],
            "already_done": is_old(manifest),
            **({"constraints": manifest["constraints"]} if "constraints" in manifest else {}),
        }
        for manifest in manifests
    ]
    lines = []
    for f, manifest in zip(folders, manifests, strict=True):
        head = f"{f['out']}: {_before(f['already_done'])}{f['num_picks']:,} picks by {options.strategy}"
        lines += [head + ("" if f["already_done"] else f" in {f['seconds']:.1f} s"), *condition_lines(manifest)]
    return Told({"command": "select", "strategy": options.strategy, "selections": folders}, "\n".join(lines))


def _dedup(options: Any, manifest: dict[str, Any], is_old: IsOld) -> Told:
    keys = ("by", "against", "num_vectors", "num_clusters", "num_excluded", "num_kept", "digest")
    done, seconds = is_old(manifest), manifest["time"]["seconds_s"]
    facts = {"command": "dedup", "out": options.out, "already_done": done, "seconds": seconds}
    which = f"have a copy in {manifest['against']}" if options.against else "are copies of others that are kept"
    found = f"{manifest['num_excluded']:,} of {manifest['num_vectors']:,} images {which}"
    spent = "" if done else f" ({seconds:.1f} s)"
    return Told(
        {**facts, **{key: manifest[key] for key in keys if key in manifest}}, f"{options.out}: {_before(done)}{found}{spent}"
    )


def _assess(options: Any, facts: dict[str, Any], is_old: IsOld) -> Told:
    keys = ("num_picks", "num_labeled", "figures", "curve", "knee", "histogram", "warnings", "sample")
    sample, bend = facts["sample"], facts["knee"]
    said = [f"distances measured on a sample of {sample:,} vectors"] if sample else []
    if bend is not None:
        said.append(f"the curve bends most at {bend:,} of {facts['num_picks']:,} picks: later ones add less")
    said += [f"warning: {text}" for text in facts["warnings"]] or ["no worse than random picks on any figure"]
    return Told(
        {"command": "assess", "selection": options.selection, **{key: facts[key] for key in keys}},
        "\n".join(said),
        partial(output.assessment_tables, options.selection, facts),
    )


def _finetune(options: Any, manifest: dict[str, Any], is_old: IsOld) -> Told:
    done, metrics, seconds = is_old(manifest), manifest["metrics"], manifest["time"]["seconds_s"]
    keys = ("steps", "epochs", "num_images", "metrics", "best")
    facts = {"command": "finetune", "out": options.out, "already_done": done, "seconds": seconds}
    trained = f"{manifest['steps']:,} steps ({manifest['epochs']:g} epochs) on {manifest['num_images']:,} images"
    return Told(
        {**facts, **{key: manifest[key] for key in keys}},
        f"{options.out}: {_before(done)}{trained}" + ("" if done else f" in {seconds:,.1f} s"),
        partial(output.metrics_table, options.out, metrics) if metrics else None,
    )


def _evaluate(options: Any, metrics: list[dict[str, Any]], is_old: IsOld) -> Told:
    title = options.selection or options.subject
    what = "selection" if options.selection else "checkpoint"
    facts = {"command": "evaluate", what: title, "metrics": metrics}
    return Told(facts, "", partial(output.metrics_table, title, metrics))


def _compare(options: Any, manifest: dict[str, Any], is_old: IsOld) -> Told:
    return _comparison("compare", options.out, manifest, is_old)


def _demo(options: Any, manifest: dict[str, Any], is_old: IsOld) -> Told:
    return _comparison("demo", options.out, manifest, is_old)


def _comparison(command: str, out: str, manifest: dict[str, Any], is_old: IsOld) -> Told:
    return Told(
        {"command": command, "out": out, "table": manifest["table"]},
        f"{out}: {manifest['num_cells']} selections compared{' (done before)' if is_old(manifest) else ''}",
        partial(output.comparison_tables, manifest["table"]),
    )


def _curves(options: Any, manifest: dict[str, Any], is_old: IsOld) -> Told:
    facts = {key: manifest[key] for key in ("metric", "baseline", "table", "saved")}
    sentence = f"{options.out}: {manifest['num_runs']} runs, picture in {options.out}/curves.html"
    return Told({"command": "curves", "out": options.out, **facts}, sentence, partial(output.curves_tables, manifest))


def _rounds(options: Any, found: Any, is_old: IsOld) -> Told:
    from engine.oracles import Waiting

    if isinstance(found, Waiting):
        place, count = found.place.uri, found.num_images
        facts = {"command": "rounds", "out": options.out, "state": "waiting", "round": found.number, "num_images": count}
        return Told(
            {**facts, "folder": place},
            f"{count:,} images await labels ({place}/to_label.csv): put labels.csv (id,label) or COCO labels.json into {place} "
            "and run the same command again",
            waits=True,
        )
    done, table = is_old(found), found["table"]
    keys = ("strategy", "seed", "rounds", "criterion", "table")
    return Told(
        {"command": "rounds", "out": options.out, "already_done": done, **{key: found[key] for key in keys}},
        f"{options.out}: {_before(done)}{found['rounds']} rounds by {found['strategy']}, {table[-1]['labeled']:,} labels",
        partial(output.rounds_table, options.out, found["criterion"], table),
    )


RESULTS: dict[str, Callable[[Any, Any, IsOld], Told]] = {
    "embed": _embed,
    "import": _import,
    "dedup": _dedup,
    "select": _select,
    "assess": _assess,
    "finetune": _finetune,
    "predict": _predict,
    "evaluate": _evaluate,
    "compare": _compare,
    "curves": _curves,
    "rounds": _rounds,
    "demo": _demo,
}
"""By verb of engine.verbs.VERBS: called with its options, what its function returned, and what is old."""
