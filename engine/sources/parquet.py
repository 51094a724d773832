"""Parquet in the Hugging Face image convention: a struct of bytes and path, or plain bytes; labels by name or code."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engine.folders import Place, digest_of
from engine.schema import InputError
from engine.sources.pool import Columns, Pool, Sample, list_files, sample_from_file, stamp
from engine.store import check_ids

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def files_of(place: Place) -> list[tuple[str, int, int]]:
    """Return (name below the pool, size, mtime) of the pool's Parquet files, sorted; one file's name is ''."""
    if place.kind() == pafs.FileType.File:
        info = place.fs.get_file_info(place.path)
        return [("", info.size, info.mtime_ns)]
    base = place.path.rstrip("/") + "/"
    infos = list_files(place)
    return sorted((info.path[len(base) :], info.size, info.mtime_ns) for info in infos if info.path.endswith(".parquet"))


def _open(file: Place) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file.path, filesystem=file.fs)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file.uri} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _check_schema(file: Place, schema: pa.Schema, first: pa.Schema) -> None:
    """Raise InputError where a file of a pool has not the columns of the first one."""
    if not schema.equals(first):
        odd = [f.name for f in first if f.name not in schema.names or schema.field(f.name).type != f.type]
        odd += [name for name in schema.names if name not in first.names]
        raise InputError(f"{file.uri} has not the columns of the pool's first file; these differ: {', '.join(odd)}")


def _image_column(schema: pa.Schema, named: str | None, uri: str) -> str:
    if named is not None:
        if named not in schema.names:
            raise InputError(f"{uri} has no column {named!r} (its columns: {', '.join(schema.names)})")
        return named
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            return name
    structs: list[str] = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    if len(structs) == 1:
        return structs[0]
    raise InputError(f"{uri} has no image column (its columns: {', '.join(schema.names)}): name it with --image-column")


def _label_column(schema: pa.Schema, named: str | None, uri: str) -> str | None:
    if named is not None and named not in schema.names:
        raise InputError(f"{uri} has no column {named!r} (its columns: {', '.join(schema.names)})")
    return named or next((name for name in LABEL_COLUMNS if name in schema.names), None)


def _class_label_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Return the ClassLabel names that `datasets` keeps in the schema's metadata, if they are there."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    feature = json.loads(raw).get("info", {}).get("features", {}).get(column, {})
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(names) if names else None


def _read_columns(place: Place, files: list[str], column: str) -> pa.ChunkedArray:
    """Return one column (a.b for a field of a struct) of all the files."""
    parts = []
    for name in files:
        file = place.at(name) if name else place
        parts.append(pq.read_table(file.path, columns=[column], filesystem=file.fs, partitioning=None).column(0))
    return pa.chunked_array([chunk for values in parts for chunk in values.chunks], parts[0].type)


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the row groups of the Parquet files, sorted by path; find their image, label and id columns."""
    files = files_of(place)
    names, groups, counts = [], [], []
    schema = None
    for name, _, _ in files:
        file = place.at(name) if name else place
        with _open(file) as parquet:
            schema = schema or parquet.schema_arrow
            _check_schema(file, parquet.schema_arrow, schema)
            for group in range(parquet.metadata.num_row_groups):
                names.append(name)
                groups.append(group)
                counts.append(parquet.metadata.row_group(group).num_rows)
    if schema is None:
        raise InputError(f"{place.uri} holds no .parquet file")
    image = _image_column(schema, columns.image, place.uri)
    label = _label_column(schema, columns.label, place.uri)
    detail = {"image": image}
    class_names = None
    if label is not None:
        detail["label"] = label
        class_names = _class_label_names(schema, label)
        if pa.types.is_string(schema.field(label).type) or pa.types.is_large_string(schema.field(label).type):
            class_names = tuple(sorted(v for v in _read_columns(place, [f[0] for f in files], label).unique().to_pylist() if v))
        elif not pa.types.is_integer(schema.field(label).type):
            raise InputError(
                f"{place.uri}: label column {label!r} is {schema.field(label).type}; labels are integers or strings"
            )
    detail["id"] = _id_column(place, schema, image, [f[0] for f in files])
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1] if counts else np.empty(0)
    listing = pa.table(
        {
            "file": pa.array(names, pa.string()),
            "group": pa.array(groups, pa.int64()),
            "start": pa.array(starts.astype(np.int64)),
            "count": pa.array(counts, pa.int64()),
        }
    )
    digest = digest_of([[list(file) for file in files], detail])
    return Pool(place.uri, "parquet", int(sum(counts)), digest, class_names, listing, detail)


def _id_column(place: Place, schema: pa.Schema, image: str, files: list[str]) -> str:
    """Return what names the rows: column `id`, else the images' paths where all are there and differ, else the row."""
    if "id" in schema.names:
        ids = _read_columns(place, files, "id")
        check_ids(ids, place.uri)
        return "id"
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        paths = _read_columns(place, files, f"{image}.path")
        if not paths.null_count and len(paths.unique()) == len(paths):
            return f"{image}.path"
    return ""


@functools.lru_cache(maxsize=1)
def _row_group(uri: str, stamped: tuple[int, int], group: int, columns: tuple[str, ...]) -> pa.Table:
    with _open(Place(uri)) as parquet:
        return parquet.read_row_group(group, columns=list(columns))


def read(pool: Pool, start: int, stop: int) -> Iterator[Sample]:
    """Yield the samples of pool rows [start, stop)."""
    place = Place(pool.uri)
    image, label, id_column = pool.detail["image"], pool.detail.get("label"), pool.detail["id"]
    columns = tuple(dict.fromkeys(name for name in (image, label, id_column.split(".")[0]) if name))
    code = {name: index for index, name in enumerate(pool.class_names or ())}
    for entry in pool.listing.to_pylist():
        first = entry["start"]
        low, high = max(start, first), min(stop, first + entry["count"])
        if low >= high:
            continue
        uri = place.at(entry["file"]).uri if entry["file"] else place.uri
        table = _row_group(uri, stamp(Place(uri)), entry["group"], columns).slice(low - first, high - low)
        for offset, record in enumerate(table.to_pylist()):
            row = low + offset
            value = record[image]
            data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            raw = record[label] if label else None
            name = str(path if id_column.endswith(".path") else record["id"] if id_column else row)
            coded = code[raw] if isinstance(raw, str) and raw else None if raw in (None, "", -1) else int(raw)
            if isinstance(data, str) or (data is None and path):
                yield sample_from_file(row, name, Place(_beside(place, data or str(path))), coded)
            elif data is None:
                yield Sample(row, name, f"{uri}#{row}", coded, b"", "no image in this row")
            else:
                yield Sample(row, name, f"{uri}#{row}", coded, data)


def _beside(place: Place, path: str) -> str:
    """Return an image path of a Parquet file: as it stands if absolute or a URI, else beside the Parquet files."""
    if "://" in path or path.startswith("/"):
        return path
    folder = place.uri if place.kind() == pafs.FileType.Directory else place.uri.rsplit("/", 1)[0]
    return Place(folder).at(path).uri
