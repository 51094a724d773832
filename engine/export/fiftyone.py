"""FiftyOne's data set on disk (metadata.json, samples.json), in the layout that every version of it imports.

`fiftyone.Dataset.from_dir(DIR, fiftyone.types.FiftyOneDataset)` reads it: paths, tags, ids, labels or boxes, predictions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.export.entries import Entry
from engine.export.guesses import Guess
from engine.export.job import Files, Job, as_json

NAME = "samples.json"
TRUTH, PREDICTED = "ground_truth", "predictions"
"""Fields of what the pool says, and a model."""


def _detections(entry: Entry, boxes: Iterable[tuple[str, float, float, float, float, float | None]]) -> dict[str, Any]:
    """Return boxes in px as FiftyOne has them, in shares of the image."""
    wide, high = entry.size
    found = []
    for name, x, y, width, height, score in boxes:
        box: dict[str, Any] = {"_cls": "Detection", "label": name}
        box["bounding_box"] = [x / wide, y / high, width / wide, height / high]
        found.append(box if score is None else {**box, "confidence": score})
    return {"_cls": "Detections", "detections": found}


def _truth(entry: Entry, job: Job) -> dict[str, Any]:
    if entry.boxes is not None:
        sides = ("x", "y", "width", "height")
        boxes = [(job.class_name(box["label"]), *(box[side] for side in sides), None) for box in entry.boxes]
        return {TRUTH: _detections(entry, boxes)}
    return {} if entry.label is None else {TRUTH: {"_cls": "Classification", "label": job.class_name(entry.label)}}


def _predicted(entry: Entry, guess: Guess | None, boxes: bool) -> dict[str, Any]:
    if guess is None:
        return {}
    if boxes:
        return {PREDICTED: _detections(entry, guess.boxes)}
    return {PREDICTED: {"_cls": "Classification", "label": guess.label, "confidence": guess.score}}


def write(job: Job) -> Files:
    """Return the two files; `pool_id` is what an image is called here."""
    samples, guesses = [], job.guesses
    for entry in job.entries:
        width, height = entry.size
        sample: dict[str, Any] = {"filepath": entry.uri, "tags": [entry.tag]}
        sample["metadata"] = {"_cls": "ImageMetadata", "size_bytes": len(entry.data), "width": width, "height": height}
        sample |= {"pool_id": entry.id, "pool_row": entry.row, "rank": entry.rank, **_truth(entry, job)}
        samples.append(sample | (_predicted(entry, guesses.found.get(entry.row), guesses.boxes) if guesses else {}))
    return {"metadata.json": as_json({"media_type": "image"}), NAME: as_json({"samples": samples})}
