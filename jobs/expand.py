"""The job file -> the steps that are run: loops unrolled, references put in, options checked as the command line's are."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import JsonValue

from engine.places import Place
from engine.schema import Field, InputError, build_options, check_option, fields_of, nearest
from engine.verbs import VERBS
from jobs.jobfile import Entry, JobFile
from jobs.references import BadValueError, Folder, Scope, as_option, resolved, takes_many
from jobs.step import Step, label_of

RESOURCES = (
    "workers",
    "embed_workers",
    "decode_workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "memory_per_shard",
    "device",
    "loaders",
    "max_failures",
)
"""What `resources` may give to every step that has such an option."""
TRAINERS = ("finetune", "rounds")
"""Verbs whose `workers` decide what comes out: only their own step says how many."""
OURS = {"out": "a step's folder is OUT/<its name>: name it with `as`", "address": "give --address to the command"}
"""Options that no step gives."""
RESERVED = ("pool", "out", "seed", "data")
KEYS: dict[str, tuple[str, ...]] = {
    "select": (),
    "finetune": (),
    "evaluate": (),
    "compare": ("strategy", "budget"),
    "rounds": ("round", "labeled"),
    "curves": ("strategy", "labeled"),
}
"""Verbs that have metrics, and by what, beside the loops' variables, their figures are told apart."""
SHOWN_PROBLEMS = 8


@dataclass
class _Made:
    """What was expanded so far."""

    address: str | None
    steps: list[Step] = field(default_factory=list)
    folders: dict[str, list[Folder]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)


def expand(file: JobFile, address: str | None = None) -> list[Step]:
    """Return every step of a job, in order; each that takes an address gets the one given.

    Raises InputError that lists all that is wrong, by the path of its key.
    """
    made = _Made(address)
    scope = _globals(file, made)
    _check_resources(file, made)
    _check_names(file, made)
    if not made.problems:
        _expand(file.steps, "steps", file, scope, made)
        _check_tables(file, made)
    if made.problems:
        found = list(dict.fromkeys(made.problems))
        more = f"; and {len(found) - SHOWN_PROBLEMS} more" if len(found) > SHOWN_PROBLEMS else ""
        raise InputError(f"job {file.name}: {'; '.join(found[:SHOWN_PROBLEMS])}{more}")
    return made.steps


def _globals(file: JobFile, made: _Made) -> Scope:
    """Return the scope outside of every loop; data may name pool, out, seed, and data above it."""
    values: dict[str, JsonValue] = {"out": file.out, "seed": str(file.seed)}
    if file.pool is not None:
        values["pool"] = file.pool
    for name, value in file.data.items():
        try:
            values[f"data.{name}"] = resolved(value, Scope(values, {}, {}), set(), many=False)
        except BadValueError as bad:
            made.problems.append(f"data.{name}{bad}")
    return Scope(values, {}, made.folders)


def _check_resources(file: JobFile, made: _Made) -> None:
    for name in file.resources:
        key = name.replace("-", "_")
        if key not in RESOURCES:
            made.problems.append(f"unknown key resources.{name}{nearest(key, RESOURCES)} (one of: {', '.join(RESOURCES)})")


def _check_names(file: JobFile, made: _Made) -> None:
    """Note names that stand for two things: steps, the variables of loops, and what every job has."""
    steps: dict[str, str] = {}
    variables: set[str] = set()

    def walk(entries: Iterable[Entry], path: str, around: frozenset[str]) -> None:
        for index, entry in enumerate(entries):
            here = f"{path}[{index}]"
            if entry.loop is not None:
                inside = set(around)
                for path_of, name in _names_of(entry.loop):
                    if name in inside or name in ("out", "data"):
                        made.problems.append(f"{here}.for.{path_of}: the name is taken: call it something else")
                    inside.add(name)
                variables.update(inside)
                walk(entry.steps or (), f"{here}.steps", frozenset(inside))
            elif entry.called in steps:
                twice = f"{steps[entry.called]} and {here} are both called {entry.called!r}"
                made.problems.append(f"{twice}: give one a name of its own, `as: NAME`")
            else:
                steps[entry.called] = here

    walk(file.steps, "steps", frozenset())
    for name, here in steps.items():
        if name in variables or name in RESERVED:
            made.problems.append(f"{here} is called {name!r}, as something else is: give it another name, `as: NAME`")


def _names_of(loop: Mapping[str, Mapping[str, Mapping[str, JsonValue]]]) -> Iterator[tuple[str, str]]:
    """Yield the path and name of every variable of a loop, and of what its values bring along."""
    for variable, values in loop.items():
        yield variable, variable
        first, brought = next(iter(values.items()))
        for name in brought:
            yield f"{variable}.{first}.{name}", name


