"""Pools of images: an image folder, Parquet in the Hugging Face image convention, CIFAR's own files.

`open_pool` lists a pool once, on the driver; `read` gives the samples of a range of its rows, on any worker. A pool
row is a position in the listing, which is sorted, so the same pool has the same rows everywhere.
"""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from PIL import Image

from engine.schema import InputError
from engine.store import Place, digest_of, part_bytes

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"]
)
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
CIFAR_SIDE_PX = 32


@dataclass(frozen=True)
class Sample:
    """One listed image: the bytes of its file (or decoded pixels), or the `error` that kept it from being read."""

    row: int
    id: str
    uri: str
    label: int | None
    data: bytes | Image.Image
    error: str | None = None


@dataclass(frozen=True)
class Pool:
    """A listed pool. `listing` has one row for each file or row group; what its columns mean is the source's own."""

    uri: str
    kind: str
    num_rows: int
    digest: str
    class_names: tuple[str, ...] | None
    listing: pa.Table
    detail: dict[str, str]


@dataclass(frozen=True)
class Columns:
    """The columns a user named for a Parquet pool; None means the usual ones."""

    image: str | None = None
    label: str | None = None


# --- image folder -----------------------------------------------------------------------------------------------


def _list_folder(place: Place, columns: Columns) -> Pool:
    base = place.path.rstrip("/") + "/"
    infos = place.fs.get_file_info(pafs.FileSelector(place.path, recursive=True))
    files = [
        (info.path[len(base) :], info.size, info.mtime_ns)
        for info in infos
        if info.type == pafs.FileType.File and _is_image(info.base_name)
    ]
    files.sort()
    folders = sorted({name.split("/")[0] for name, _, _ in files if "/" in name})
    code = {name: index for index, name in enumerate(folders)}
    labels = [code.get(name.split("/")[0]) if "/" in name else None for name, _, _ in files]
    listing = pa.table({"id": pa.array([name for name, _, _ in files], pa.string()), "label": pa.array(labels, pa.int64())})
    digest = digest_of([list(file) for file in files])
    return Pool(place.uri, "folder", len(files), digest, tuple(folders) or None, listing, {})


def _is_image(name: str) -> bool:
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and not name.startswith(".") and (dot + suffix).lower() in IMAGE_SUFFIXES


def _read_folder(pool: Pool, start: int, stop: int) -> Iterator[Sample]:
    place = Place(pool.uri)
    for offset, entry in enumerate(pool.listing.slice(start, stop - start).to_pylist()):
        file = place.at(entry["id"])
        yield _sample_from_file(start + offset, entry["id"], file, entry["label"])


def _sample_from_file(row: int, name: str, file: Place, label: int | None) -> Sample:
    """Read one file; a file that is gone or cannot be read is a sample with an error, not a crash."""
    try:
        return Sample(row, name, file.uri, label, file.read())
    except (OSError, pa.ArrowInvalid) as error:
        return Sample(row, name, file.uri, label, b"", f"cannot be read: {str(error).splitlines()[0]}")


# --- Parquet ----------------------------------------------------------------------------------------------------


def _parquet_files(place: Place) -> list[tuple[str, int, int]]:
    """Return (name below the pool, size, mtime) of the pool's Parquet files, sorted; one file's name is ''."""
    if place.kind() == pafs.FileType.File:
        info = place.fs.get_file_info(place.path)
        return [("", info.size, info.mtime_ns)]
    base = place.path.rstrip("/") + "/"
    infos = place.fs.get_file_info(pafs.FileSelector(place.path, recursive=True))
    return sorted((info.path[len(base) :], info.size, info.mtime_ns) for info in infos if info.path.endswith(".parquet"))


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


