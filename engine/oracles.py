"""Who labels what rounds pick: the subject's own labels, a file, or people who are asked in a folder and waited for.

An oracle is asked for the picks of one round and says nothing of others: what else it knows is counted, and goes nowhere.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engine.arrays import Ints
from engine.chosen import SHOWN, Chosen, names_of
from engine.classes import codes_of
from engine.labels import LABEL_FILES, Asked, Labels, read_asked, read_labels
from engine.places import Place
from engine.schema import InputError
from engine.sources import Pool, read_rows
from engine.sources.boxes import BOXES
from engine.sources.tables import suffix_of
from engine.store import FeatureStore, labels_numpy, table_bytes

COLUMN = "column"
UNUSED = "unused"
LISTS = ("to_label.csv", "ids.txt")
"""What is asked for in a folder: the picks with all that is known of them, and their ids alone."""


@dataclass(frozen=True)
class Oracle:
    """Who is asked: `column`, `file` or `folder`, and which: the column's name, '' for the usual one, or the address."""

    kind: str
    where: str


def open_oracle(text: str) -> Oracle:
    """Return what --oracle names; raises InputError for what is not there, or can't hold labels."""
    if text == COLUMN or text.startswith(f"{COLUMN}:"):
        return Oracle(COLUMN, text[len(COLUMN) + 1 :])
    kind = Place(text).kind()
    if kind == pafs.FileType.NotFound:
        raise InputError(
            f"--oracle {text!r} does not exist: give column, column:NAME, a file of labels, or a folder, made beforehand, in "
            "which they will be asked for"
        )
    if kind == pafs.FileType.File and suffix_of(Place(text).path) not in LABEL_FILES:
        raise InputError(f"--oracle {text!r} is neither COCO (.json) nor a table ({', '.join(LABEL_FILES[1:])})")
    return Oracle("folder" if kind == pafs.FileType.Directory else "file", text)


class Subject(Protocol):
    """What is labelled; rows are picks of a round, and what is said of them is in their order or found by their names."""

    @property
    def boxes(self) -> bool:
        """Whether images need boxes, else a class."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """What labels are of, by name or number; None where classes are numbers."""

    def names(self, rows: Ints) -> list[str]:
        """Return the ids of some rows, in their order."""

    def uris(self, rows: Ints) -> list[str]:
        """Return where the images of some rows are, '' where that is not known."""

    def own(self, rows: Ints) -> Labels:
        """Return the subject's own labels of some rows, and of no others."""

    def said(self, uri: str, rows: Ints) -> Labels:
        """Return what a file says of some rows; raises InputError as `read_asked`."""


@dataclass(frozen=True)
class PoolSubject:
    """A pool of images; `labelled` is the same pool, read for the labels that the oracle gives."""

    pool: Pool
    labelled: Pool
    boxes: bool
    class_names: tuple[str, ...] | None
    id_column: str | None
    label_column: str | None

    def names(self, rows: Ints) -> list[str]:
        """Return the ids of some rows, in their order."""
        ordered = np.sort(rows)
        names = np.array(names_of(Chosen(ordered, ""), self.pool), dtype=object)
        return [str(name) for name in names[np.searchsorted(ordered, rows)]]

    def uris(self, rows: Ints) -> list[str]:
        """Return where the images are."""
        found = {sample.row: sample.uri for sample in read_rows(self.pool, np.sort(rows))}
        return [found[row] for row in rows.tolist()]

    def own(self, rows: Ints) -> Labels:
        """Return the labels or boxes that the pool has of some rows: those images are read, and no others."""
        samples = list(read_rows(self.labelled, np.sort(rows)))
        ids = pa.array([sample.id for sample in samples], pa.string())
        codes = np.array([-1 if sample.label is None else sample.label for sample in samples], dtype=np.int64)
        boxes = pa.array([sample.extra.get(BOXES.name) for sample in samples], BOXES.type)
        return Labels(self.labelled.uri, ids, codes, boxes, self.class_names)

    def said(self, uri: str, rows: Ints) -> Labels:
        """Return what a file says of some rows."""
        chosen = Chosen(np.sort(rows), "")
        return read_labels(uri, self.pool, chosen, self.class_names, self.id_column, self.label_column)


@dataclass(frozen=True)
class StoreSubject:
    """A feature store; `column` is that of the labels which it has itself."""

    store: FeatureStore
    column: str
    class_names: tuple[str, ...] | None
    boxes: bool = False

    def names(self, rows: Ints) -> list[str]:
        """Return the ids of some rows, in their order."""
        return self.store.ids(rows)

    def uris(self, rows: Ints) -> list[str]:
        """Return nothing: vectors are nowhere to be looked at."""
        return [""] * len(rows)

    def own(self, rows: Ints) -> Labels:
        """Return the labels that the store has of some rows."""
        column = self.store.read_column(self.column).take(pa.array(np.searchsorted(self.store.rows, rows)))
        if self.column == "label":
            codes: Ints = labels_numpy(column)
        else:
            codes, _ = codes_of(self.store.place.uri, column.combine_chunks(), None, self.class_names)
        return Labels(self.store.place.uri, pa.array(self.names(rows), pa.string()), codes, None, self.class_names)

    def said(self, uri: str, rows: Ints) -> Labels:
        """Return what a file says of some rows."""
        asked = Asked(self.names(rows), lambda: self.store.read_column("id").chunks)
        return read_asked(uri, asked, self.class_names, None, None)


