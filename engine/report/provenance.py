"""Where what a report shows is from: inputs by digest, options, versions, times, and the commands that make it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from engine.masks import masked
from engine.page import when
from engine.report.subjects import Subject
from engine.schema import fields_of
from engine.select import STRATEGIES
from engine.store import FeatureStore
from engine.verbs import EmbedOptions, ImportOptions, SelectOptions

Fact = tuple[str, str]


@dataclass(frozen=True)
class Origin:
    """One folder: its facts, inputs by digest, options, versions, and the command that makes it, with what that lacks."""

    title: str
    facts: list[Fact]
    inputs: list[Fact]
    options: list[Fact]
    versions: list[Fact]
    command: str
    note: str


def text_of(value: Any) -> str:
    """Return an option's value as the command line takes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(text_of(item) for item in value)
    return "true" if value is True else "false" if value is False else str(value)


def command_of(verb: str, options: type[Any], given: dict[str, Any]) -> str:
    """Return the command line of a verb with the values that are not its defaults, without keys."""
    words, flags = list[str](), list[str]()
    for field in fields_of(options):
        value = given.get(field.name)
        if value is None or (not field.required and (value == field.default or (value == [] and field.default == ()))):
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.opt.positional:
            words += [text_of(item) for item in value] if field.opt.repeat else [text_of(value)]
        elif isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif field.opt.repeat:
            flags += [word for item in value for word in (flag, text_of(item))]
        else:
            flags += [flag, text_of(value)]
    return shlex.join(masked(word) for word in ("coresift", verb, *words, *flags))


def _flat(value: Any, prefix: str = "") -> list[Fact]:
    """Return nested facts as lines: a.b."""
    if isinstance(value, dict):
        return [line for key, item in value.items() for line in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [] if value in (None, [], {}) else [(prefix, text_of(value))]


def _origin(title: str, manifest: dict[str, Any], facts: list[Fact], command: str, note: str) -> Origin:
    spent = (manifest.get("time") or {}).get("seconds_s")
    times = [("published", when(manifest["published"])), *([("seconds", text_of(spent))] if spent is not None else [])]
    digest = [("digest", str(manifest["digest"]))] if "digest" in manifest else []
    return Origin(
        title,
        [*facts, *times],
        [*_flat(manifest["inputs"]), *((f"its own {name}", value) for name, value in digest)],
        _flat(manifest["options"]),
        _flat(manifest["versions"]),
        command,
        note,
    )


def of_selection(subject: Subject, features: str) -> Origin:
    """Return where a selection is from; its command has those options that are not the strategy's own defaults."""
    manifest, options = subject.selection.manifest, subject.selection.manifest["options"]
    strategy, lacks = STRATEGIES.get(options["strategy"]), list[str]()
    defaults = {field.name: field.default for field in fields_of(strategy.load()[1])} if strategy else {}
    own = {name: value for name, value in options.get("options", {}).items() if value is not None}
    given = {
        "features": features,
        "strategy": options["strategy"],
        "budget": str(options["count"]),
        "seed": options["seed"],
        "normalize": options["normalize"],
        "option": [f"{name}={text_of(value)}" for name, value in own.items() if value != _listed(defaults.get(name))],
        "out": subject.uri,
    }
    if len(subject.selection.labeled):
        given |= {"labeled": f"{subject.uri}/labeled.json", "out": f"{subject.uri}-again"}
        lacks.append("What was labelled before is read from the folder itself, so --out is another.")
    if manifest.get("num_excluded"):
        given["exclude"] = "EXCLUDED"
        lacks.append(f"EXCLUDED stands for the {manifest['num_excluded']:,} images left out, of which only the digest is kept.")
    if manifest["inputs"].get("predictions"):
        given["predictions"] = "PREDICTIONS"
        lacks.append("PREDICTIONS stands for the predictions with the digest above.")
    known = {"strategy", "options", "seed", "count", "normalize"}
    if set(options) - known:
        lacks.append(f"The options {', '.join(sorted(set(options) - known))} are to be added as they stand above.")
    facts = [("strategy", str(options["strategy"])), ("seed", str(options["seed"])), ("picks", f"{len(subject.rows):,}")]
    facts += [("labelled before", f"{len(subject.selection.labeled):,}")]
    if manifest.get("objective") is not None:
        facts.append(("objective", f"{manifest['objective']:.6g}"))
    command = command_of("select", SelectOptions, given)
    return _origin(subject.name, manifest, [("folder", subject.uri), *facts], command, " ".join(lacks))


def _listed(value: Any) -> Any:
    """Return an option's default as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def of_features(store: FeatureStore) -> Origin:
    """Return where a feature store is from."""
    manifest, pool = store.manifest, store.manifest.get("pool") or {}
    encoder = manifest.get("encoder") or {}
    options = dict(manifest["options"])
    note = ""
    facts = [
        ("folder", store.place.uri),
        ("images", f"{store.num_rows:,}"),
        ("vectors", f"{store.num_vectors:,} of {store.dim}"),
    ]
    if "encoder" in options:
        options["weights"] = encoder.get("weights", options.get("weights"))
        if "checkpoint" in manifest["inputs"]:
            options |= {"checkpoint": "CHECKPOINT", "weights": None, "backbone": None}
            note = "CHECKPOINT stands for the trained model with the digest above."
        command = command_of("embed", EmbedOptions, {**options, "pool": pool.get("uri", "POOL"), "out": store.place.uri})
    else:
        command = command_of("import", ImportOptions, {**options, "file": "FILE", "out": store.place.uri})
        note = "FILE stands for the file of vectors that was imported."
    facts += [("pool", str(pool["uri"]))] if "uri" in pool else []
    return _origin("features", manifest, facts, command, note)
