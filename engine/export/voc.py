"""Pascal VOC: the list of a split, for ImageSets/Main; with --copy the whole layout, with the boxes that the pool has."""

from __future__ import annotations

import posixpath
import xml.etree.ElementTree as ElementTree

from engine.export.entries import Entry
from engine.export.job import Files, Job, relative
from engine.schema import InputError

SPLIT = "ImageSets/Main/trainval.txt"


def _add(parent: ElementTree.Element, name: str, text: str = "") -> ElementTree.Element:
    node = ElementTree.SubElement(parent, name)
    node.text = text or None
    return node


def _annotation(entry: Entry, file: str, job: Job) -> bytes:
    """Return an image's annotation: VOC counts pixels from 1, and a box includes its last one."""
    root = ElementTree.Element("annotation")
    _add(root, "folder", "JPEGImages")
    _add(root, "filename", file)
    size = _add(root, "size")
    for name, value in zip(("width", "height", "depth"), (*entry.size, 3), strict=True):
        _add(size, name, str(value))
    for box in entry.boxes or ():
        found = _add(root, "object")
        _add(found, "name", job.class_name(box["label"]))
        _add(found, "difficult", str(int(box["crowd"])))
        corners = _add(found, "bndbox")
        right, bottom = box["x"] + box["width"], box["y"] + box["height"]
        for name, value in zip(("xmin", "ymin", "xmax", "ymax"), (box["x"] + 1, box["y"] + 1, right, bottom), strict=True):
            _add(corners, name, f"{value:g}")
    ElementTree.indent(root)
    return ElementTree.tostring(root)


def write(job: Job) -> Files:
    """Return the list, one name a line, and the annotations of images that are copied."""
    stems, files = list[str](), Files()
    for entry in job.entries:
        stem = posixpath.splitext(relative(entry, "VOC"))[0]
        stems.append(stem)
        if job.copies and entry.boxes is not None:
            files[f"Annotations/{stem}.xml"] = _annotation(entry, posixpath.basename(entry.file), job)
    spaced = next((stem for stem in stems if len(stem.split()) != 1), None)
    if spaced is not None:
        raise InputError(f"VOC's lists take no name with a space, and there is {spaced!r}: pass --copy, which gives it another")
    twice = next((stem for stem in stems if stems.count(stem) > 1), None) if len(set(stems)) < len(stems) else None
    if twice is not None:
        raise InputError(f"VOC calls images by their names without endings, and two are called {twice!r}: pass --copy")
    if job.copies:
        files.setdefault("Annotations/.keep", b"")
    return {SPLIT: "".join(f"{stem}\n" for stem in stems).encode(), **files}
