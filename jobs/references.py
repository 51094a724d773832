"""References in a job file: what $name stands for where it is written, and how values become options.

`$name` is a step's folder, a loop's variable, `pool`, `out`, `seed` or `data.NAME`; `${name}` the same beside other text, `$$`
a dollar. In a loop a step's name is the folder of the same pass: of the pass that has the same value of every variable that
both know. Where several passes do, an option that takes several texts gets all of them.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from engine.places import Place
from engine.schema import Field, nearest


class _Template(string.Template):
    idpattern = r"(?:data\.)?[a-zA-Z][a-zA-Z0-9_]*(?:-[a-zA-Z0-9_]+)*"
    braceidpattern = r"(?:data\.)?[a-zA-Z][a-zA-Z0-9_-]*"


class BadValueError(Exception):
    """What is wrong with one value of a job file; the text goes on after the path of its key."""


@dataclass(frozen=True)
class Folder:
    """What one pass of a step writes."""

    label: str
    out: str
    variables: Mapping[str, str]


@dataclass(frozen=True)
class Scope:
    """What a reference may name: values, and the passes of the steps above; `variables` are those of the loops around."""

    values: Mapping[str, JsonValue]
    variables: Mapping[str, str]
    folders: Mapping[str, list[Folder]]


def resolved(value: JsonValue, scope: Scope, reads: set[str], many: bool) -> JsonValue:
    """Return a value with its references put in; raises BadValueError for one that there is not.

    `reads` gets the labels of the steps that are named. A value that is one reference and no more keeps its kind; with `many`
    it may become a list, within a list as further items.
    """
    if isinstance(value, list):
        found: list[JsonValue] = []
        for item in value:
            one = resolved(item, scope, reads, many)
            found.extend(one if isinstance(one, list) and isinstance(item, str) else [one])
        return found
    if isinstance(value, dict):
        return {key: resolved(item, scope, reads, many) for key, item in value.items()}
    if not isinstance(value, str) or "$" not in value:
        return value
    template = _Template(value)
    if not template.is_valid():
        raise BadValueError(f" is {value!r}: a reference is $name or ${{name}}; write $$ for a $")
    known = {name: _named(name, value, scope, reads) for name in template.get_identifiers()}
    first, rest = _leading(value, known)
    if first is not None and not rest and (many or first in scope.values or not isinstance(known[first], list)):
        return known[first]
    for name, one in known.items():
        if isinstance(one, (list, dict)):
            raise BadValueError(f" is {value!r}: {name} stands for {len(one)} values here, and this takes one")
    texts = {name: str(one) for name, one in known.items()}
    if first is not None and rest.startswith("/") and "$" not in rest:
        return Place(texts[first]).address_of(*rest.strip("/").split("/"))
    return template.substitute(texts)


def _leading(value: str, known: Mapping[str, JsonValue]) -> tuple[str | None, str]:
    """Return the name of the reference that a text begins with, and the rest; None where it begins otherwise."""
    found = _Template.pattern.match(value)
    name = found and (found["named"] or found["braced"])
    return (name, value[found.end() :]) if found and name in known else (None, value)


def _named(name: str, value: str, scope: Scope, reads: set[str]) -> JsonValue:
    """Return what a name stands for: a value, or a step's folder, or the folders of its passes."""
    if name in scope.values:
        return scope.values[name]
    shared = [
        folder
        for folder in scope.folders.get(name, ())
        if all(scope.variables.get(variable, mine) == mine for variable, mine in folder.variables.items())
    ]
    if not shared:
        names = [*scope.values, *scope.folders]
        raise BadValueError(
            f" is {value!r}, and there is no {name!r} above it{nearest(name, names)} (one of: {', '.join(names)})"
        )
    reads.update(folder.label for folder in shared)
    return shared[0].out if len(shared) == 1 else [folder.out for folder in shared]


def takes_many(option: Field) -> bool:
    """Return whether an option takes several values."""
    return "tuple" in str(option.type)


def as_option(option: Field, value: JsonValue) -> Any:
    """Return a value as the command line would have it: NAME: VALUE as NAME=VALUE, a list for one text with commas.

    Raises BadValueError for keys and values where an option has none.
    """
    if isinstance(value, dict):
        if not (option.opt.repeat and "=" in (option.opt.metavar or "")):
            raise BadValueError(" takes no keys and values")
        return [f"{name}={_joined(item)}" for name, item in value.items()]
    if isinstance(value, list) and not takes_many(option):
        return _joined(value)
    return [value] if option.opt.repeat and not isinstance(value, list) else value


def _joined(value: JsonValue) -> str:
    if isinstance(value, dict):
        raise BadValueError(" takes no keys and values below a name")
    return ",".join(str(item) for item in value) if isinstance(value, list) else str(value)
