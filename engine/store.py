"""Published folders on any pyarrow filesystem, and the feature store.

A folder is published by its `manifest.json`, written last; before that only the command named in its `run.json`
may go on in it. Published folders are immutable.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engine import __version__
from engine.schema import BLOCK_ROWS, InputError

FORMAT = 1
"""Version of the folder layout; a store of another version is refused by name."""


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return (filesystem, path) for a local path or any URI that pyarrow knows (s3://, gs://, file://)."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"cannot open {uri!r}: {error}") from error
    return filesystem, path


@dataclass(frozen=True)
class Place:
    """A folder or file on some filesystem; `uri` is how the user named it."""

    uri: str

    @cached_property
    def opened(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem, and the path on it."""
        return open_filesystem(self.uri)

    @property
    def fs(self) -> pafs.FileSystem:
        """The filesystem this place is on."""
        return self.opened[0]

    @property
    def path(self) -> str:
        """The path on that filesystem."""
        return self.opened[1]

    @property
    def absolute(self) -> str:
        """The name under which a worker with another working directory finds this place."""
        return self.path if isinstance(self.fs, pafs.LocalFileSystem) else self.uri

    def at(self, *names: str) -> Place:
        """Return the place below this one."""
        return Place("/".join([self.uri.rstrip("/"), *names]))

    def kind(self) -> pafs.FileType:
        """Return whether this is a file, a folder or nothing."""
        return self.fs.get_file_info(self.path).type

    def exists(self) -> bool:
        """Return whether there is a file or folder here."""
        return bool(self.kind() != pafs.FileType.NotFound)

    def names(self) -> list[str]:
        """Return the names directly inside this folder, sorted; empty where there is no folder."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    def read(self) -> bytes:
        """Return the whole file."""
        with self.fs.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write(self, data: bytes | pa.Buffer) -> None:
        """Write a whole file so that it appears complete or not at all.

        On a local disk a temporary name is renamed; an object store publishes a single put when it is closed.
        """
        if not isinstance(self.fs, pafs.LocalFileSystem):
            with self.fs.open_output_stream(self.path) as stream:
                stream.write(data)
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        temporary = f"{self.path}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, self.path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def remove(self) -> None:
        """Delete this folder and everything in it."""
        self.fs.delete_dir(self.path)


def to_json(value: Any) -> bytes:
    """Return canonical JSON: sorted keys, tuples as lists, two-space indent, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def digest_of(value: Any) -> str:
    """Return the sha256 of a JSON-ready value or of bytes, as hex."""
    data = value if isinstance(value, bytes) else to_json(value)
    return hashlib.sha256(data).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that a manifest records."""
    found = {"coresift": __version__}
    for name in ("numpy", "pyarrow", "ray", "torch", "timm"):
        found[name] = metadata.version(name)
    return found


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_manifest(place: Place) -> dict[str, Any] | None:
    """Return the manifest of a published folder, or None where there is none."""
    file = place.at("manifest.json")
    if not file.exists():
        return None
    manifest: dict[str, Any] = json.loads(file.read())
    if manifest.get("format") != FORMAT:
        raise InputError(f"{place.uri} has format {manifest.get('format')!r}; this version reads format {FORMAT}")
    return manifest


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """Yield 'name: old -> new' for every leaf in which two identities differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield f"{prefix} {json.dumps(old)} -> {json.dumps(new)}"


def _refuse(place: Place, old: dict[str, Any], new: dict[str, Any], state: str) -> InputError:
    changed = list(_differences(old, new))
    shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
    return InputError(f"{place.uri} {state} with other inputs ({shown}): choose another --out, or pass --overwrite")