def _list_parquet(place: Place, columns: Columns) -> Pool:
    files = _parquet_files(place)
    names, groups, counts = [], [], []
    schema = None
    for name, _, _ in files:
        file = place.at(name) if name else place
        with pq.ParquetFile(file.path, filesystem=file.fs) as parquet:
            schema = schema or parquet.schema_arrow
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
        if ids.null_count or len(ids.unique()) != len(ids):
            counts = ids.value_counts().to_pylist()
            worst = max(counts, key=lambda entry: int(entry["counts"]))
            raise InputError(f"{place.uri}: ids must be there and differ, {worst['values']!r} occurs {worst['counts']} times")
        return "id"
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        paths = _read_columns(place, files, f"{image}.path")
        if not paths.null_count and len(paths.unique()) == len(paths):
            return f"{image}.path"
    return ""


@functools.lru_cache(maxsize=1)
def _row_group(uri: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    file = Place(uri)
    with pq.ParquetFile(file.path, filesystem=file.fs) as parquet:
        return parquet.read_row_group(group, columns=list(columns))


def _read_parquet(pool: Pool, start: int, stop: int) -> Iterator[Sample]:
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
        for offset, record in enumerate(_row_group(uri, entry["group"], columns).slice(low - first, high - low).to_pylist()):
            row = low + offset
            value = record[image]
            data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            raw = record[label] if label else None
            name = str(path if id_column.endswith(".path") else record["id"] if id_column else row)
            coded = code[raw] if isinstance(raw, str) and raw else None if raw in (None, "", -1) else int(raw)
            if isinstance(data, str) or (data is None and path):
                yield _sample_from_file(row, name, Place(_beside(place, data or str(path))), coded)
            elif data is None:
                yield Sample(row, name, f"{uri}#{row}", coded, b"", "no image in this row")
            else:
                yield Sample(row, name, f"{uri}#{row}", coded, data)


def _beside(place: Place, path: str) -> str:
    """Return an image path of a Parquet file: as it stands if absolute or a URI, else beside the Parquet files."""
    if "://" in path or path.startswith("/"):
        return path
    folder = place.uri if place.kind() == pafs.FileType.Directory else place.uri.rsplit("/", 1)[0]
    return f"{folder}/{path}"


# --- CIFAR ------------------------------------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """Unpickles CIFAR's Python batches: dicts, lists, bytes and numpy arrays, and refuses everything else."""

    ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise InputError(f"a CIFAR batch may not contain {module}.{name}")
        return super().find_class(module, name)


CIFAR_TRAIN = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "train")


def _cifar_files(place: Place) -> list[str]:
    """Return the names of the batches a CIFAR pool consists of: those of a folder's training set, or the one file ('')."""
    if place.kind() == pafs.FileType.File:
        return [""] if _is_cifar_name(place.path.rsplit("/", 1)[-1]) else []
    return [name for name in place.names() if name.removesuffix(".bin") in CIFAR_TRAIN and _is_cifar_name(name)]


def _is_cifar_name(name: str) -> bool:
    return name.removesuffix(".bin") in (*CIFAR_TRAIN, "test_batch", "test")


@functools.lru_cache(maxsize=1)
def _cifar_batch(uri: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return (images (n, 32, 32, 3) uint8, labels (n,)) of one batch; CIFAR-100's labels are the fine ones."""
    import io

    file = Place(uri)
    data = file.read()
    if uri.endswith(".bin"):
        label_bytes = 2 if uri.rsplit("/", 1)[-1] in ("train.bin", "test.bin") else 1
        width = label_bytes + 3 * CIFAR_SIDE_PX**2
        if not data or len(data) % width:
            raise InputError(f"{uri} has {len(data)} bytes, not a multiple of {width}: not a CIFAR binary batch")
        records = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
        pixels, labels = records[:, label_bytes:], records[:, label_bytes - 1]
    else:
        try:
            batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
            pixels = np.asarray(batch[b"data"], dtype=np.uint8)
            labels = np.asarray(batch[b"labels"] if b"labels" in batch else batch[b"fine_labels"])
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{uri} is not a CIFAR Python batch: {error}") from error
    images = pixels.reshape(-1, 3, CIFAR_SIDE_PX, CIFAR_SIDE_PX).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.astype(np.int64)


def _cifar_names(place: Place) -> tuple[str, ...] | None:
    folder = place if place.kind() == pafs.FileType.Directory else Place(place.path.rsplit("/", 1)[0])
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        if folder.at(name).exists():
            return tuple(line.strip() for line in folder.at(name).read().decode().splitlines() if line.strip())
    return None


def _list_cifar(place: Place, columns: Columns) -> Pool:
    files = _cifar_files(place)
    counts, facts = [], []
    for name in files:
        file = place.at(name) if name else place
        counts.append(len(_cifar_batch(file.uri)[1]))
        info = file.fs.get_file_info(file.path)
        facts.append([name, info.size, info.mtime_ns])
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1].astype(np.int64)
    listing = pa.table({"file": pa.array(files, pa.string()), "start": starts, "count": pa.array(counts, pa.int64())})
    return Pool(place.uri, "cifar", int(sum(counts)), digest_of(facts), _cifar_names(place), listing, {})


