"""YAML as a person means it: every plain word stays the text that it is, but for null; nothing is given twice.

YAML 1.1 makes 138 of `2:64` and false of `no`. On the command line options are texts, too, and what they mean is for the
options to say.
"""

from __future__ import annotations

import yaml
from pydantic import JsonValue

from engine.schema import InputError

STANDARD = "tag:yaml.org,2002:"
KINDS = ("str", "int", "float", "bool", "null", "timestamp", "merge", "value", "seq", "map")
"""What YAML takes a plain word for; any other tag was written into the file, and asks for some Python object."""
NULLS = ("", "~", "null", "Null", "NULL")


def parse_yaml(text: str, name: str) -> JsonValue:
    """Return the texts, lists, mappings and nulls of one YAML document; `name` is the file's, for errors.

    Raises InputError with line and column where it is no YAML, a key is no text or given twice, or a tag is used.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise _at(name, error.problem_mark or error.context_mark, error.problem or str(error)) from error
    except yaml.YAMLError as error:
        raise InputError(f"{name}: {error}") from error
    return None if node is None else _value(node, name, ())


def _at(name: str, mark: yaml.Mark | None, problem: str) -> InputError:
    where = name if mark is None else f"{name}, line {mark.line + 1}, column {mark.column + 1}"
    return InputError(f"{where}: {problem}")


def _value(node: yaml.Node, name: str, above: tuple[yaml.Node, ...]) -> JsonValue:
    """Return what a node holds; `above` are the nodes around it."""
    if any(node is other for other in above):
        raise _at(name, node.start_mark, "an alias to what it is part of")
    if node.tag.removeprefix(STANDARD) not in KINDS:
        raise _at(name, node.start_mark, f"tag {node.tag.replace(STANDARD, '!!')!r}: leave tags out")
    around = (*above, node)
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in NULLS else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, name, around) for item in node.value]
    found: dict[str, JsonValue] = {}
    merged: dict[str, JsonValue] = {}
    for key_node, item in node.value:
        if key_node.tag == f"{STANDARD}merge":
            merged |= _merged(item, name, around)
            continue
        key = _value(key_node, name, around)
        if not isinstance(key, str):
            raise _at(name, key_node.start_mark, "a key must be a word")
        if key in found:
            raise _at(name, key_node.start_mark, f"{key!r} is given twice")
        found[key] = _value(item, name, around)
    return {**merged, **found}


def _merged(node: yaml.Node, name: str, around: tuple[yaml.Node, ...]) -> dict[str, JsonValue]:
    """Return what `<<` brings into a mapping: another one's keys."""
    value = _value(node, name, around)
    if not isinstance(value, dict):
        raise _at(name, node.start_mark, "<< takes keys and values, as *anchor gives them")
    return value


def to_yaml(value: JsonValue) -> str:
    """Return a value as YAML that `parse_yaml` reads the same."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    return text
