"""Labels that come apart from their pool, as an annotation tool gives them back: a table of ids and labels, or COCO.

A file may say more than was asked for. Only what it says of the chosen images is kept, and goes to whoever gathers them;
the rest is counted. Not even class names are taken from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from engine.arrays import Ints
from engine.chosen import SHOWN, Chosen, names_of
from engine.classes import check_range, codes_of, renamed
from engine.folders import digest_of
from engine.places import Place
from engine.schema import InputError, first_line
from engine.sources import Pool, ids_of
from engine.sources.boxes import LEFT_OUT
from engine.sources.coco import read_annotations
from engine.sources.ids import hashes
from engine.sources.listing import LISTING_ROWS, row_names
from engine.sources.objects import boxes_of, category_names
from engine.sources.roles import OBJECTS, box_fields, class_label_names
from engine.sources.rows import SIZES, sizes_of
from engine.sources.tables import TABLES, batches, schema_of, suffix_of

ID, LABEL = ("id", "file_name", "path", "uri"), ("label", "labels", "class", "category")
"""The usual names of the two columns."""
LINES = (".jsonl", ".ndjson")
"""Files with a JSON object a line."""
LABEL_FILES = (".json", ".csv", ".tsv", *sorted(TABLES), *LINES)
"""Endings of the files that labels are read from; .json is COCO."""


@dataclass(frozen=True)
class Labels:
    """What a file says of k of the chosen images, by the names under which they were chosen.

    `codes` (k,) int64, -1 where an image has no label; `boxes` one list an image, or None where the file has labels only.
    `class_names` are what the codes mean; None where labels are numbers and nothing names them. `num_unused` of the file's
    entries are of other images, `num_unknown` of those of none of the pool's; `left_out` counts boxes by reason.
    """

    uri: str
    ids: pa.Array
    codes: Ints
    boxes: pa.ListArray | None
    class_names: tuple[str, ...] | None
    num_unused: int = 0
    num_unknown: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    by_row: bool = False

    @property
    def digest(self) -> str:
        """Over what is said of the chosen images: more entries for others make no difference."""
        boxes = self.boxes.to_pylist() if self.boxes is not None else None
        return digest_of([self.ids.to_pylist(), self.codes.tolist(), boxes, self.class_names])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.ids.to_pylist())}

    def find(self, ids: Sequence[str]) -> Ints:
        """Return the place of each id among the k, (m,) int64, -1 for one that the file does not name."""
        return np.array([self._places.get(name, -1) for name in ids], dtype=np.int64)


@dataclass(frozen=True)
class _Said:
    """A file's entries for the images that were asked for, and the hashes of the ids of the others."""

    table: pa.Table
    others: npt.NDArray[np.uint64]
    shown: list[str]


@dataclass(frozen=True)
class Asked:
    """Whose labels are wanted: the images' names, in their order, and `every`, the ids of all that there are, in batches.

    `by_row`: images are called by their rows' numbers.
    """

    names: list[str]
    every: Callable[[], Iterable[pa.Array]]
    by_row: bool = False


def read_labels(
    uri: str, pool: Pool, chosen: Chosen, class_names: Sequence[str] | None, id_column: str | None, label_column: str | None
) -> Labels:
    """Read what a file says of the chosen images of a pool, as `read_asked`.

    Ids are the pool's, or the rows' numbers where the selection calls images that.
    """

    def numbers() -> Iterator[pa.Array]:
        starts = range(0, pool.num_rows, LISTING_ROWS)
        return (row_names(start, min(LISTING_ROWS, pool.num_rows - start)) for start in starts)

    if not Place(uri).exists():
        raise InputError(f"--labels {uri!r} does not exist")
    every = numbers if chosen.by_row else lambda: ids_of(pool)
    return read_asked(uri, Asked(names_of(chosen, pool), every, chosen.by_row), class_names, id_column, label_column)


def read_asked(
    uri: str, asked: Asked, class_names: Sequence[str] | None, id_column: str | None, label_column: str | None
) -> Labels:
    """Read what a file says of some images: COCO (.json; file names are the ids), or a table with ids and labels.

    A table is CSV, TSV, Parquet, Arrow or JSON lines; boxes are in its `objects`, as in the Hugging Face convention.
    `class_names` are those that labels must be of, by name or number; without them names become classes in their order.

    Raises InputError for a file that is neither, or says nothing of any of the images; for an image with two labels, and a
    class that is not among those. An image without an entry is the business of who needs one.
    """
    place = Place(uri)
    suffix = suffix_of(place.path)
    if suffix == ".json":
        return _of_coco(place, asked, class_names)
    if suffix not in LABEL_FILES:
        raise InputError(f"--labels {uri!r} is neither COCO (.json) nor a table ({', '.join(LABEL_FILES[1:])})")
    return _of_table(place, asked, class_names, id_column, label_column)


def _unknown_to(asked: Asked, others: npt.NDArray[np.uint64]) -> int:
    """Return how many different ids, by their hashes, are of no image: one pass over all ids, where there are any."""
    left = np.unique(others)
    for some in asked.every() if len(left) else ():
        left = left[~np.isin(left, hashes(some))]
        if not len(left):
            break
    return len(left)


def _check_some(place: Place, found: int, shown: Sequence[str], names: Sequence[str]) -> None:
    if not found:
        theirs, ours = (", ".join(repr(name) for name in some[:SHOWN]) for some in (shown, names))
        raise InputError(
            f"{place.uri} names none of the {len(names):,} images chosen: its ids are {theirs or 'none'} ..., theirs {ours} ..."
        )


