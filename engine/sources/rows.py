"""Tables that hold the images themselves: what their columns are, and the samples of a piece of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from engine.arrays import Ints
from engine.masks import masked
from engine.places import Place, masked_column
from engine.sources.boxes import BOXES, LEFT_OUT
from engine.sources.ids import check_unique, names_rows
from engine.sources.listing import SLICE_ROWS, row_names, take
from engine.sources.objects import boxes_of, category_names
from engine.sources.paths import NO_IMAGE
from engine.sources.pool import Columns, Images, Pool, Sample, sample_from_file
from engine.sources.roles import Roles, box_fields, class_label_names, find_roles, is_text, plain
from engine.sources.values import ClassNames, labels_of, records

SIZES = ("width", "height")
Read = Callable[[list[str]], Iterator[pa.RecordBatch]]
"""Reads some columns of all the rows, in batches. Of a struct, a.b reads one field, in its struct."""


@dataclass(frozen=True)
class Survey:
    """What reading the small columns of a table once told: `detail` of the pool, its class names and further columns."""

    detail: dict[str, Any]
    class_names: tuple[str, ...] | None
    schema: pa.Schema


def _id_column(read: Read, num_rows: int, schema: pa.Schema, roles: Roles, uri: str) -> str:
    """Return what names the rows: the id column, else the images' paths where all are there and differ, else ''."""
    if roles.id:
        name = roles.id
        check_unique(lambda: (batch[name] for batch in read([name])), num_rows, uri)
        return name
    kind = schema.field(roles.image).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        path = f"{roles.image}.path"

        def paths() -> Iterator[pa.Array]:
            return (masked_column(pc.struct_field(batch[roles.image], "path")) for batch in read([path]))

        return path if names_rows(paths, num_rows) else ""
    return ""


def _names_of(read: Read, schema: pa.Schema, roles: Roles, uri: str) -> tuple[str, ...] | None:
    """Return the class names of the objects, else of the labels, where they have some."""
    if roles.objects:
        _, category = box_fields(schema.field(roles.objects).type) or ("", "")
        names = class_label_names(schema, roles.objects, category)
        classes = ClassNames(roles.objects, uri)
        for batch in () if names else read([roles.objects]):
            found = category_names(batch[roles.objects])
            if found is None:
                return None
            classes.add(found)
        return names or classes.names() or None
    if roles.label is None:
        return None
    if not is_text(plain(schema.field(roles.label).type)):
        return class_label_names(schema, roles.label)
    classes = ClassNames(roles.label, uri)
    for batch in read([roles.label]):
        classes.add(batch[roles.label])
    return classes.names()


def sizes_of(columns: dict[str, pa.Array | pa.ChunkedArray], num_rows: int) -> npt.NDArray[np.float64]:
    """Return the images' widths and heights (n, 2) where columns say them, else NaN."""
    if set(SIZES) <= columns.keys():
        return np.stack([columns[name].cast(pa.float64()).fill_null(np.nan).to_numpy() for name in SIZES], axis=1)
    return np.full((num_rows, 2), np.nan)


def survey(read: Read, num_rows: int, schema: pa.Schema, columns: Columns, uri: str) -> Survey:
    """Find what the columns are, whether ids are unique, the class names, and how many boxes are left out."""
    roles = find_roles(schema, columns, uri)
    if roles.objects and roles.label and not columns.label:
        roles.left_out[roles.label] = "the pool's classes are those of its boxes"
    label = roles.label if columns.label or not roles.objects else None
    sized = [n for n in SIZES if n in schema.names and pa.types.is_integer(plain(schema.field(n).type))]
    names = _names_of(read, schema, roles, uri)
    detail: dict[str, Any] = {
        "image": roles.image,
        "label": label,
        "id": _id_column(read, num_rows, schema, roles, uri),
        "objects": roles.objects,
        "sizes": sized if roles.objects and len(sized) == len(SIZES) else [],
        "columns_left_out": roles.left_out,
    }
    if roles.objects:
        left_out = Counter(dict.fromkeys(LEFT_OUT, 0))
        for batch in read([roles.objects, *detail["sizes"]]):
            given = dict(zip(batch.schema.names, batch.columns, strict=True))
            left_out += boxes_of(batch[roles.objects], sizes_of(given, len(batch)), names, uri)[1]
        detail["boxes_left_out"] = {reason: left_out[reason] for reason in LEFT_OUT}
    return Survey(detail, names, pa.schema([*roles.metadata, *([BOXES] if roles.objects else [])]))


def columns_read(pool: Pool) -> list[str]:
    """Return the columns that `samples` needs."""
    detail = pool.detail
    names = [detail["image"], detail["label"], detail["id"].split(".")[0], detail["objects"], *detail["sizes"]]
    return list(dict.fromkeys(name for name in (*names, *pool.schema.names) if name and name != BOXES.name))


def samples(pool: Pool, table: pa.Table, first: int, rows: Ints, uri: str, base: Place) -> Iterator[Sample]:
    """Yield the samples of ascending pool `rows`, of a piece of a pool's table that begins at pool row `first`.

    Paths are found below `base`.
    """
    images = Images(base)
    detail = pool.detail
    by_path = detail["id"].endswith(".path")
    for start in range(0, len(rows), SLICE_ROWS):
        some = rows[start : start + SLICE_ROWS]
        piece = take(table, some - first)
        pictures = piece[detail["image"]].to_pylist()
        none: list[Any] = [None] * len(piece)
        labels = labels_of(piece[detail["label"]], pool.class_names) if detail["label"] else none
        ids = piece[detail["id"]].to_pylist() if detail["id"] and not by_path else none
        extras = _extras(pool, piece, uri)
        for row, value, label, name, extra in zip(some.tolist(), pictures, labels, ids, extras, strict=True):
            data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            named = masked(str(path)) if by_path else str(name if detail["id"] else row)
            if data is not None:
                yield Sample(row, named, f"{uri}#{row}", label, data, extra=extra)
            elif path:
                yield sample_from_file(row, named, images.place(path), label, extra)
            else:
                yield Sample(row, named, f"{uri}#{row}", label, b"", NO_IMAGE, extra)


def ids_of(pool: Pool, read: Read) -> Iterator[pa.Array]:
    """Yield the ids of all rows of a pool whose tables `read` reads, in batches."""
    named = pool.detail["id"]
    if not named:
        yield row_names(0, pool.num_rows)
        return
    for batch in read([named]):
        by_path = named.endswith(".path")
        yield masked_column(pc.struct_field(batch[pool.detail["image"]], "path")) if by_path else batch[named].cast(pa.string())


def _extras(pool: Pool, piece: pa.Table, uri: str) -> list[dict[str, Any]]:
    """Return the further columns of a piece of a table, one dict a row."""
    detail = pool.detail
    columns = {f.name: piece[f.name].cast(f.type) for f in pool.schema if f.name != BOXES.name}
    if detail["objects"]:
        sizes = sizes_of({name: piece[name] for name in detail["sizes"]}, len(piece))
        objects = piece[detail["objects"]].combine_chunks()
        columns[BOXES.name] = boxes_of(objects, sizes, pool.class_names, uri)[0]
    return records(columns, len(piece))
