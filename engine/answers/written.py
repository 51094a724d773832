"""Answers as files that `finetune --labels` and `rounds --oracle` read, by the pool's ids."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.answers.said import Answer
from engine.places import Place
from engine.schema import InputError
from engine.sources.pool import check_inside

LABEL_TABLES = (".csv", ".tsv")
BOX_FILES = (".json", ".jsonl")


def write_labels(out: Place, found: Mapping[str, Answer]) -> bytes:
    """Return a table of id and label."""
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter="\t" if out.path.endswith(".tsv") else ",", lineterminator="\n")
    writer.writerow(["id", "label"])
    writer.writerows((name, answer.label) for name, answer in found.items())
    return sink.getvalue().encode()


def write_boxes(out: Place, found: Mapping[str, Answer], class_names: Sequence[str]) -> bytes:
    """Return the boxes, of classes in the order of `class_names`, then of the alphabet: COCO, or a JSON object a line."""
    if out.path.endswith(".jsonl"):
        return _lines(found)
    used = sorted({box.name for answer in found.values() for box in answer.boxes or ()})
    codes = {name: code for code, name in enumerate(dict.fromkeys([*class_names, *used]), 1)}
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, (name, answer) in enumerate(found.items(), 1):
        try:
            check_inside(name, "the pool")
        except InputError as error:
            raise InputError(
                f"COCO calls images by file names, and {name!r} is none: write a --out that ends in .jsonl"
            ) from error
        size = dict(zip(("width", "height"), answer.size, strict=True)) if answer.size else {}
        images.append({"id": number, "file_name": name, **size})
        for box in answer.boxes or ():
            sides = {"bbox": [box.x, box.y, box.width, box.height], "area": box.width * box.height}
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": codes[box.name]}
            annotations.append({**ids, **sides, "iscrowd": int(box.crowd), "segmentation": []})
    categories = [{"id": code, "name": name} for name, code in codes.items()]
    return (json.dumps({"images": images, "annotations": annotations, "categories": categories}) + "\n").encode()


def _lines(found: Mapping[str, Answer]) -> bytes:
    lines = []
    for name, answer in found.items():
        objects = [
            {"bbox": [box.x, box.y, box.width, box.height], "category": box.name, "iscrowd": int(box.crowd)}
            for box in answer.boxes or ()
        ]
        size = dict(zip(("width", "height"), answer.size, strict=True)) if answer.size else {}
        lines.append(json.dumps({"id": name, **size, "objects": objects}))
    return "".join(f"{line}\n" for line in lines).encode()
