"""One part of a feature store: its table, its bytes, and what is known of it without reading it whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.chunks import Item
from engine.folders import digest_of, sha256_of
from engine.places import Place
from engine.reuse import HASH_BYTES
from engine.schema import RunError
from engine.store import (
    DETECTIONS,
    PATTERNS,
    SCORES,
    detections_array,
    labels_numpy,
    part_bytes,
    part_name,
    part_schema,
    patterns_array,
    vector_counts,
    vectors_array,
)

CONTENT_HASH = pa.binary(HASH_BYTES)
REJECTED = pa.schema([("row", pa.int64()), ("id", pa.string()), ("uri", pa.string()), ("reason", pa.string())])
LISTS = {PATTERNS: (patterns_array, "num_patterns"), DETECTIONS: (detections_array, "num_detections")}
"""Columns that hold a list for each image: how they are made, and what the number of entries is called."""
THREADS = 8
"""Finished parts that are looked at, and hashed, at a time."""


def part_table(
    items: Sequence[Item], vectors: Sequence[npt.NDArray[np.float32]], column: str, dtype: str, extra: pa.Schema
) -> pa.Table:
    """Return a part's table of images that are not rejected.

    `vectors` begin with an array of none, (0, d); then come those of batches, one an image, or, for the columns of LISTS,
    of each image. They are stored as `dtype`. `extra` names and types the pool's further columns. Raises RunError for a
    vector that is not finite as `dtype`; the message names its image. The columns of SCORES may hold NaN: no score.
    """
    with np.errstate(over="ignore"):  # what does not fit is an error of ours, below
        stored = np.concatenate(vectors).astype(dtype)
    several = column in LISTS
    counts = np.array([len(own) for own in vectors[1:]] if several else [1] * len(items), dtype=np.int64)
    allowed = np.isfinite(stored) | (np.isnan(stored) if column in SCORES else False)
    if not allowed.all():
        first = int(np.flatnonzero(~allowed.all(axis=1))[0])
        bad = items[int(np.searchsorted(np.cumsum(counts), first, side="right"))]
        raise RunError(f"the encoder gave a vector that is not finite as {dtype} for image {bad.id!r} (row {bad.row})")
    return pa.table(
        {
            "row": pa.array([item.row for item in items], pa.int64()),
            "id": pa.array([item.id for item in items], pa.string()),
            "label": pa.array([item.label for item in items], pa.int64()),
            "width": pa.array([item.size[0] for item in items], pa.int32()),
            "height": pa.array([item.size[1] for item in items], pa.int32()),
            "phash": pa.array([item.phash for item in items], pa.uint64()),
            "bytes": pa.array([item.num_bytes for item in items], pa.int64()),
            "content_hash": pa.array([item.content_hash for item in items], CONTENT_HASH),
            **{field.name: pa.array([item.extra[field.name] for item in items], field.type) for field in extra},
            column: LISTS[column][0](stored, counts) if several else vectors_array(stored),
        }
    )


def write_part(place: Place, start: int, stop: int, table: pa.Table, items: Sequence[Item]) -> dict[str, Any]:
    """Write the part of pool rows [start, stop) of the store at `place`; return what the manifest says of it.

    The part's facts and its rejected `items` are in its schema's metadata: it is complete in itself. Raises RunError where
    it can't be written.
    """
    rejected = [{"row": item.row, "id": item.id, "uri": item.uri, "reason": item.reason} for item in items if item.reason]
    facts = {
        "start": start,
        "stop": stop,
        "num_vectors": len(table),
        **{count: int(vector_counts(table[name]).sum()) for name, (_, count) in LISTS.items() if name in table.column_names},
        "num_labeled": int((labels_numpy(table["label"]) >= 0).sum()),
        "num_rejected": len(rejected),
    }
    metadata = {"facts": json.dumps(facts), "rejected": json.dumps(rejected)}
    data = part_bytes(table.replace_schema_metadata(metadata))
    file = place.at("parts", part_name(start))
    try:
        file.write(data)
    except OSError as error:
        raise RunError(
            f"{file.uri} cannot be written: {error}. The parts written before are kept: once there is room, or the place is "
            "back, the same command goes on"
        ) from error
    return {"name": part_name(start), **facts, "sha256": digest_of(memoryview(data).tobytes()), "bytes": data.size}


def _entry(file: Place) -> dict[str, Any]:
    facts = json.loads(part_schema(file).metadata[b"facts"])
    size = file.fs.get_file_info(file.path).size
    return {"name": part_name(facts["start"]), **facts, "sha256": sha256_of(file), "bytes": size}


def finished_parts(place: Place, ranges: Sequence[tuple[int, int]]) -> dict[int, dict[str, Any]]:
    """Return first row -> manifest entry of the parts that an earlier run of the same command finished.

    Each file is hashed in a stream, several at a time; none is held in memory.
    """
    names = set(place.at("parts").names())
    files = {start: place.at("parts", part_name(start)) for start, _ in ranges if part_name(start) in names}
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(files, pool.map(_entry, files.values()), strict=True))


def rejected_rows(place: Place, entries: Sequence[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    """Yield the rejected rows of a store's parts in order, a batch for each part that has some, as REJECTED."""
    files = [place.at("parts", entry["name"]) for entry in entries if entry["num_rejected"]]
    with ThreadPoolExecutor(THREADS) as pool:
        for schema in pool.map(part_schema, files):
            yield pa.RecordBatch.from_pylist(json.loads(schema.metadata[b"rejected"]), schema=REJECTED)
