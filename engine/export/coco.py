"""A COCO subset: the images, and the boxes that the pool has of them."""

from __future__ import annotations

from typing import Any

from engine.export.job import Files, Job, as_json, relative

NAME = "annotations.json"


def write(job: Job) -> Files:
    """Return the file; `pool_id` is what an image is called here. Without any boxes in the pool it has no `annotations`."""
    images, annotations, annotated, most = list[dict[str, Any]](), list[dict[str, Any]](), False, -1
    for entry in job.entries:
        width, height = entry.size
        name = relative(entry, "COCO")
        image = {"id": entry.rank + 1, "file_name": name, "width": width, "height": height}
        images.append({**image, "pool_id": entry.id, "pool_row": entry.row})
        annotated |= entry.boxes is not None
        for box in entry.boxes or ():
            sides = [box["x"], box["y"], box["width"], box["height"]]
            most = max(most, box["label"])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": entry.rank + 1,
                    "category_id": box["label"] + 1,
                    "bbox": sides,
                    "area": sides[2] * sides[3],
                    "iscrowd": int(box["crowd"]),
                    "segmentation": [],
                }
            )
    names = job.class_names or tuple(map(job.class_name, range(most + 1)))
    categories = [{"id": code + 1, "name": name, "supercategory": ""} for code, name in enumerate(names)]
    drawn = {"annotations": annotations} if annotated else {}
    return {NAME: as_json({"info": {"description": "coresift"}, "images": images, **drawn, "categories": categories})}