def _read_cifar(pool: Pool, start: int, stop: int) -> Iterator[Sample]:
    place = Place(pool.uri)
    for entry in pool.listing.to_pylist():
        low, high = max(start, entry["start"]), min(stop, entry["start"] + entry["count"])
        if low >= high:
            continue
        file = place.at(entry["file"]) if entry["file"] else place
        images, labels = _cifar_batch(file.uri)
        name = file.path.rsplit("/", 1)[-1]
        for row in range(low, high):
            at = row - entry["start"]
            yield Sample(row, f"{name}/{at}", f"{file.uri}#{at}", int(labels[at]), Image.fromarray(images[at]))


# --- any pool ---------------------------------------------------------------------------------------------------

LISTERS: dict[str, Callable[[Place, Columns], Pool]] = {
    "folder": _list_folder,
    "parquet": _list_parquet,
    "cifar": _list_cifar,
}
READERS: dict[str, Callable[[Pool, int, int], Iterator[Sample]]] = {
    "folder": _read_folder,
    "parquet": _read_parquet,
    "cifar": _read_cifar,
}


def _detect(place: Place) -> str:
    kind = place.kind()
    if kind == pafs.FileType.NotFound:
        raise InputError(f"pool {place.uri!r} does not exist: give an image folder, a Parquet file or folder, or CIFAR's files")
    if place.path.endswith(".parquet") and kind == pafs.FileType.File:
        return "parquet"
    if _cifar_files(place):
        return "cifar"
    if kind == pafs.FileType.File:
        raise InputError(f"pool {place.uri!r} is a file that is neither .parquet nor a CIFAR batch")
    return "parquet" if _parquet_files(place) else "folder"


def open_pool(uri: str, columns: Columns | None = None) -> Pool:
    """List a pool: find out its kind, its rows in their fixed order, and its digest.

    Raises InputError when it is missing, empty, or of no known kind.
    """
    place = Place(Place(uri).absolute)
    pool = LISTERS[_detect(place)](place, columns or Columns())
    if pool.num_rows == 0:
        raise InputError(f"pool {uri!r} is empty: no file in it ends in {', '.join(sorted(IMAGE_SUFFIXES))} or .parquet")
    return pool


def read(pool: Pool, start: int, stop: int) -> Iterator[Sample]:
    """Yield the samples of pool rows [start, stop), in order."""
    return READERS[pool.kind](pool, start, stop)


def save_pool(pool: Pool, place: Place) -> None:
    """Write a listing to a file that every worker can read."""
    facts = {name: getattr(pool, name) for name in ("uri", "kind", "num_rows", "digest", "class_names", "detail")}
    place.write(part_bytes(pool.listing.replace_schema_metadata({"pool": json.dumps(facts)})))


def load_pool(place: Place) -> Pool:
    """Read what `save_pool` wrote."""
    listing = pa.ipc.open_file(pa.py_buffer(place.read())).read_all()
    facts = json.loads(listing.schema.metadata[b"pool"])
    names = facts.pop("class_names")
    return Pool(listing=listing, class_names=tuple(names) if names else None, **facts)
