"""What people said of one image, whatever tool they said it in."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from engine.places import Place
from engine.schema import InputError

MOST_BYTES = 4 << 30
"""Of a file of answers, unpacked: more is not read."""


@dataclass(frozen=True)
class Box:
    """One box, in px of the image as the tool shows it."""

    name: str
    x: float
    y: float
    width: float
    height: float
    crowd: bool = False


@dataclass(frozen=True)
class Answer:
    """One person's answer for one image: its class, or its boxes; None is none given.

    `name` is the pool's id, or what the tool calls the image. `size` is (width, height) as shown, None where it is not said;
    `when` the time in ISO 8601, '' where nobody knows.
    """

    name: str
    label: str | None = None
    boxes: tuple[Box, ...] | None = None
    size: tuple[int, int] | None = None
    when: str = ""
    who: str = ""


@dataclass
class Said:
    """All answers of a file, in its order; `names` of all images that it lists, `notes` what was left out, counted."""

    answers: list[Answer] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class How:
    """How a file is read: whether an image listed without a box holds none, and which field or columns hold the answers."""

    empty: bool
    field: str
    id_column: str | None
    label_column: str | None


def read_bytes(place: Place, inside: str = "") -> bytes:
    """Return a file, or the one called `inside` of a .zip; raises InputError where there is none, or too much in it."""
    size = place.fs.get_file_info(place.path).size or 0
    if size > MOST_BYTES:
        raise InputError(f"{place.uri} has {size:,} bytes; answers of up to {MOST_BYTES:,} are read")
    data = place.read()
    if not inside or not place.path.endswith(".zip"):
        return data
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = [info for info in archive.infolist() if info.filename.rsplit("/", 1)[-1] == inside]
            if len(found) != 1:
                raise InputError(f"{place.uri} holds {len(found)} files called {inside}: unpack it, and give one")
            if found[0].file_size > MOST_BYTES:
                raise InputError(f"{place.uri}: {inside} has {found[0].file_size:,} bytes; up to {MOST_BYTES:,} are read")
            return archive.read(found[0])
    except zipfile.BadZipFile as error:
        raise InputError(f"{place.uri} cannot be read as a .zip: {error}") from error


def read_json(place: Place) -> Any:
    """Return what a file says as JSON; raises InputError where it is none."""
    try:
        return json.loads(read_bytes(place))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{place.uri} cannot be read as JSON: {error}") from error


def number(value: object, what: str) -> float:
    """Return a finite number; raises InputError that names `what`."""
    try:
        found = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{what} is {value!r}; it takes a number")
    return found


def one_label(labels: list[str], what: str) -> str | None:
    """Return the one class of an image; raises InputError for several."""
    different = list(dict.fromkeys(labels))
    if len(different) > 1:
        raise InputError(f"{what} has {len(different)} classes, {different[0]!r} and {different[1]!r}: an image takes one")
    return different[0] if different else None


def around(points: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Return the smallest upright box (x, y, width, height) around some points."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def rotated(
    box: tuple[float, float, float, float], degrees: float, pivot: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Return the upright box around a box that is rotated clockwise about a point."""
    x, y, width, height = box
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    points = []
    for px, py in ((x, y), (x + width, y), (x, y + height), (x + width, y + height)):
        dx, dy = px - pivot[0], py - pivot[1]
        points.append((pivot[0] + dx * cos - dy * sin, pivot[1] + dx * sin + dy * cos))
    return around(points)


ROTATED = "rotated boxes, of which the upright box around them is kept"
OTHER_SHAPES = "results that are neither boxes nor classes, left out"
