"""Metadata that comes as JSON beside an image: the columns that the objects of a whole pool make up."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from engine.places import Place
from engine.schema import InputError
from engine.sources.roles import RESERVED

TEXT = "txt"
"""The column of the text beside an image."""
KINDS: dict[type, pa.DataType] = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
INT64 = 1 << 63


class Tags:
    """Finds the columns of a pool, sample by sample: a key's type is the narrowest that all its values have."""

    def __init__(self, wanted: tuple[str, ...], uri: str) -> None:
        self.wanted, self.uri = wanted, uri
        self._kinds: dict[str, set[type]] = {}

    def add(self, sample: dict[str, Any], shard: Place) -> dict[str, Any]:
        """Take note of one sample; return what its JSON says, {} without any."""
        if sample.get(TEXT) is not None:
            self._kinds.setdefault(TEXT, set()).add(str)
        if not sample.get("json"):
            return {}
        try:
            said = json.loads(sample["json"])
        except json.JSONDecodeError as error:
            raise InputError(f"{shard.uri}: the JSON of {sample['key']!r} cannot be read: {error}") from error
        if not isinstance(said, dict):
            raise InputError(f"{shard.uri}: the JSON of {sample['key']!r} is no object of names and values")
        for name, value in said.items():
            kinds = self._kinds.setdefault(name, set())
            if value is not None:
                kinds.add(str if isinstance(value, int) and not -INT64 <= value < INT64 else type(value))
        return said

    def schema(self, label: str) -> tuple[pa.Schema, dict[str, str]]:
        """Return the columns, sorted by name, and those that don't pass through, each with the reason."""
        for name in self.wanted:
            if name not in self._kinds:
                known = ", ".join(sorted(self._kinds))
                raise InputError(f"{self.uri} has no metadata {name!r} (it has: {known}): see --metadata-column")
        fields: list[pa.Field] = []
        left_out: dict[str, str] = {}
        for name in sorted(self.wanted or self._kinds):
            kinds = self._kinds[name]
            if name in RESERVED and name != label:
                left_out[name] = "the features have a column of that name"
            elif kinds & {list, dict}:
                left_out[name] = "it is a list or an object"
            elif name not in (label, *RESERVED):
                fields.append(pa.field(name, _narrowest(kinds)))
        for name in left_out if self.wanted else ():
            raise InputError(f"{self.uri}: --metadata-column {name!r} cannot pass through: {left_out[name]}")
        return pa.schema(fields), left_out


def _narrowest(kinds: set[type]) -> pa.DataType:
    if len(kinds) == 1:
        return KINDS[next(iter(kinds))]
    return pa.float64() if kinds == {int, float} else pa.string()


def values_of(entry: dict[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """Return the columns of one row of a listing; what is of several types over the pool is text."""
    if not schema.names:
        return {}
    said = {TEXT: entry[TEXT], **(json.loads(entry["json"]) if entry["json"] else {})}
    values = {}
    for column in schema:
        value = said.get(column.name)
        as_text = value is not None and column.type == pa.string() and not isinstance(value, str)
        values[column.name] = json.dumps(value) if as_text else value
    return values
