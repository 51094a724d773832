"""Which column of a table is what: image, label, id, boxes, metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engine.schema import InputError
from engine.sources.pool import Columns
from engine.store import TAKEN

BYTES_COLUMNS = ("image", "img")
PATH_COLUMNS = ("uri", "path", "file_name", "image", "image_path", "url", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
OBJECTS = "objects"
"""The column of boxes in the Hugging Face convention."""
CATEGORY_FIELDS = ("category", "categories", "category_id", "label", "labels")
RESERVED = TAKEN | {"uri", "boxes"}
"""Columns that a listing or a feature store has of its own: metadata of these names does not pass through."""


@dataclass(frozen=True)
class Roles:
    """The columns of a table by what they are for. `paths` says that the image column holds paths, not bytes.

    `left_out` names the columns that do not pass through as metadata, and why.
    """

    image: str
    paths: bool
    label: str | None
    id: str | None
    objects: str | None
    metadata: pa.Schema
    left_out: dict[str, str] = field(default_factory=dict)


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is one of strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def plain(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column's values, whether they are kept in a dictionary or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0 or kind.get_field_index("path") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _passes(kind: pa.DataType) -> bool:
    """Return whether a column of this type passes through: scalars, and lists of scalars."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return bool(is_text(kind) or pa.types.is_primitive(kind) or pa.types.is_decimal(kind))


def _image(schema: pa.Schema, named: str | None, uri: str) -> tuple[str, bool]:
    """Return (image column, whether it holds paths)."""
    kinds = {f.name: plain(f.type) for f in schema}
    if named is not None:
        kind = kinds[named]
        if not _holds_bytes(kind) and not is_text(kind):
            raise InputError(f"{uri}: image column {named!r} is {kind}; images are bytes, paths, or a struct of both")
        return named, is_text(kind)
    structs = [name for name, kind in kinds.items() if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
    for name in (*BYTES_COLUMNS, *(structs if len(structs) == 1 else ())):
        if name in kinds and _holds_bytes(kinds[name]):
            return name, False
    for name in PATH_COLUMNS:
        if name in kinds and is_text(kinds[name]):
            return name, True
    raise InputError(f"{uri} has no image column (its columns: {', '.join(schema.names)}): name it with --image-column")


def _label(schema: pa.Schema, named: str | None, uri: str) -> str | None:
    kinds = {f.name: plain(f.type) for f in schema}
    if named is None:
        fit = [n for n in LABEL_COLUMNS if n in kinds and (is_text(kinds[n]) or pa.types.is_integer(kinds[n]))]
        return fit[0] if fit else None
    if not is_text(kinds[named]) and not pa.types.is_integer(kinds[named]):
        raise InputError(f"{uri}: label column {named!r} is {kinds[named]}; labels are integers or strings")
    return named


def _metadata(
    schema: pa.Schema, named: tuple[str, ...], used: set[str | None], uri: str
) -> tuple[list[pa.Field], dict[str, str]]:
    """Return the columns that pass through, and those left out, each with the reason."""
    kept, left_out = [], {}
    for name in named or [name for name in schema.names if name not in used]:
        kind = plain(schema.field(name).type)
        reason = "the features have a column of that name" if name in RESERVED else None
        if reason is None and not _passes(kind):
            reason = f"{kind} is neither a scalar nor a list of scalars"
        if reason is None:
            kept.append(pa.field(name, kind))
        elif named:
            raise InputError(f"{uri}: --metadata-column {name!r} cannot pass through: {reason}")
        else:
            left_out[name] = reason
    return kept, left_out


def find_roles(schema: pa.Schema, columns: Columns, uri: str) -> Roles:
    """Find the columns of a table: what was named, else what is usual.

    Raises InputError where a named column is not there or of no use, or no column holds images.
    """
    for name in (columns.image, columns.label, columns.id, *columns.metadata):
        if name is not None and name not in schema.names:
            raise InputError(f"{uri} has no column {name!r} (its columns: {', '.join(schema.names)})")
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        raise InputError(f"{uri} has two columns named {twice[0]!r}: rename one")
    image, paths = _image(schema, columns.image, uri)
    label = _label(schema, columns.label, uri)
    name = columns.id or ("id" if "id" in schema.names else None)
    if name is not None and not is_text(kind := plain(schema.field(name).type)) and not pa.types.is_integer(kind):
        raise InputError(f"{uri}: id column {name!r} is {kind}; ids are integers or strings")
    objects = OBJECTS if OBJECTS in schema.names and box_fields(schema.field(OBJECTS).type) else None
    kept, left_out = _metadata(schema, columns.metadata, {image, label, name, objects}, uri)
    return Roles(image, paths, label, name, objects, pa.schema(kept), left_out)


def box_fields(kind: pa.DataType) -> tuple[str, str] | None:
    """Return the names of the boxes and of their categories in a column of objects, or None where it isn't one.

    Either a struct of lists or a list of structs, as different versions of `datasets` write it.
    """
    inside = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if not pa.types.is_struct(inside) or inside.get_field_index("bbox") < 0:
        return None
    category = next((name for name in CATEGORY_FIELDS if inside.get_field_index(name) >= 0), None)
    return ("bbox", category) if category else None


def _names_in(feature: Any, path: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the ClassLabel names at a path of a feature's description; sequences on the way are looked through."""
    while isinstance(feature, dict | list):
        if isinstance(feature, list):
            feature = feature[0] if feature else None
        elif isinstance(feature.get("names"), list) and not path:
            return tuple(feature["names"])
        elif path and path[0] in feature:
            feature, path = feature[path[0]], path[1:]
        else:
            feature = feature.get("feature")
    return None


def class_label_names(schema: pa.Schema, *path: str) -> tuple[str, ...] | None:
    """Return the ClassLabel names that `datasets` keeps in a schema's metadata for a column, or a field of one."""
    raw = (schema.metadata or {}).get(b"huggingface")
    return _names_in(json.loads(raw).get("info", {}).get("features", {}), path) if raw else None
