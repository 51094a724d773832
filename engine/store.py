"""The feature store: Arrow parts in a published folder, read lazily by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engine.arrays import Ints
from engine.folders import digest_of, publish, read_manifest, read_run
from engine.places import Place
from engine.retry import patiently
from engine.schema import BLOCK_ROWS, InputError

PROBS = "probs"
"""The column that holds the probability of each class, by a classifier, for each image."""
PATTERNS = "patterns"
"""The column that holds a list of vectors for each image."""
DETECTIONS = "detections"
"""The column that holds a list of boxes for each image, which may be empty; any other holds one vector."""
INFLUENCE, STABILITY = "influence", "stability"
SCORES = (INFLUENCE, STABILITY)
"""The columns that hold one number for each image, of what labelling it would be worth; NaN: there is none for it."""
BOX_VALUES = 6
"""Of a box before it is stored: x, y, width, height, score, class."""
DETECTION = pa.struct(
    [("label", pa.int64()), *((name, pa.float32()) for name in ("x", "y", "width", "height", "score"))],
)
"""A stored box: the class, an index into the model's class names; px from the top left corner of the image as stored."""
OWN_COLUMNS = ("row", "id", "label", "width", "height", "phash", "bytes", "content_hash")
"""The columns of every part that `embed` writes, beside its pool's and its vectors."""
TAKEN = frozenset((*OWN_COLUMNS, "embedding", PROBS, PATTERNS, DETECTIONS, *SCORES))
"""Names that a pool's further columns may not have."""
PARTS_WANTED = 64
"""Small pools are cut into about this many parts, so that a handful of actors share them evenly."""
MIN_PART_ROWS = 64


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


def part_rows(num_rows: int) -> int:
    """Return the rows of a part: a power of two from 64 to a block's, so that a part never spans two blocks."""
    rows = MIN_PART_ROWS
    while rows * 2 * PARTS_WANTED <= num_rows and rows < BLOCK_ROWS:
        rows *= 2
    return rows


def part_schema(file: Place) -> pa.Schema:
    """Return a part's columns and metadata: only the end of its file is read."""

    def end() -> pa.Schema:
        with file.fs.open_input_file(file.path) as source:
            return pa.ipc.open_file(source).schema

    return patiently(end, file.uri, file.remote)


def part_name(start: int) -> str:
    """Return the file name of the part that begins at pool row `start`."""
    return f"part-{start:012d}.arrow"


def vectors_array(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """Return (r, d) float16 or float32 values as an Arrow fixed-size list column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def patterns_array(values: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> pa.ListArray:
    """Return (v, d) values as an Arrow column of lists of vectors: the next counts[i] of them are image i's."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), vectors_array(values))


def detections_array(values: npt.NDArray[np.float32], counts: Ints) -> pa.ListArray:
    """Return (v, 6) boxes as an Arrow column of lists of DETECTION: the next counts[i] of them are image i's."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    *sides, label = np.ascontiguousarray(values.T)
    fields = [pa.array(label.astype(np.int64)), *(pa.array(side) for side in sides)]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(fields, fields=list(DETECTION)))


def detections_numpy(column: pa.ChunkedArray) -> list[npt.NDArray[np.float32]]:
    """Return the boxes of each image of a column of them, (m, 6) as they were before they were stored."""
    boxes = column.combine_chunks().flatten()
    names = ("x", "y", "width", "height", "score", "label")
    table = np.stack([boxes.field(name).to_numpy().astype(np.float32) for name in names], axis=1)
    return np.split(table, np.cumsum(vector_counts(column))[:-1]) if len(column) else []


def vectors_numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return a column of vectors as a (v, d) array, without a copy when it has one chunk.

    v is the number of images, or, where the column holds lists of vectors, of all vectors in them, image after image.
    """
    kind = column.type.value_type if pa.types.is_list(column.type) else column.type
    vectors = [chunk.flatten() if pa.types.is_list(column.type) else chunk for chunk in column.chunks]
    width = kind.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, width) for chunk in vectors if len(chunk)]
    if len(chunks) == 1:
        return np.asarray(chunks[0])
    return np.concatenate(chunks) if chunks else np.empty((0, width), dtype=kind.value_type.to_pandas_dtype())