def _of_coco(place: Place, asked: Asked, class_names: Sequence[str] | None) -> Labels:
    found = read_annotations(place, frozenset(asked.names))
    _check_some(place, len(found.images), found.others, asked.names)
    ids = pa.array([image["file_name"] for image in found.images], pa.string())
    boxes, theirs = found.boxes, found.class_names
    if class_names and tuple(class_names) != theirs:
        boxes, theirs = renamed(boxes, theirs, class_names, place.uri), tuple(class_names)
    others = hashes(pa.array(found.others, pa.string()))
    return Labels(
        place.uri,
        ids,
        np.full(len(ids), -1, dtype=np.int64),
        boxes,
        theirs or None,
        len(others),
        _unknown_to(asked, others),
        {reason: found.left_out[reason] for reason in LEFT_OUT},
        asked.by_row,
    )


def _column(schema: pa.Schema, given: str | None, usual: Sequence[str], flag: str, place: Place) -> str:
    for name in (given, *usual):
        if name is not None and name in schema.names:
            return name
    raise InputError(f"{place.uri} has columns {', '.join(schema.names)}: say with {flag} which it is ({', '.join(usual)})")


def _json_lines(place: Place) -> pa.Table:
    try:
        return pyarrow.json.read_json(pa.BufferReader(place.read()))
    except pa.ArrowInvalid as error:
        raise InputError(f"{place.uri} cannot be read as JSON lines: {first_line(error)}") from error


def _of_table(
    place: Place, asked: Asked, class_names: Sequence[str] | None, id_column: str | None, label_column: str | None
) -> Labels:
    lines = _json_lines(place) if suffix_of(place.path) in LINES else None
    schema = schema_of(place) if lines is None else lines.schema
    key = _column(schema, id_column, ID, "--id-column", place)
    boxed = label_column not in schema.names and OBJECTS in schema.names and bool(box_fields(schema.field(OBJECTS).type))
    value = OBJECTS if boxed else _column(schema, label_column, LABEL, "--label-column", place)
    wanted = [key, value, *(name for name in SIZES if boxed and name in schema.names)]
    read = batches(place, wanted) if lines is None else iter(lines.select(wanted).to_batches())
    said = _entries(place, key, read, pa.array(asked.names, pa.string()))
    _check_some(place, len(said.table), said.shown, asked.names)
    table = _once(place, said.table, key, value)
    column = table[value].combine_chunks()
    codes, boxes, left_out, classes = np.full(len(table), -1, dtype=np.int64), None, dict[str, int](), class_names
    if boxed:
        found = class_label_names(schema, value, (box_fields(column.type) or ("", ""))[1])
        boxes, left_out, classes = _boxes(place, table, column, found, class_names)
    else:
        codes, classes = codes_of(place.uri, column, class_label_names(schema, value), class_names)
    unknown = _unknown_to(asked, said.others)
    ids = table[key].combine_chunks()
    named = tuple(classes) if classes is not None else None
    return Labels(place.uri, ids, codes, boxes, named, len(said.others), unknown, left_out, asked.by_row)


def _entries(place: Place, key: str, read: Iterator[pa.RecordBatch], names: pa.Array) -> _Said:
    """Return the rows of a table, its ids as text, that name one of `names`."""
    kept, others, shown, row = list[pa.Table](), [np.empty(0, np.uint64)], list[str](), 0
    for batch in read:
        ids = batch[key].cast(pa.string())
        if ids.null_count:
            raise InputError(f"{place.uri}: row {row + ids.is_null().to_pylist().index(True)} has no {key}")
        asked = pc.is_in(ids, value_set=names)
        table = pa.Table.from_batches([batch])
        kept.append(table.set_column(table.column_names.index(key), key, ids).filter(asked))
        strangers = ids.filter(pc.invert(asked))
        others.append(hashes(strangers))
        shown += strangers[: SHOWN - len(shown)].to_pylist()
        row += len(batch)
    if not kept:
        raise InputError(f"{place.uri} is empty: it has no rows")
    return _Said(pa.concat_tables(kept), np.concatenate(others), shown)


def _once(place: Place, table: pa.Table, key: str, value: str) -> pa.Table:
    """Return a table with each id once; raises InputError where one comes with two different labels."""
    first: dict[str, int] = {}
    ids, again = table[key].to_pylist(), list[tuple[int, int]]()
    for at, name in enumerate(ids):
        if first.setdefault(name, at) != at:
            again.append((first[name], at))
    for one, other in again:
        left, right = table[value][one].as_py(), table[value][other].as_py()
        if left != right:
            raise InputError(f"{place.uri} says two things of {ids[one]!r}, {left!r} and {right!r}: which is meant?")
    return table.take(pa.array(list(first.values()), pa.int64())) if again else table


def _boxes(
    place: Place, table: pa.Table, column: pa.Array, named: Sequence[str] | None, class_names: Sequence[str] | None
) -> tuple[pa.ListArray, dict[str, int], tuple[str, ...] | None]:
    """Return the boxes in a column of objects, how many were left out, and their class names."""
    texts = category_names(column)
    theirs = tuple(named) if named else tuple(sorted(set(texts.to_pylist()) - {None})) if texts is not None else None
    sides = {name: table[name].combine_chunks() for name in table.column_names if name in SIZES}
    boxes, left_out = boxes_of(column, sizes_of(sides, len(table)), theirs, place.uri)
    if class_names and theirs and tuple(class_names) != theirs:
        boxes = renamed(boxes, theirs, class_names, place.uri)
    classes = tuple(class_names) if class_names else theirs
    check_range(place.uri, boxes.flatten().field("label").to_numpy(), classes)
    return boxes, {reason: left_out[reason] for reason in LEFT_OUT}, classes
