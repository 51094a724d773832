"""Vectors that a user has already -> features/: .npy, .npz, Parquet, Arrow."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.feather
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engine.folders import Claim, digest_of
from engine.places import Place
from engine.schema import BLOCK_ROWS, InputError, Progress, first_line, no_progress, result_options
from engine.store import check_ids, part_bytes, part_name, publish_features, vectors_array
from engine.verbs import ImportOptions

LAST = "last"


@dataclass(frozen=True)
class Given:
    """What a file held: vectors (n, d), ids (n,) strings, label codes (n,) with -1 for none, class names."""

    vectors: npt.NDArray[Any]
    ids: pa.Array
    labels: npt.NDArray[np.int64]
    class_names: list[str] | None


def _load_npy(place: Place) -> npt.NDArray[Any]:
    try:
        if "://" not in place.uri:
            return np.asarray(np.load(place.path, mmap_mode="r", allow_pickle=False))
        return np.asarray(np.load(io.BytesIO(place.read()), allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise InputError(f"{place.uri} is not a .npy file of numbers: {first_line(error)}") from error


def _load_npz(place: Place) -> dict[str, npt.NDArray[Any]]:
    import zipfile

    try:
        with np.load(io.BytesIO(place.read()), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{place.uri} is not a .npz file of numbers and strings: {first_line(error)}") from error


def _load_table(place: Place) -> pa.Table:
    try:
        if place.path.endswith(".parquet"):
            return pq.read_table(place.path, filesystem=place.fs)
        return pyarrow.feather.read_table(pa.py_buffer(place.read()))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{place.uri} cannot be read as a table: {first_line(error)}") from error


def _vector_column(table: pa.Table, named: str | None, uri: str) -> str:
    def is_vector(kind: pa.DataType) -> bool:
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return bool(lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))

    vectors = [field.name for field in table.schema if is_vector(field.type)]
    if named is not None and named not in vectors:
        raise InputError(f"{uri}: {named!r} is not a column of number lists (those are: {', '.join(vectors) or 'none'})")
    if named is None and len(vectors) != 1:
        raise InputError(f"{uri} has {len(vectors)} columns of number lists ({', '.join(vectors)}): name one with --column")
    return named or vectors[0]


def _stack(column: pa.ChunkedArray, uri: str) -> npt.NDArray[Any]:
    """Return a column of lists as (n, d); raises InputError where a list is missing or of another length."""
    values = column.combine_chunks()
    lengths = pa.compute.list_value_length(values)
    if lengths.null_count:
        raise InputError(f"{uri}: row {lengths.is_null().to_pylist().index(True)} has no vector")
    sizes = lengths.to_numpy()
    if len(sizes) == 0:
        raise InputError(f"{uri} is empty: it has no rows")
    odd: npt.NDArray[np.int64] = np.flatnonzero(sizes != sizes[:1])
    if len(odd):
        raise InputError(f"{uri}: row {odd[0]} has {sizes[odd[0]]} numbers, row 0 has {sizes[0]}")
    return np.asarray(values.flatten().to_numpy(zero_copy_only=False)).reshape(len(sizes), -1)


def _codes(raw: Any, uri: str) -> tuple[npt.NDArray[np.int64], list[str] | None]:
    """Return label codes and class names: integers stay as they are, strings are numbered in sorted order."""
    if isinstance(raw, np.ndarray) and raw.ndim != 1:
        raise InputError(f"{uri} has labels of shape {raw.shape}: one for each vector is needed")
    array = raw.combine_chunks() if isinstance(raw, pa.ChunkedArray) else pa.array(raw)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        names = sorted(name for name in array.unique().to_pylist() if name)
        codes = pa.compute.index_in(array, pa.array(names, array.type)).fill_null(-1)
        return np.asarray(codes.to_numpy(), dtype=np.int64), names
    number = pa.types.is_integer(array.type) or pa.types.is_floating(array.type)
    values = np.asarray(array.cast(pa.float64(), safe=False).fill_null(-1.0).to_numpy()) if number else np.empty(0)
    if not number or not np.array_equal(values, np.rint(values)) or (len(values) and values.min() < -1):
        raise InputError(f"{uri}: labels must be whole numbers from 0 (or -1 for none), or strings")
    return values.astype(np.int64), None


def _read_arrays(place: Place, options: ImportOptions) -> tuple[Any, Any, Any]:
    """Return (vectors, ids or None, labels or None) as the file has them."""
    if not place.exists():
        raise InputError(f"{place.uri} does not exist")
    if place.kind() != pafs.FileType.File:
        raise InputError(f"{place.uri} is a folder, not a file of vectors")
    if place.path.endswith(".npy"):
        return _load_npy(place), None, None
    if place.path.endswith(".npz"):
        arrays = _load_npz(place)
        if "features" not in arrays:
            raise InputError(f"{place.uri} holds {', '.join(arrays)}; the vectors must be called 'features'")
        return arrays["features"], arrays.get("ids"), arrays.get("labels")
    if not place.path.endswith((".parquet", ".arrow", ".feather")):
        raise InputError(f"{place.uri} is neither .npy, .npz, .parquet, .arrow nor .feather")
    table = _load_table(place)
    wanted = {"--label-column": options.label_column, "--id-column": options.id_column}
    for flag, name in wanted.items():
        if name not in (None, LAST) and name not in table.column_names:
            raise InputError(f"{place.uri} has no column {name!r} for {flag} (its columns: {', '.join(table.column_names)})")
    column = _vector_column(table, options.column, place.uri)
    ids = options.id_column or ("id" if "id" in table.column_names else None)
    label = options.label_column or ("label" if "label" in table.column_names else None)
    label = None if label == LAST else label
    return _stack(table[column], place.uri), table[ids] if ids else None, table[label] if label else None


def _check_vectors(x: npt.NDArray[Any], uri: str) -> None:
    if x.ndim != 2 or x.dtype.kind not in "fiu":
        raise InputError(f"{uri} holds an array of shape {x.shape} and type {x.dtype}: vectors are (n, d) numbers")
    if 0 in x.shape:
        raise InputError(f"{uri} is empty: its vectors have shape {x.shape}")


def _read(place: Place, options: ImportOptions) -> Given:
    x, ids, labels = _read_arrays(place, options)
    _check_vectors(x, place.uri)
    if options.label_column == LAST:
        if x.shape[1] < 2:
            raise InputError(f"{place.uri}: with one column there is no vector beside --label-column last")
        x, labels = x[:, :-1], np.asarray(x[:, -1])
    elif options.label_column is not None and not place.path.endswith((".parquet", ".arrow", ".feather")):
        raise InputError(f"--label-column {options.label_column!r}: for this file it can only be 'last'")
    n = len(x)
    names: pa.Array = pa.array(range(n), pa.int64()).cast(pa.string())
    if ids is not None:
        if isinstance(ids, np.ndarray) and ids.ndim != 1:
            raise InputError(f"{place.uri} has ids of shape {ids.shape}: one for each vector is needed")
        names = (ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else pa.array(ids)).cast(pa.string())
    if len(names) != n:
        raise InputError(f"{place.uri} has {len(names)} ids for {n} vectors")
    check_ids(names, place.uri)
    codes, class_names = (np.full(n, -1, dtype=np.int64), None) if labels is None else _codes(labels, place.uri)
    if len(codes) != n:
        raise InputError(f"{place.uri} has {len(codes)} labels for {n} vectors")
    return Given(x, names, codes, class_names)


def _stored(given: Given, start: int, stop: int, dtype: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):  # what doesn't fit was refused
        return np.asarray(given.vectors[start:stop]).astype(dtype)


def _check_finite(given: Given, dtype: str, uri: str) -> None:
    """Raise InputError naming the first row with a number that is not finite, or not once stored as `dtype`."""
    for start in range(0, len(given.vectors), BLOCK_ROWS):
        bad = np.flatnonzero(~np.isfinite(_stored(given, start, start + BLOCK_ROWS, dtype)).all(axis=1))
        if len(bad):
            row = start + int(bad[0])
            finite = np.isfinite(np.asarray(given.vectors[row], dtype=np.float64)).all()
            way_out = "pass --dtype float32" if dtype == "float16" else "scale the vectors"
            what = f"a number too large for {dtype}: {way_out}" if finite else "a NaN or an infinity: mend or drop the row"
            raise InputError(f"{uri}: the vector of row {row} (id {given.ids[row].as_py()!r}) holds {what}")


def _part(given: Given, start: int, stop: int, options: ImportOptions) -> pa.Table:
    labels = given.labels[start:stop]
    return pa.table(
        {
            "row": pa.array(np.arange(start, stop, dtype=np.int64)),
            "id": given.ids.slice(start, stop - start),
            "label": pa.array(labels, mask=labels < 0),
            options.holds: vectors_array(_stored(given, start, stop, options.dtype)),
        }
    )


def import_features(options: ImportOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Make a feature store of a file of vectors; return its manifest.

    Rows keep the file's order. Raises InputError for a file that cannot be read, vectors that are not finite (naming
    the row), and ids or labels that don't fit.
    """
    source = Place(options.file)
    given = _read(source, options)
    info = source.fs.get_file_info(source.path)
    out = Place(options.out)
    inputs = {"file": digest_of([info.size, info.mtime_ns])}
    claim = Claim.of(out, "features", inputs, result_options(options), options.overwrite, [options.file])
    published = claim.published()
    if published is not None:
        return published
    _check_finite(given, options.dtype, source.uri)
    claim.take()
    n, parts = len(given.vectors), []
    for start in range(0, n, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, n)
        table = _part(given, start, stop, options)
        data = part_bytes(table)
        out.at("parts", part_name(start)).write(data)
        parts.append(
            {
                "name": part_name(start),
                "start": start,
                "stop": stop,
                "num_vectors": len(table),
                "num_labeled": int((given.labels[start:stop] >= 0).sum()),
                "num_rejected": 0,
                "sha256": digest_of(data.to_pybytes()),
                "bytes": data.size,
            }
        )
        progress("import", stop, n, "")
    facts = {
        "num_rows": n,
        "num_rejected": 0,
        "dim": int(given.vectors.shape[1]),
        "column": options.holds,
        "dtype": options.dtype,
        "class_names": given.class_names,
        "pool": {"uri": source.absolute, "kind": "import"},
        "encoder": {"name": "imported"},
    }
    return publish_features(out, parts, facts)