def vector_counts(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return how many vectors each image of a column of vectors has, (r,) int64."""
    if not pa.types.is_list(column.type):
        return np.ones(len(column), dtype=np.int64)
    return np.asarray(pa.compute.list_value_length(column).to_numpy(), dtype=np.int64)


def part_vectors(part: dict[str, Any]) -> int:
    """Return how many vectors a part of a manifest holds: one an image, or its images' patterns."""
    return int(part.get("num_patterns", part["num_vectors"]))


def labels_numpy(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return a nullable integer label column as int64 with -1 for a missing label."""
    return np.asarray(column.fill_null(-1).to_numpy(), dtype=np.int64)


def check_ids(ids: pa.Array | pa.ChunkedArray, uri: str) -> None:
    """Raise InputError where an id is missing or occurs twice; the message names the row or the id."""
    if ids.null_count:
        raise InputError(f"{uri}: row {ids.is_null().to_pylist().index(True)} has no id ({ids.null_count} have none)")
    counts = ids.value_counts()
    if len(counts) != len(ids):
        worst = max(counts.to_pylist(), key=lambda entry: int(entry["counts"]))
        raise InputError(f"{uri}: ids must differ, {worst['values']!r} occurs {worst['counts']} times")


class FeatureStore:
    """A published features/ folder, read lazily.

    `num_rows` pool rows were listed, `num_vectors` have a vector of `dim` floats, or up to `vectors_per_image` of them
    (`num_patterns` in all); the rest are in rejected.parquet. Blocks are ranges of `block_rows` pool rows; a part never
    spans two blocks, nor an image two parts.
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
        self.num_labeled: int = manifest["num_labeled"]
        self.num_patterns = sum(part_vectors(part) for part in manifest["parts"])
        self.vectors_per_image: int = manifest.get("vectors_per_image", 1)
        self.dim: int = manifest["dim"]
        self.column: str = manifest["column"]
        self.block_rows: int = manifest["block_rows"]
        self.digest: str = manifest["digest"]
        self.class_names: list[str] | None = manifest["class_names"]

    @classmethod
    def of_vectors(cls, uri: str) -> FeatureStore:
        """Open a store that holds vectors; raises InputError for one that holds boxes or scores."""
        store = cls(uri)
        if not store.holds_vectors:
            raise no_vectors(store)
        return store

    @property
    def holds_vectors(self) -> bool:
        """Whether its images have vectors, rather than boxes or scores."""
        return self.column not in (DETECTIONS, *SCORES)

    def _why_not(self, uri: str) -> str:
        if not self.place.exists():
            return f"{uri} does not exist: give the folder that `coresift embed` or `coresift import` wrote"
        if read_run(self.place) is not None:
            return f"{uri} is unfinished: run the command that began it again, it goes on where it stopped"
        return f"{uri} is not a feature store (no manifest.json): make one with `coresift embed` or `coresift import`"

    @property
    def num_blocks(self) -> int:
        """How many blocks the pool's rows make."""
        return -(-self.num_rows // self.block_rows)

    @property
    def has_labels(self) -> bool:
        """Whether any vector has a label."""
        return self.num_labeled > 0

    @cached_property
    def schema(self) -> pa.Schema:
        """The names and types of a part's columns: read from the end of the first one."""
        if not self.manifest["parts"]:
            return pa.schema([])
        return part_schema(self.place.at("parts", self.manifest["parts"][0]["name"])).remove_metadata()

    @property
    def columns(self) -> list[str]:
        """The names of the columns beside the vectors."""
        return [name for name in self.schema.names if name != self.column]

    def read_part(self, name: str, columns: Iterable[str] | None = None) -> pa.Table:
        """Return one part, or some columns of it; on a local disk a view of the mapped file, elsewhere what was asked for."""
        place = self.place.at("parts", name)
        if isinstance(place.fs, pafs.LocalFileSystem):  # a mapped file, read whole, is not copied; some of its columns are
            table = pa.ipc.open_file(pa.memory_map(place.path)).read_all()
            return table if columns is None else table.select(list(columns))
        source = place.fs.open_input_file(place.path)
        reader = pa.ipc.open_file(source)
        if columns is None:
            return reader.read_all()
        wanted = [reader.schema.get_field_index(column) for column in columns]
        source.seek(0)
        reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted))
        some = reader.read_all().select(list(columns))
        return pa.ipc.open_file(part_bytes(some)).read_all()  # else these columns keep buffers of the whole part alive

    @cached_property
    def block_parts(self) -> list[list[str]]:
        """The names of each block's parts, in order."""
        names: list[list[str]] = [[] for _ in range(self.num_blocks)]
        for part in self.manifest["parts"]:
            names[part["start"] // self.block_rows].append(part["name"])
        return names

    def read_block(self, index: int, columns: Iterable[str] | None = None) -> pa.Table:
        """Return the vectors of block `index` and their columns, ascending by row."""
        wanted = list(columns) if columns is not None else None
        return pa.concat_tables([self.read_part(name, wanted) for name in self.block_parts[index]])

    def read_column(self, name: str) -> pa.ChunkedArray:
        """Return one small column (row, id, label) of the whole store."""
        return pa.concat_tables([self.read_part(part["name"], [name]) for part in self.manifest["parts"]])[name]

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """The pool rows that have a vector, ascending, (num_vectors,) int64."""
        return np.asarray(self.read_column("row").to_numpy(), dtype=np.int64)

    def having(self, rows: Ints) -> Ints:
        """Return those of some ascending pool rows that have a vector: only the blocks that hold some are read."""
        blocks = np.unique(rows // self.block_rows).tolist()
        found = [self.read_block(index, ["row"])["row"].to_numpy() for index in blocks if self.block_parts[index]]
        return np.intersect1d(rows, np.concatenate([np.empty(0, np.int64), *found]))

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """The label of each vector, (num_vectors,) int64, -1 where unknown."""
        return labels_numpy(self.read_column("label"))

    def vectors(self, rows: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float32]:
        """Return all vectors, or those of some pool rows in the order given, as float32 (n, d) in memory.

        Raises InputError for rows without a vector, and for a store with several vectors an image.
        """
        if self.vectors_per_image > 1:
            raise InputError(
                f"{self.place.uri} has up to {self.vectors_per_image} vectors an image: one an image is needed here"
            )
        if rows is None:
            return vectors_numpy(self.read_column(self.column)).astype(np.float32)
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        for mine, at, table in self._tables_of(rows, self.column):
            out[mine] = vectors_numpy(table[self.column])[at]
        return out

    def scores(self, rows: Ints) -> npt.NDArray[np.float32]:
        """Return the scores of the boxes of some pool rows, in the order given, (n, k) float32, NaN beyond an image's last.

        k is the most boxes that one of them has. Raises InputError for rows without an image.
        """
        found: list[tuple[Ints, Ints, npt.NDArray[np.float32]]] = []
        for mine, at, table in self._tables_of(rows, DETECTIONS):
            boxes = table[DETECTIONS].combine_chunks().take(pa.array(at))
            counts = vector_counts(boxes)
            place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            found.append((np.repeat(mine, counts), place, boxes.flatten().field("score").to_numpy()))
        width = max((int(place.max(initial=-1)) + 1 for _, place, _ in found), default=0)
        out = np.full((len(rows), width), np.nan, dtype=np.float32)
        for row, place, score in found:
            out[row, place] = score
        return out

    def detections(self, rows: Ints) -> list[list[dict[str, Any]]]:
        """Return the boxes of some pool rows, in the order given, each as DETECTION; raises InputError for rows without any."""
        found: list[list[dict[str, Any]]] = [[] for _ in rows]
        for mine, at, table in self._tables_of(rows, DETECTIONS):
            for place, boxes in zip(mine.tolist(), table[DETECTIONS].take(pa.array(at)).to_pylist(), strict=True):
                found[place] = boxes
        return found

    def _tables_of(self, rows: npt.NDArray[np.int64], column: str) -> Iterator[tuple[Ints, Ints, pa.Table]]:
        """Yield (which of `rows`, their places in the table, the table) for every block that some pool rows are in.

        Raises InputError for rows without a vector.
        """
        outside = rows[(rows < 0) | (rows >= self.num_rows)]
        if len(outside):
            raise InputError(f"{self.place.uri} has rows 0 to {self.num_rows - 1}, not {outside[0]}")
        for index in np.unique(rows // self.block_rows):
            table = self.read_block(int(index), ["row", column])
            mine = np.flatnonzero(rows // self.block_rows == index)
            have = table["row"].to_numpy()
            at = np.searchsorted(have, rows[mine])
            if len(have) == 0 or not np.array_equal(have[np.minimum(at, len(have) - 1)], rows[mine]):
                raise InputError(f"{self.place.uri} has no vector for some of rows {rows[mine][:5].tolist()}...")
            yield mine, at, table

    def ids(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Return the ids of some pool rows that have a vector, in the order given; raises InputError for others."""
        return [str(name) for name in self.values(rows, "id")]

    def values(self, rows: Ints, column: str) -> list[Any]:
        """Return a column's values for some pool rows that have a vector, as `ids`; other than the vectors' column."""
        out = np.empty(len(rows), dtype=object)
        for mine, at, table in self._tables_of(rows, column):
            out[mine] = table[column].take(pa.array(at)).to_pylist()
        return list(out)


def no_vectors(store: FeatureStore) -> InputError:
    """Return the error of a store that holds boxes or scores where vectors are needed."""
    what = "the boxes that a detector found" if store.column == DETECTIONS else f"a number for each image ({store.column})"
    return InputError(f"{store.place.uri} holds {what}, not vectors: embed the pool by another encoder")


def _totals(parts: list[dict[str, Any]], count: str) -> dict[str, int]:
    return {count: sum(part[count] for part in parts)} if parts and count in parts[0] else {}


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
            "vectors_per_image": 1,
            **_totals(ordered, "num_detections"),
            "block_rows": BLOCK_ROWS,
            **facts,
        },
    )