def _expand(entries: Iterable[Entry], path: str, file: JobFile, scope: Scope, made: _Made) -> None:
    for index, entry in enumerate(entries):
        here = f"{path}[{index}]"
        if entry.loop is None:
            _add(entry, f"{here}.{entry.verb}", file, scope, made)
            continue
        for chosen in itertools.product(*(values.items() for values in entry.loop.values())):
            inner = {variable: value for variable, (value, _) in zip(entry.loop, chosen, strict=True)}
            brought = {name: value for _, more in chosen for name, value in more.items()}
            within = replace(scope, values={**scope.values, **inner, **brought}, variables={**scope.variables, **inner})
            _expand(entry.steps or (), f"{here}.steps", file, within, made)


def _add(entry: Entry, path: str, file: JobFile, scope: Scope, made: _Made) -> None:
    """Expand one step in one pass; what is wrong with it is noted, and its folder known all the same."""
    label = label_of(entry.called, scope.variables)
    out = Place(file.out).address_of(*label.split("/"))
    before = len(made.problems)
    if label in made.taken:
        made.problems.append(f"{path}: two passes would write {label}: their values look the same in a folder's name")
    declared = {option.name: option for option in fields_of(VERBS[entry.verb].options)}
    values, reads = _values(entry, path, file, scope, declared, made)
    values |= {"out": out} | ({"address": made.address} if made.address and "address" in declared else {})
    missing = [name for name, option in declared.items() if option.required and name not in values]
    if missing and len(made.problems) == before:
        made.problems.append(f"{path} needs {', '.join(missing)}" + (" (the job has no pool)" if "pool" in missing else ""))
    made.taken.add(label)
    made.folders.setdefault(entry.called, []).append(Folder(label, out, scope.variables))
    if len(made.problems) == before:
        options = build_options(VERBS[entry.verb].options, values, path)
        variables = dict(scope.variables)
        made.steps.append(Step(entry.called, entry.verb, options, out, path, variables, tuple(values), tuple(sorted(reads))))


def _values(
    entry: Entry, path: str, file: JobFile, scope: Scope, declared: Mapping[str, Field], made: _Made
) -> tuple[dict[str, Any], set[str]]:
    """Return a step's options, each checked, and the labels of the steps that they name."""
    values: dict[str, Any] = {}
    reads: set[str] = set()
    for key, option, raw in _given(entry, path, file, scope, declared, made):
        try:
            value = resolved(raw, scope, reads, takes_many(option))
            if value is not None:
                values[option.name] = check_option(option, as_option(option, value))
        except BadValueError as bad:
            made.problems.append(f"{key}{bad}")
        except InputError as error:
            made.problems.append(f"{key}: {error}")
    return values, reads


def _given(
    entry: Entry, path: str, file: JobFile, scope: Scope, declared: Mapping[str, Field], made: _Made
) -> Iterator[tuple[str, Field, JsonValue]]:
    """Yield the path, option and value of what a step is given: by itself, then what the job gives to all."""
    own: set[str] = set()
    for name, value in entry.options.items():
        key = name.replace("-", "_")
        if key in OURS:
            made.problems.append(f"{path}.{name}: {OURS[key]}")
        elif key not in declared:
            allowed = [each for each in declared if each not in OURS]
            made.problems.append(f"unknown key {path}.{name}{nearest(key, allowed)} (options: {', '.join(allowed)})")
        elif key in own:
            made.problems.append(f"{path}.{name} is given twice, with dashes and underscores")
        else:
            own.add(key)
            if value is not None:
                yield f"{path}.{name}", declared[key], value
    for key in ("pool", "seed"):
        if key in declared and key not in own and key in scope.values:
            yield key, declared[key], scope.values[key]
    for name, value in file.resources.items():
        key = name.replace("-", "_")
        if key in declared and key not in own and value is not None and _is_for(entry.verb, declared[key], value):
            yield f"resources.{name}", declared[key], value


def _is_for(verb: str, option: Field, value: JsonValue) -> bool:
    """Return whether a resource goes to a verb: MIN:MAX workers only where their number may change meanwhile."""
    if option.name != "workers":
        return True
    return verb not in TRAINERS and (str in typing.get_args(option.type) or ":" not in str(value))


def _check_tables(file: JobFile, made: _Made) -> None:
    """Note tables that name steps or variables that there are not."""
    steps = {step.name: step for step in made.steps}
    for index, table in enumerate(file.all_tables if not made.problems else ()):
        at = "table" if table is file.table else f"tables[{index - (file.table is not None)}]"
        for name in table.steps:
            if name not in steps:
                made.problems.append(f"{at}.step is {name!r}{nearest(name, steps)} (steps: {', '.join(steps)})")
                continue
            step = steps[name]
            if step.verb not in KEYS:
                made.problems.append(f"{at}.step is {name!r}, and {step.verb} has no metrics ({', '.join(KEYS)} have)")
                continue
            known = [*step.variables, *KEYS[step.verb]]
            used = [("rows", table.rows), ("columns", table.columns), *(("only", variable) for variable in table.only)]
            for key, variable in used:
                if variable is not None and variable not in known:
                    near = nearest(variable, known)
                    made.problems.append(f"{at}.{key} is {variable!r}{near} (one of those of {name}: {', '.join(known)})")