@dataclass(frozen=True)
class Waiting:
    """Labels are awaited: of so many images of a round, in a folder."""

    number: int
    num_images: int
    place: Place


def answer(oracle: Oracle, subject: Subject, number: int, picks: Ints) -> Labels | Waiting:
    """Return the labels of a round's picks (b,), in pick order, or that they are awaited.

    Raises InputError that counts the picks without one and names the first; for a folder in which others were asked for.
    """
    if oracle.kind == COLUMN:
        labels = subject.own(picks)
    elif oracle.kind == "file":
        labels = subject.said(oracle.where, picks)
    else:
        place = Place(oracle.where).at(f"round-{number:02d}")
        file = _answered(place, subject, picks)
        if file is None:
            return Waiting(number, len(picks), place)
        labels = subject.said(file.address, picks)
    if subject.class_names is None and labels.class_names is not None:
        raise InputError(f"{labels.uri} names its classes, and neither the subject nor --test does: give them by number")
    _check_all(labels, subject, number, picks)
    return labels


def _answered(place: Place, subject: Subject, picks: Ints) -> Place | None:
    """Ask for the labels of some picks in a folder; return the file of labels that is there, or None."""
    names, listed = subject.names(picks), place.at(LISTS[1])
    text = "".join(f"{name}\n" for name in names).encode()
    if not listed.exists():
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(["id", "uri", "row", "rank"])
        writer.writerows(zip(names, subject.uris(picks), picks.tolist(), range(len(picks)), strict=True))
        place.at(LISTS[0]).write(sink.getvalue().encode())
        listed.write(text)
    elif listed.read() != text:
        raise InputError(
            f"{listed.uri} asks for other images than this run picked: give each run an --oracle folder of its own"
        )
    found = [name for name in place.names() if name.startswith("labels.") and suffix_of(name) in LABEL_FILES]
    if len(found) > 1:
        raise InputError(f"{place.uri} has {' and '.join(found)}: leave the one that holds the labels")
    return place.at(found[0]) if found else None


def _check_all(labels: Labels, subject: Subject, number: int, picks: Ints) -> None:
    names = subject.names(picks)
    at = labels.find(names)
    if subject.boxes:
        there = (
            np.zeros(len(labels.ids), bool) if labels.boxes is None else labels.boxes.is_valid().to_numpy(zero_copy_only=False)
        )
    else:
        there = labels.codes >= 0
    lacking = [name for name, place in zip(names, at.tolist(), strict=True) if place < 0 or not there[place]]
    if lacking:
        what, shown = "boxes" if subject.boxes else "label", ", ".join(repr(name) for name in lacking[:SHOWN])
        raise InputError(
            f"{labels.uri} has no {what} of {len(lacking):,} of the {len(picks):,} images picked in round {number}: {shown}"
            f"{', ...' if len(lacking) > SHOWN else ''}. Add them and run the same command again: it goes on from here"
        )


def _objects(labels: Labels, at: Sequence[int]) -> pa.Array:
    """Return the boxes of some images as a column of objects, in the Hugging Face convention."""
    assert labels.boxes is not None
    drawn = [
        [
            {
                "bbox": [box[side] for side in ("x", "y", "width", "height")],
                "category": box["label"],
                "iscrowd": int(box["crowd"]),
            }
            for box in labels.boxes[place].as_py()
        ]
        for place in at
    ]
    kind = pa.struct([("bbox", pa.list_(pa.float32())), ("category", pa.int64()), ("iscrowd", pa.int64())])
    return pa.array(drawn, pa.list_(kind))


def _described(class_names: Sequence[str], boxes: bool, unused: int) -> dict[str, str]:
    """Return a labels file's metadata: its class names as `datasets` keeps them, and how many labels were of no use."""
    label = {"names": list(class_names), "_type": "ClassLabel"}
    features: dict[str, Any] = {"objects": [{"category": label}]} if boxes else {"label": label}
    return {"huggingface": json.dumps({"info": {"features": features}}), UNUSED: str(unused)}


def keep_labels(file: Place, before: Place | None, labels: Labels, names: Sequence[str], boxes: bool, least: int = 0) -> None:
    """Write the labels of all images labelled so far: those of the file `before`, and of the images called `names`.

    A Parquet table of id and label, or objects, that says what its classes are called: where nothing names them, by their
    numbers, and there are `least` of them at least.
    """
    at = labels.find(names).tolist()
    values = _objects(labels, at) if boxes else pa.array(labels.codes[at], pa.int64())
    table = pa.table({"id": pa.array(names, pa.string()), "objects" if boxes else "label": values})
    if before is not None:
        table = pa.concat_tables([pq.read_table(pa.BufferReader(before.read())).replace_schema_metadata(None), table])
    class_names = labels.class_names
    if class_names is None:
        codes = table["objects"].combine_chunks().flatten().field("category") if boxes else table["label"]
        class_names = tuple(str(code) for code in range(max(least, 1 + (pc.max(codes).as_py() or 0))))
    file.write(table_bytes(table.replace_schema_metadata(_described(class_names, boxes, labels.num_unused))))


def num_unused(file: Place) -> int:
    """Return how many labels the oracle gave of images that it was not asked for."""
    return int(pq.read_schema(pa.BufferReader(file.read())).metadata[UNUSED.encode()])