def begin(place: Place, kind: str, inputs: dict[str, Any], options: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Claim a folder for one run; return its manifest when exactly this run is already published there.

    A folder begun with the same kind, inputs and options is gone on with. Raises InputError when the folder holds
    anything else, unless `overwrite`, which empties folders of ours and no others.
    """
    identity = json.loads(to_json({"kind": kind, "inputs": inputs, "options": options}))
    published = read_manifest(place) if not overwrite else None
    if published is not None:
        found = {key: published.get(key) for key in identity}
        if found != identity:
            raise _refuse(place, found, identity, "is published")
        return published
    run = place.at("run.json")
    names = place.names()
    if place.kind() == pafs.FileType.File:
        raise InputError(f"{place.uri} is a file: choose another --out")
    if names and not {"run.json", "manifest.json"} & set(names):
        raise InputError(f"{place.uri} holds files that are not coresift's ({names[0]!r}): choose an empty or new --out")
    if overwrite and names:
        place.remove()
    elif run.exists():
        begun = json.loads(run.read())
        if begun != identity:
            raise _refuse(place, begun, identity, "was begun")
        return None
    if isinstance(place.fs, pafs.LocalFileSystem):
        os.makedirs(place.path, exist_ok=True)
    run.write(to_json(identity))
    return None


def publish(place: Place, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder that was begun: its identity, `facts`, versions and the time. Returns it."""
    identity = json.loads(place.at("run.json").read())
    manifest = {"format": FORMAT, **identity, **facts, "versions": versions(), "published": now()}
    place.at("manifest.json").write(to_json(manifest))
    result: dict[str, Any] = json.loads(to_json(manifest))
    return result


def table_bytes(table: pa.Table) -> pa.Buffer:
    """Return a table as one Parquet file, the same bytes for the same table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def part_bytes(table: pa.Table) -> pa.Buffer:
    """Return a table as an Arrow IPC file with one record batch, the same bytes for the same table."""
    sink = pa.BufferOutputStream()
    table = table.combine_chunks()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(table)))
    return sink.getvalue()


def part_name(start: int) -> str:
    """Return the file name of the part that begins at pool row `start`."""
    return f"part-{start:012d}.arrow"


def vectors_array(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """Return (r, d) float16 or float32 values as an Arrow fixed-size list column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def vectors_numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return a fixed-size list column as an (r, d) array, without a copy when it has one chunk."""
    width = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, width) for chunk in column.chunks if len(chunk)]
    if len(chunks) == 1:
        return np.asarray(chunks[0])
    dtype = column.type.value_type.to_pandas_dtype()
    return np.concatenate(chunks) if chunks else np.empty((0, width), dtype=dtype)


def labels_numpy(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return a nullable integer label column as int64 with -1 for a missing label."""
    return np.asarray(column.fill_null(-1).to_numpy(), dtype=np.int64)


class FeatureStore:
    """A published features/ folder, read lazily.

    `num_rows` pool rows were listed, `num_vectors` have a vector of `dim` floats; the rest are in
    rejected.parquet. Blocks are ranges of `block_rows` pool rows; a part never spans two blocks.
    """

    def __init__(self, uri: str) -> None:
        self.place = Place(uri)
        manifest = read_manifest(self.place)
        if manifest is None:
            raise InputError(self._why_not(uri))
        if manifest["kind"] != "features":
            raise InputError(f"{uri} is a {manifest['kind']} folder, not features")
        self.manifest = manifest
        self.num_rows: int = manifest["num_rows"]
        self.num_vectors: int = manifest["num_vectors"]
        self.dim: int = manifest["dim"]
        self.column: str = manifest["column"]
        self.block_rows: int = manifest["block_rows"]
        self.digest: str = manifest["digest"]
        self.class_names: list[str] | None = manifest["class_names"]

    def _why_not(self, uri: str) -> str:
        if not self.place.exists():
            return f"{uri} does not exist: give the folder that `coresift embed` or `coresift import` wrote"
        if self.place.at("run.json").exists():
            return f"{uri} is unfinished: run the command that began it again, it goes on where it stopped"
        return f"{uri} is not a feature store (no manifest.json): make one with `coresift embed` or `coresift import`"

    @property
    def num_blocks(self) -> int:
        """How many blocks the pool's rows make."""
        return -(-self.num_rows // self.block_rows)

    @property
    def has_labels(self) -> bool:
        """Whether any vector has a label."""
        return bool(self.manifest["num_labeled"])

    def read_part(self, name: str, columns: Iterable[str] | None = None) -> pa.Table:
        """Return one part as a table; on a local disk it is a view of the mapped file."""
        place = self.place.at("parts", name)
        local = isinstance(place.fs, pafs.LocalFileSystem)
        source = pa.memory_map(place.path) if local else place.fs.open_input_file(place.path)
        reader = pa.ipc.open_file(source)
        if columns is not None:
            wanted = [reader.schema.get_field_index(column) for column in columns]
            source.seek(0)
            reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted))
            return reader.read_all().select(list(columns))
        return reader.read_all()

    def read_rows(self, start: int, stop: int, columns: Iterable[str] | None = None) -> pa.Table:
        """Return the rows of the parts that lie in pool rows [start, stop)."""
        wanted = list(columns) if columns is not None else None
        inside = [part for part in self.manifest["parts"] if part["start"] < stop and part["stop"] > start]
        return pa.concat_tables([self.read_part(part["name"], wanted) for part in inside])

    def read_block(self, index: int, columns: Iterable[str] | None = None) -> pa.Table:
        """Return the vectors of block `index` and their columns, ascending by row."""
        start = index * self.block_rows
        return self.read_rows(start, min(start + self.block_rows, self.num_rows), columns)

    def read_column(self, name: str) -> pa.ChunkedArray:
        """Return one small column (row, id, label) of the whole store."""
        return self.read_rows(0, self.num_rows, [name])[name]

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """The pool rows that have a vector, ascending, (num_vectors,) int64."""
        return np.asarray(self.read_column("row").to_numpy(), dtype=np.int64)

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """The label of each vector, (num_vectors,) int64, -1 where unknown."""
        return labels_numpy(self.read_column("label"))

    def vectors(self, rows: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float32]:
        """Return all vectors, or those of some pool rows in the order given, as float32 (n, d) in memory."""
        if rows is None:
            return vectors_numpy(self.read_column(self.column)).astype(np.float32)
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        for index in np.unique(rows // self.block_rows):
            table = self.read_block(int(index), ["row", self.column])
            mine = np.flatnonzero(rows // self.block_rows == index)
            have = table["row"].to_numpy()
            at = np.searchsorted(have, rows[mine])
            if len(have) == 0 or not np.array_equal(have[np.minimum(at, len(have) - 1)], rows[mine]):
                raise InputError(f"{self.place.uri} has no vector for some of rows {rows[mine][:5].tolist()}...")
            out[mine] = vectors_numpy(table[self.column])[at]
        return out

    def ids(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Return the ids of some pool rows that have a vector, in the order given."""
        at = np.searchsorted(self.rows, rows)
        return [str(value) for value in self.read_column("id").take(pa.array(at)).to_pylist()]


def publish_features(place: Place, parts: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Publish a features/ folder from its finished parts (name, start, stop, num_vectors, num_labeled, sha256, bytes)."""
    ordered = sorted(parts, key=lambda part: part["start"])
    return publish(
        place,
        {
            "parts": ordered,
            "digest": digest_of([[part["start"], part["sha256"]] for part in ordered]),
            "num_vectors": sum(part["num_vectors"] for part in ordered),
            "num_labeled": sum(part["num_labeled"] for part in ordered),
            "block_rows": BLOCK_ROWS,
            **facts,
        },
    )
