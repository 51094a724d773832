"""What needs no format: ids, pool rows, and folders of images, in which the images themselves are the export."""

from __future__ import annotations

import json

from engine.export.job import Files, Job


def ids(job: Job) -> Files:
    """Return the ids, one a line."""
    return {"ids.txt": "".join(f"{name}\n" for name in job.wanted.ids).encode()}


def indices(job: Job) -> Files:
    """Return the pool rows in pick order as one JSON list, as the ActiveFT and low-budget tools read them."""
    return {"indices.json": json.dumps(job.wanted.rows.tolist()).encode()}


def imagefolder(job: Job) -> Files:
    """Go through all images: each is put in its class's folder as it is read."""
    for _ in job.entries:
        pass
    return {}
