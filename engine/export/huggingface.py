"""A data set of Hugging Face's `datasets`, as one Parquet file: images by their addresses, or their bytes with --copy.

`datasets.load_dataset("parquet", data_files=FILE)` reads it, and so does coresift, as a pool.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.export.entries import Entry
from engine.export.job import Files, Job
from engine.schema import InputError

NAME = "data.parquet"
HELD_BYTES = 64 << 20
"""Of images in a row group, at most, unless one alone has more."""
HELD_ROWS = 1024


def _schema(job: Job, boxes: bool, labels: bool) -> pa.Schema:
    """Return the columns, with the description of them that `datasets` keeps in a schema's metadata."""
    import datasets

    names = job.class_names
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features: dict[str, Any] = {"image": datasets.Image()}
    if labels:
        features["label"] = kind
    if boxes:
        box = {"bbox": datasets.List(datasets.Value("float32"), length=4), "category": kind, "iscrowd": datasets.Value("int64")}
        features["objects"] = datasets.List(box)
    features |= {name: datasets.Value(kind) for name, kind in (("id", "string"), ("pool_row", "int64"), ("rank", "int64"))}
    return datasets.Features(features).arrow_schema


def _objects(entry: Entry) -> list[dict[str, Any]] | None:
    sides = ("x", "y", "width", "height")
    if entry.boxes is None:
        return None
    return [
        {"bbox": [box[side] for side in sides], "category": box["label"], "iscrowd": int(box["crowd"])} for box in entry.boxes
    ]


def _row(entry: Entry, copies: bool, schema: pa.Schema) -> dict[str, Any]:
    image = {"bytes": entry.data, "path": entry.id.rsplit("/", 1)[-1]} if copies else {"bytes": None, "path": entry.uri}
    row = {"image": image, "label": entry.label, "id": entry.id, "pool_row": entry.row, "rank": entry.rank}
    return {**row, "objects": _objects(entry)} if "objects" in schema.names else row


def write(job: Job) -> Files:
    """Return the file, written a row group at a time."""
    pool = job.wanted.pool
    assert pool is not None
    boxes = "boxes" in pool.schema.names
    schema, file = _schema(job, boxes, not boxes), job.scratch / NAME
    rows, held = list[dict[str, Any]](), 0
    with pq.ParquetWriter(file, schema, compression="snappy") as writer:
        for entry in job.entries:
            if not job.copies and not entry.uri.startswith("/") and "://" not in entry.uri:
                raise InputError(f"`datasets` opens images by absolute paths or URIs, and --uri-prefix gives {entry.uri!r}")
            rows.append(_row(entry, job.copies, schema))
            held += len(entry.data) if job.copies else 0
            if held >= HELD_BYTES or len(rows) == HELD_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, held = [], 0
        writer.write_table(pa.Table.from_pylist(rows, schema))
    return {NAME: file}
