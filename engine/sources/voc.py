"""Pascal VOC: JPEGImages, Annotations, and the names of a split in ImageSets/Main/SPLIT.txt.

VOC counts pixels from 1 and a box includes its last one, so a box begins at xmin - 1 and is xmax - xmin + 1 wide; one with
xmax <= xmin is taken for a slip, of no area. `difficult` becomes `crowd`: both are boxes that are not to be counted against a
detector. The boxes of a split are in memory while it is listed, 50 bytes each.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from engine.folders import digest_of
from engine.places import Place
from engine.schema import InputError
from engine.sources import paths
from engine.sources.boxes import BOXES, Drawn, boxes_array
from engine.sources.ids import check_unique
from engine.sources.listing import LISTING_ROWS, ListingWriter
from engine.sources.pool import IMAGE_SUFFIXES, Columns, Pool, check_inside
from engine.sources.tables import suffix_of
from engine.sources.walk import entries_of

USES = frozenset(("split",))
FURTHER = pa.schema([BOXES])
DEFAULT_SPLIT = "trainval"
READERS = 16
"""Annotations read at a time: an object store answers many requests at once."""
VOC_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse"),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

read, ids = paths.read, paths.ids


@dataclass(frozen=True)
class Annotation:
    """One image's annotation: its size in px (NaN where unknown), and (class name, x, y, width, height, difficult)."""

    size: tuple[float, float]
    boxes: list[tuple[str, float, float, float, float, bool]]


def is_voc(place: Place) -> bool:
    """Return whether a folder is laid out as VOC's."""
    return place.at("JPEGImages").exists() and place.at("Annotations").exists()


def _number(node: ElementTree.Element | None, path: str, file: Place) -> float:
    text = node.findtext(path) if node is not None else None
    try:
        return float(text or "")
    except ValueError:
        raise InputError(f"{file.uri}: a box has {path} {text!r}; it takes a number") from None


def parse(file: Place) -> Annotation | None:
    """Return an image's annotation, or None where there is no such file."""
    if not file.exists():
        return None
    try:
        root = ElementTree.fromstring(file.read())
    except ElementTree.ParseError as error:
        raise InputError(f"{file.uri} cannot be read as XML: {error}") from error
    boxes = []
    for found in root.iter("object"):
        corners = found.find("bndbox")
        x, y, right, bottom = (_number(corners, path, file) for path in ("xmin", "ymin", "xmax", "ymax"))
        wide, high = (right - x + 1 if right > x else 0.0), (bottom - y + 1 if bottom > y else 0.0)
        difficult = (found.findtext("difficult") or "0").strip() == "1"
        boxes.append(((found.findtext("name") or "").strip(), x - 1, y - 1, wide, high, difficult))
    size = [float(root.findtext(f"size/{side}") or 0) or np.nan for side in ("width", "height")]
    return Annotation((size[0], size[1]), boxes)


def _stems(place: Place, given: str | None, files: dict[str, str]) -> list[str]:
    """Return the names in a split, in its order; without one given, trainval's if it is there, else all images."""
    lists = place.at("ImageSets", "Main")
    splits = [name.removesuffix(".txt") for name in lists.names() if name.endswith(".txt")]
    split = given or DEFAULT_SPLIT
    if split not in splits:
        if given is None and not splits:
            return sorted(files)
        raise InputError(f"{place.uri} has no split {split!r} (one of: {', '.join(splits) or 'none'}): name it with --split")
    lines = lists.at(f"{split}.txt").read().decode().splitlines()
    # a class's own list has 1, 0 or -1 after each name
    stems = [line.split()[0] for line in lines if line.strip()]
    for stem in stems:
        check_inside(stem, f"{place.uri}, split {split}")
    return stems


def _files(place: Place) -> dict[str, str]:
    """Return the images' files by the name without its ending."""
    names = entries_of(place.at("JPEGImages"), "")["path"].to_pylist()
    return {name.rpartition(".")[0]: name for name in names if suffix_of(name) in IMAGE_SUFFIXES}


def _drawn(found: list[Annotation | None]) -> tuple[Drawn, tuple[str, ...]]:
    """Return the boxes of all images, and their class names: VOC's in its own order, others sorted."""
    named = {box[0] for annotation in found if annotation for box in annotation.boxes}
    names = VOC_NAMES if named <= set(VOC_NAMES) else tuple(sorted(named))
    code = {name: index for index, name in enumerate(names)}
    flat = [(row, box) for row, annotation in enumerate(found) if annotation for box in annotation.boxes]
    return Drawn(
        np.array([row for row, _ in flat], np.int64),
        np.array([code[box[0]] for _, box in flat], np.int64),
        np.array([box[1:5] for _, box in flat], np.float64).reshape(-1, 4),
        np.array([box[5] for _, box in flat], bool),
    ), names


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the images of a split with their boxes; an image without an annotation file was not annotated."""
    files = _files(place)
    stems = _stems(place, columns.split, files)
    check_unique(lambda: [pa.array(stems, pa.string())], len(stems), place.uri)
    notes = place.at("Annotations")
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(lambda stem: parse(notes.at(f"{stem}.xml")), stems))
    drawn, names = _drawn(found)
    sizes = np.array([annotation.size if annotation else (np.nan, np.nan) for annotation in found]).reshape(-1, 2)
    boxes, left_out = boxes_array(drawn, sizes, np.array([annotation is not None for annotation in found], bool))
    writer = ListingWriter(paths.listing_schema(True, None, FURTHER))
    for start in range(0, len(stems), LISTING_ROWS):
        some = stems[start : start + LISTING_ROWS]
        extra = pa.StructArray.from_arrays([boxes.slice(start, len(some))], fields=list(FURTHER))
        named = pa.array([files.get(stem, f"{stem}.jpg") for stem in some], pa.string())
        writer.add(pa.record_batch([named, pa.array(some, pa.string()), extra], schema=writer.schema))
    listing = writer.finish()
    detail = {"id": "id", "boxes_left_out": dict(left_out)}
    digest = digest_of(["voc", listing.digest, names])
    base = place.at("JPEGImages").absolute
    return Pool(place.address, "voc", len(stems), digest, names, detail, listing, FURTHER, base)
