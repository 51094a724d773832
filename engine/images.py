"""A small Arrow folder of images with their labels: what a trainer reads, by index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from engine.arrays import Ints
from engine.folders import digest_of, publish, read_manifest
from engine.places import Place
from engine.schema import InputError
from engine.sources.boxes import BOXES

IMAGES = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("label", pa.int64()),
        BOXES,
        ("image", pa.large_binary()),
    ]
)
"""Columns of a part: the pool's row and id; the class, null where there is none; the boxes, null where the image was not
annotated; the image's own file."""


@dataclass(frozen=True)
class Record:
    """One image to learn from: its file's bytes, its class (-1: none) and its boxes.

    `boxes` (m, 4) float32: x, y, width, height in px as stored; `box_labels` (m,) int64; `crowd` (m,) bool.
    """

    row: int
    id: str
    data: bytes
    label: int
    boxes: npt.NDArray[np.float32]
    box_labels: Ints
    crowd: npt.NDArray[np.bool_]


def images_table(records: Sequence[Record]) -> pa.Table:
    """Return records as the rows of one part."""
    boxes = [
        [
            {"label": label, "x": x, "y": y, "width": width, "height": height, "crowd": crowd}
            for label, (x, y, width, height), crowd in zip(
                record.box_labels.tolist(), record.boxes.tolist(), record.crowd.tolist(), strict=True
            )
        ]
        for record in records
    ]
    columns = [
        [record.row for record in records],
        [record.id for record in records],
        [record.label if record.label >= 0 else None for record in records],
        boxes,
        [record.data for record in records],
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, IMAGES, strict=True)]
    return pa.Table.from_arrays(arrays, schema=IMAGES)


def publish_images(
    place: Place, parts: list[dict[str, Any]], class_names: Sequence[str], facts: dict[str, Any]
) -> dict[str, Any]:
    """Publish an images/ folder that was begun, from its finished parts (name, num_images, sha256), in order."""
    return publish(
        place,
        {
            "parts": parts,
            "digest": digest_of([[part["num_images"], part["sha256"]] for part in parts]),
            "num_images": sum(part["num_images"] for part in parts),
            "class_names": list(class_names),
            **facts,
        },
    )


Boxes = tuple[npt.NDArray[np.float32], Ints, npt.NDArray[np.bool_]]
"""(m, 4) x, y, width, height; (m,) labels; (m,) crowd."""


def boxes_of(drawn: Sequence[Mapping[str, Any]] | None) -> Boxes:
    """Return the values of a `boxes` column as arrays; null as none."""
    drawn = drawn or ()
    sides = np.array([[box[side] for side in ("x", "y", "width", "height")] for box in drawn], dtype=np.float32)
    labels = np.array([box["label"] for box in drawn], dtype=np.int64)
    return sides.reshape(-1, 4), labels, np.array([bool(box["crowd"]) for box in drawn], dtype=np.bool_)


def record_of(values: Mapping[str, Any]) -> Record:
    """Return a record from a row's values by column."""
    label = -1 if values["label"] is None else values["label"]
    return Record(values["row"], values["id"], values["image"], label, *boxes_of(values["boxes"]))


class ImageSet:
    """A published images/ folder: `records` by index, in the order in which they were gathered.

    Parts are mapped where the folder is on a local disk, else fetched whole, once a process.
    """

    def __init__(self, uri: str) -> None:
        self.place = Place(uri)
        manifest = read_manifest(self.place)
        if manifest is None or manifest["kind"] != "images":
            raise InputError(f"{uri} is not a finished folder of images")
        self.manifest = manifest
        self.digest: str = manifest["digest"]
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])

    def __len__(self) -> int:
        return int(self.manifest["num_images"])

    @cached_property
    def _parts(self) -> list[pa.Table]:
        tables = []
        for part in self.manifest["parts"]:
            file = self.place.at("parts", part["name"])
            local = isinstance(file.fs, pafs.LocalFileSystem)
            source = pa.memory_map(file.path) if local else pa.BufferReader(file.read())
            tables.append(pa.ipc.open_file(source).read_all())
        return tables

    @cached_property
    def _starts(self) -> Ints:
        return np.cumsum([0, *(len(table) for table in self._parts)])

    def record(self, index: int) -> Record:
        """Return the image at a position, 0 <= index < len."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return record_of(self._parts[part].slice(index - int(self._starts[part]), 1).to_pylist()[0])

    def records(self) -> Iterator[Record]:
        """Yield all images, in order."""
        return (self.record(index) for index in range(len(self)))
