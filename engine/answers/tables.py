"""Answers in other files: COCO, FiftyOne's samples.json, and tables of ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.answers.said import OTHER_SHAPES, Answer, Box, How, Said, number, read_json
from engine.labels import ID, LABEL
from engine.places import Place
from engine.schema import InputError
from engine.sources.coco import read_annotations
from engine.sources.tables import TABLES, batches, schema_of, suffix_of

ENDINGS = (".csv", ".tsv", *sorted(TABLES))


def read_coco(place: Place, how: How) -> Said:
    """Return the boxes of a COCO file; an image without a box has no answer, unless `how.empty`."""
    found = read_annotations(place)
    said = Said(names=[image["file_name"] for image in found.images], class_names=found.class_names)
    for image, drawn in zip(found.images, found.boxes.to_pylist(), strict=True):
        if drawn is None or not (drawn or how.empty):
            continue
        boxes = [Box(found.class_names[b["label"]], b["x"], b["y"], b["width"], b["height"], bool(b["crowd"])) for b in drawn]
        size = (image["width"], image["height"]) if image.get("width") and image.get("height") else None
        said.answers.append(Answer(image["file_name"], None, tuple(boxes), size))
    for reason, count in found.left_out.items():
        said.notes[f"boxes left out: {reason}"] += count
    return said


def _detections(sample: dict[str, Any], found: Sequence[Any], what: str) -> tuple[tuple[Box, ...], tuple[int, int]]:
    metadata = sample.get("metadata") or {}
    if not metadata.get("width") or not metadata.get("height"):
        raise InputError(f"{what} has boxes and no size: run dataset.compute_metadata() before the export")
    wide, high = int(metadata["width"]), int(metadata["height"])
    boxes = []
    for box in found:
        sides = box.get("bounding_box") if isinstance(box, dict) else None
        if not isinstance(sides, list) or len(sides) != 4:
            raise InputError(f"{what} has a box with bounding_box {sides!r}; it takes four numbers")
        x, y, width, height = (number(side, f"{what}: bounding_box") for side in sides)
        boxes.append(Box(str(box.get("label")), x * wide, y * high, width * wide, height * high, bool(box.get("iscrowd"))))
    return tuple(boxes), (wide, high)


def read_fiftyone(place: Place, how: How) -> Said:
    """Return what one field of FiftyOne's samples says: Classification, or Detections."""
    content, said = read_json(place), Said()
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list) or not all(isinstance(s, dict) and isinstance(s.get("filepath"), str) for s in samples):
        raise InputError(f"{place.uri} is not FiftyOne's: give the samples.json of a data set that it exported")
    seen = False
    for sample in samples:
        name = str(sample.get("pool_id") or sample["filepath"])
        said.names.append(name)
        value = sample.get(how.field)
        seen |= how.field in sample
        kind = value.get("_cls") if isinstance(value, dict) else None
        if value is None:
            continue
        if kind == "Classification":
            said.answers.append(Answer(name, None if value.get("label") is None else str(value["label"])))
        elif kind == "Detections":
            boxes, size = _detections(sample, value.get("detections") or (), f"{place.uri}: {name!r}")
            if boxes or how.empty:
                said.answers.append(Answer(name, None, boxes, size))
        else:
            said.notes[OTHER_SHAPES] += 1
    if not seen:
        fields = sorted({key for sample in samples for key in sample if not key.startswith("_")})
        raise InputError(f"{place.uri} has no field {how.field!r} (one of: {', '.join(fields)}): name it with --field")
    return said


def _column(names: Sequence[str], given: str | None, usual: Sequence[str], flag: str, place: Place) -> str:
    found = next((name for name in ((given,) if given else usual) if name in names), None)
    if found is None:
        raise InputError(f"{place.uri} has columns {', '.join(names)}: say with {flag} which it is ({', '.join(usual)})")
    return found


def read_table(place: Place, how: How) -> Said:
    """Return the labels of a table, in its order; an empty one is no answer."""
    if suffix_of(place.path) not in ENDINGS:
        raise InputError(f"{place.uri} is no table ({', '.join(ENDINGS)})")
    names = schema_of(place).names
    key = _column(names, how.id_column, ID, "--id-column", place)
    value = _column(names, how.label_column, LABEL, "--label-column", place)
    said = Said()
    for batch in batches(place, [key, value]):
        for name, label in zip(batch[key].to_pylist(), batch[value].to_pylist(), strict=True):
            said.names.append(str(name))
            if label not in (None, ""):
                said.answers.append(Answer(str(name), str(label)))
    return said
