"""COCO: a json of images, annotations and categories, and a folder of the images.

Rows are the images in the file's order, their id is the file name, `image_id` is COCO's own. Boxes are clipped to the
image's width and height where the file says them. Segmentations are dropped while the file is read; what is left of it is
in memory while it is listed.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from engine.folders import digest_of
from engine.places import Place
from engine.schema import InputError
from engine.sources import paths
from engine.sources.boxes import BOXES, Drawn, boxes_array
from engine.sources.ids import check_unique
from engine.sources.listing import LISTING_ROWS, Listing, ListingWriter
from engine.sources.pool import Columns, Pool, check_inside

USES = frozenset(("images",))
FURTHER = pa.schema([pa.field("image_id", pa.string()), BOXES])

TRIED = 20
"""Images that are looked for to find their folder: the first ones may be missing."""

read, ids = paths.read, paths.ids


def _slim(record: dict[str, Any]) -> dict[str, Any]:
    """Drop what takes most of a file and is of no use here, as soon as it was read."""
    record.pop("segmentation", None)
    return record


def _load(place: Place) -> dict[str, Any]:
    try:
        with place.fs.open_input_stream(place.path) as stream:
            content = json.load(stream, object_hook=_slim)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{place.uri} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise InputError(f"{place.uri} is not a COCO file: it has no list of `images`")
    for name in ("images", "annotations", "categories"):
        if not all(isinstance(record, dict) for record in content.get(name) or ()):
            raise InputError(f"{place.uri} is not a COCO file: `{name}` is not a list of objects")
    if not content["images"]:
        raise InputError(f"{place.uri} is empty: its list of `images` has none")
    return content


def _images_of(place: Place, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the images; raises InputError where one lacks what it needs, climbs out, or comes twice."""
    images: list[dict[str, Any]] = content["images"]
    for row, image in enumerate(images):
        if not isinstance(image.get("id"), int | str) or not isinstance(image.get("file_name"), str):
            raise InputError(f"{place.uri}: row {row} of `images` has no id, or no file_name")
        check_inside(image["file_name"], place.uri)
    for what in ("id", "file_name"):
        column = pa.array([str(image[what]) for image in images], pa.string())
        check_unique(functools.partial(iter, [column]), len(images), f"{place.uri}, {what}")
    return images


def _classes_of(place: Place, content: dict[str, Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Return the class names, in the order of the categories' ids, and the label of each category's id."""
    categories = content.get("categories") or []
    for category in categories:
        if not isinstance(category.get("id"), int) or not isinstance(category.get("name"), str):
            raise InputError(f"{place.uri}: category {category!r} has no id, a whole number, or no name")
    categories.sort(key=lambda category: category["id"])
    for one, other in itertools.pairwise(categories):
        if one["id"] == other["id"]:
            raise InputError(f"{place.uri}: categories {one['name']!r} and {other['name']!r} both have id {one['id']}")
    return tuple(c["name"] for c in categories), {c["id"]: code for code, c in enumerate(categories)}


def _found(place: Place, annotation: dict[str, Any], what: str, table: dict[Any, int], where: str) -> int:
    value = annotation.get(what)
    if not isinstance(value, int | str) or value not in table:
        name = annotation.get("id")
        raise InputError(f"{place.uri}: annotation {name!r} has {what} {value!r}, which is not among the file's {where}")
    return table[value]


def _box(place: Place, annotation: dict[str, Any]) -> list[float]:
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
        raise InputError(f"{place.uri}: annotation {annotation.get('id')!r} has bbox {box!r}; it takes four numbers")
    return box


def _drawn(place: Place, content: dict[str, Any], classes: dict[Any, int]) -> Drawn:
    rows = {image["id"]: row for row, image in enumerate(content["images"])}
    boxed = [annotation for annotation in content.get("annotations") or () if annotation.get("bbox") not in (None, [])]
    return Drawn(
        np.array([_found(place, a, "image_id", rows, "images") for a in boxed], np.int64),
        np.array([_found(place, a, "category_id", classes, "categories") for a in boxed], np.int64),
        np.array([_box(place, a) for a in boxed], np.float64).reshape(-1, 4),
        np.array([bool(a.get("iscrowd")) for a in boxed], bool),
    )


def _base(place: Place, images: list[dict[str, Any]], given: str | None) -> Place:
    """Return the folder given; else the json's, images/ or one named like the json, whichever has one of the first images."""
    if given is not None:
        base = Place(given)
        if base.kind() != pafs.FileType.Directory:
            raise InputError(f"--images {given!r} is not a folder")
        return base
    here = place.folder
    places = [here, here.at("images"), here.at(place.name.removesuffix(".json"))]
    for image in images[:TRIED]:
        for base in places:
            if base.at(*image["file_name"].split("/")).exists():
                return base
    raise InputError(
        f"{place.uri} names images, such as {images[0]['file_name']!r}, that are in none of "
        f"{', '.join(base.uri for base in places)}: say where they are with --images"
    )


def _listing(images: list[dict[str, Any]], boxes: pa.ListArray) -> Listing:
    writer = ListingWriter(paths.listing_schema(False, None, FURTHER))
    for start in range(0, len(images), LISTING_ROWS):
        some = images[start : start + LISTING_ROWS]
        ids = pa.array([str(image["id"]) for image in some], pa.string())
        extra = pa.StructArray.from_arrays([ids, boxes.slice(start, len(some))], fields=list(FURTHER))
        names = pa.array([image["file_name"] for image in some], pa.string())
        writer.add(pa.record_batch([names, extra], schema=writer.schema))
    return writer.finish()


@dataclass(frozen=True)
class Annotations:
    """What a COCO file says: its images, class names, each image's boxes, and how many boxes were left out, by reason.

    `others` are the file names of images that were not asked for.
    """

    images: list[dict[str, Any]]
    class_names: tuple[str, ...]
    boxes: pa.ListArray
    left_out: Counter[str]
    others: list[str]


def read_annotations(place: Place, only: Set[str] | None = None) -> Annotations:
    """Read a COCO file: all of it, or what it says of `only` some file names, whatever may be wrong with the others.

    Raises InputError where something in it is wrong.
    """
    content = _load(place)
    images, others = _images_of(place, content), list[str]()
    names, classes = _classes_of(place, content)
    if only is not None:
        others = [image["file_name"] for image in images if image["file_name"] not in only]
        images = [image for image in images if image["file_name"] in only]
        kept, found = {image["id"] for image in images}, content.get("annotations") or ()
        content["images"] = images
        if "annotations" in content:
            content["annotations"] = [a for a in found if isinstance(a.get("image_id"), int | str) and a["image_id"] in kept]
    sizes = np.array([[image.get("width") or np.nan, image.get("height") or np.nan] for image in images], float).reshape(-1, 2)
    annotated = np.full(len(images), "annotations" in content)
    boxes, left_out = boxes_array(_drawn(place, content, classes), sizes, annotated)
    return Annotations(images, names, boxes, left_out, others)


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the images of a COCO file with their boxes."""
    found = read_annotations(place)
    listing = _listing(found.images, found.boxes)
    base = _base(place, found.images, columns.images)
    detail = {"id": "path", "boxes_left_out": dict(found.left_out)}
    digest = digest_of(["coco", listing.digest, found.class_names])
    return Pool(
        place.address, "coco", len(found.images), digest, found.class_names or None, detail, listing, FURTHER, base.absolute
    )
