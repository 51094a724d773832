"""CVAT for images 1.1: annotations.xml, or the .zip that holds it; tags are classes, boxes have their corners in px.

Read in a stream by expat; a document type, and with it every entity, is refused.
"""

from __future__ import annotations

from xml.parsers import expat

from engine.answers.said import OTHER_SHAPES, ROTATED, Answer, Box, How, Said, number, one_label, read_bytes, rotated
from engine.places import Place
from engine.schema import InputError

INSIDE = "annotations.xml"
OTHERS = frozenset(("polygon", "polyline", "points", "mask", "cuboid", "ellipse", "skeleton"))


class _Reader:
    """Gathers what the elements of an image say."""

    def __init__(self, place: Place, how: How) -> None:
        self.place, self.how, self.said = place, how, Said()
        self.name, self.size = "", (0, 0)
        self.labels: list[str] = []
        self.boxes: list[Box] = []
        self.inside = False

    def start(self, tag: str, given: dict[str, str]) -> None:
        """Take an element's beginning."""
        if tag == "track":
            raise InputError(f"{self.place.uri} is of a video (it has tracks): export the task as CVAT for images 1.1")
        if tag == "image":
            self.name = given.get("name", "")
            if not self.name:
                raise InputError(f"{self.place.uri} has an image without a name")
            wide, high = (round(number(given.get(side), f"{self.what}: {side}")) for side in ("width", "height"))
            self.size, self.labels, self.boxes, self.inside = (wide, high), [], [], True
            self.said.names.append(self.name)
        elif not self.inside:
            return
        elif tag == "tag":
            self.labels.append(given.get("label", ""))
        elif tag == "box":
            self.boxes.append(self._box(given))
        elif tag in OTHERS:
            self.said.notes[OTHER_SHAPES] += 1

    @property
    def what(self) -> str:
        """The image that is read, for errors."""
        return f"{self.place.uri}: {self.name!r}"

    def _box(self, given: dict[str, str]) -> Box:
        left, top, right, bottom = (number(given.get(side), f"{self.what}: {side}") for side in ("xtl", "ytl", "xbr", "ybr"))
        box = (left, top, right - left, bottom - top)
        angle = number(given.get("rotation", "0"), f"{self.what}: rotation")
        if angle:
            self.said.notes[ROTATED] += 1
            box = rotated(box, angle, ((left + right) / 2, (top + bottom) / 2))
        return Box(given.get("label", ""), *box)

    def end(self, tag: str) -> None:
        """Take an element's end: with that of an image its answer is complete."""
        if tag != "image":
            return
        self.inside = False
        boxes = tuple(self.boxes) if self.boxes or self.how.empty else None
        if self.labels or boxes is not None:
            self.said.answers.append(Answer(self.name, one_label(self.labels, self.what), boxes, self.size))

    def refuse(self, *_: object) -> None:
        """Refuse a document type."""
        raise InputError(f"{self.place.uri} has a document type, which CVAT writes none of: it is not read")


def read(place: Place, how: How) -> Said:
    """Return the answers of all images; one without a tag or a box has none, unless `how.empty`."""
    reader, parser = _Reader(place, how), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.StartDoctypeDeclHandler = reader.refuse
    try:
        parser.Parse(read_bytes(place, INSIDE), True)
    except expat.ExpatError as error:
        raise InputError(f"{place.uri} cannot be read as XML: {error}") from error
    if not reader.said.names:
        raise InputError(f"{place.uri} holds no image: export the task as CVAT for images 1.1")
    return reader.said
