"""Box AP as COCO defines it, computed by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.images import Record

FIGURES = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
"""In COCO's own order. AP: averaged over IoU 0.50 to 0.95, 100 boxes an image; small: area below 32^2 px, large: above 96^2
px, as stored; AR_n: recall with n boxes an image."""


def box_ap(
    predictions: Sequence[np.ndarray[Any, np.dtype[np.float32]]], records: Sequence[Record], class_names: Sequence[str]
) -> list[tuple[str, float | None, str]]:
    """Return COCO's twelve figures, then AP of each class, as (metric, value, note).

    A figure is None where there is no box to find (of that size, of that class). Boxes that are found in a crowd count
    neither for nor against. The area of a box stands for that of a segmentation.

    FreeSel and the VOC papers report AP at IoU 0.5 with 11 recall points (VOC 2007): AP50, with COCO's 101 points, is
    close to it and not the same.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    evaluator = COCOeval_faster(*_both(COCO, predictions, records, class_names), iouType="bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    values = [float(value) for value in evaluator.stats[: len(FIGURES)]]
    results: list[tuple[str, float | None, str]] = [_result(name, value) for name, value in zip(FIGURES, values, strict=True)]
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # IoU x recall x class: all sizes, 100 boxes
    for index, name in enumerate(class_names):
        defined = precision[:, :, index][precision[:, :, index] > -1]
        results.append(_result(f"AP/{name}", float(defined.mean()) if defined.size else -1.0))
    return results


def _result(name: str, value: float) -> tuple[str, float | None, str]:
    """Return one figure; COCO's -1 is none."""
    return (name, value, "") if value > -1 else (name, None, "no such boxes in the truth")


def _both(
    index: Any,
    predictions: Sequence[np.ndarray[Any, np.dtype[np.float32]]],
    records: Sequence[Record],
    class_names: Sequence[str],
) -> list[Any]:
    """Return the truth and the predictions in COCO's form, indexed; ids count from 1."""
    truth = [
        _box(image, label, box, iscrowd=int(crowd))
        for image, record in enumerate(records)
        for label, box, crowd in zip(record.box_labels.tolist(), record.boxes.tolist(), record.crowd.tolist(), strict=True)
    ]
    found = [
        _box(image, int(label), box, score=score, iscrowd=0)
        for image, prediction in enumerate(predictions)
        for *box, score, label in prediction.astype(np.float64).tolist()
    ]
    both = []
    for boxes in (truth, found):
        table = {
            "images": [{"id": image + 1} for image in range(len(records))],
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(class_names)],
            "annotations": [{"id": number + 1, **box} for number, box in enumerate(boxes)],
        }
        both.append(index(table))
    return both


def _box(image: int, label: int, box: list[float], **more: float) -> dict[str, Any]:
    return {"image_id": image + 1, "category_id": label + 1, "bbox": box, "area": box[2] * box[3], **more}
