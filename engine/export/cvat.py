"""CVAT's dataset manifest (manifest.jsonl, version 1.1), as its import from a cloud storage reads it.

Names are without their ending and below the root of the storage; sizes are those of the image as it is shown.
"""

from __future__ import annotations

import posixpath
from typing import Any

from engine.export.job import Files, Job, as_json, relative

NAME = "manifest.jsonl"


def write(job: Job) -> Files:
    """Return the manifest: two lines that say what it is, then an image a line; `meta.pool_id` is what it is called here."""
    lines: list[dict[str, Any]] = [{"version": "1.1"}, {"type": "images"}]
    for entry in job.entries:
        name, extension = posixpath.splitext(relative(entry, "CVAT"))
        meta: dict[str, Any] = {"related_images": [], "pool_id": entry.id}
        meta |= {"orientation": entry.orientation} if entry.orientation != 1 else {}
        width, height = entry.shown
        lines.append({"name": name, "extension": extension, "width": width, "height": height, "meta": meta})
    return {NAME: b"".join(map(as_json, lines))}
