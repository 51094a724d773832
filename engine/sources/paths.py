"""Reads pools whose listing has one row an image, with the image's path.

Such a listing has `path` (null where a row has none), and may have `id`, `label` (codes, or names) and `extra`, a
struct of the further columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from engine.arrays import Ints
from engine.masks import masked
from engine.places import Place, masked_column
from engine.sources.listing import pieces, row_names
from engine.sources.pool import Images, Pool, Sample, sample_from_file
from engine.sources.values import labels_of

NO_IMAGE = "no image in this row"


def listing_schema(ids: bool, label: pa.DataType | None, extra: pa.Schema) -> pa.Schema:
    """Return the columns of a listing with or without ids of its own, labels of a type, and further columns."""
    fields = [("path", pa.string())]
    fields += [("id", pa.string())] if ids else []
    fields += [("label", label)] if label is not None else []
    fields += [("extra", pa.struct(list(extra)))] if len(extra) else []
    return pa.schema(fields)


def extra_of(column: pa.ChunkedArray, schema: pa.Schema) -> list[dict[str, Any]]:
    """Return the further columns of a slice of a listing, one dict a row; text becomes the type that `schema` says."""
    values = column.combine_chunks()
    columns = {f.name: pc.struct_field(values, f.name) for f in schema}
    lists = {f.name: columns[f.name].cast(f.type).to_pylist() for f in schema}
    return [{name: column[i] for name, column in lists.items()} for i in range(len(values))]


def read(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of ascending pool rows; paths are below `base`, `detail["id"]` says what names them."""
    images = Images(Place(pool.base))
    for some, table in pieces(pool.listing, rows):
        paths = table["path"].to_pylist()
        named = pool.detail["id"]
        ids = table[named].to_pylist() if named else [str(row) for row in some]
        labels = labels_of(table["label"], pool.class_names) if "label" in table.column_names else [None] * len(table)
        extras = extra_of(table["extra"], pool.schema) if "extra" in table.column_names else [{}] * len(table)
        for row, path, name, label, extra in zip(some.tolist(), paths, ids, labels, extras, strict=True):
            if path:
                shown = masked(name) if named == "path" else name
                yield sample_from_file(row, shown, images.place(path), label, extra)
            else:
                yield Sample(row, name, f"{pool.uri}#{row}", label, b"", NO_IMAGE, extra)


def ids(pool: Pool) -> Iterator[pa.Array]:
    """Yield the ids of all rows, in batches."""
    named, first = pool.detail["id"], 0
    for table in pool.listing.tables():
        column = table[named].combine_chunks() if named else row_names(first, len(table))
        yield masked_column(column) if named == "path" else column
        first += len(table)
