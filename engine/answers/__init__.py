"""Answers of people, as their tools give them back, -> labels by the pool's ids. The READERS table, one function a format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from engine.answers import cvat, label_studio, tables
from engine.answers.asked import Asked, read_asked
from engine.answers.said import Answer, Box, How, Said
from engine.answers.written import BOX_FILES, LABEL_TABLES, write_boxes, write_labels
from engine.chosen import SHOWN
from engine.export.output import check_out, write_file
from engine.export.turn import turned_back, turned_size
from engine.places import Place
from engine.retry import reached
from engine.schema import InputError, lookup
from engine.verbs import ImportLabelsOptions

READERS: dict[str, Callable[[Place, How], Said]] = {
    "label-studio": label_studio.read,
    "cvat": cvat.read,
    "coco": tables.read_coco,
    "fiftyone": tables.read_fiftyone,
    "csv": tables.read_table,
}
LATEST = "latest"
DIFFERED = "images whose answers differ, of which the latest counts"
SAME_PX = 2
"""Decimals of px to which boxes are the same."""


@dataclass
class Settled:
    """One answer an image, by its id; names of images that were not asked for; images with answers that differed."""

    answers: dict[str, Answer] = field(default_factory=dict)
    strangers: dict[str, None] = field(default_factory=dict)
    conflicts: dict[str, None] = field(default_factory=dict)


def _content(answer: Answer, boxes: bool) -> object:
    """Return what an answer says, so that two that say the same are equal."""
    if not boxes:
        return answer.label
    sides = ("x", "y", "width", "height")
    return sorted((b.name, *(round(getattr(b, side), SAME_PX) for side in sides), b.crowd) for b in answer.boxes or ())


def _time(answer: Answer) -> datetime:
    """Return when an answer was given; the beginning of time where nobody knows."""
    first = datetime.min.replace(tzinfo=UTC)
    try:
        found = datetime.fromisoformat(answer.when) if answer.when else first
    except ValueError as error:
        raise InputError(f"the answer for {answer.name!r} has time {answer.when!r}, which is none in ISO 8601") from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def settle(answers: list[Answer], asked: Asked, boxes: bool, on_conflict: str) -> Settled:
    """Find the image of each answer, and settle on one for each: of several that differ the latest, or none is.

    Later is what was said later; without times, or at the same, what comes later. Raises InputError for answers that differ.
    """
    settled = Settled()
    for answer in answers:
        name = asked.find(answer.name)
        if name is None:
            settled.strangers[answer.name] = None
            continue
        before = settled.answers.get(name)
        if before is not None and _content(before, boxes) != _content(answer, boxes):
            settled.conflicts[name] = None
            if on_conflict != LATEST:
                raise InputError(_differ(name, before, answer, boxes))
        if before is None or _time(answer) >= _time(before):
            settled.answers[name] = answer
    return settled


def _differ(name: str, one: Answer, other: Answer, boxes: bool) -> str:
    told = []
    for answer in (one, other):
        what = f"{len(answer.boxes or ())} boxes" if boxes else repr(answer.label)
        told.append(what + (f" by {answer.who}" if answer.who else ""))
    return (
        f"two answers for {name!r} differ, {told[0]} and {told[1]}: mend one, or take the later one of each with "
        "--on-conflict latest"
    )


def _as_stored(answer: Answer, orientation: int) -> Answer:
    """Return an answer with boxes on the image as it is stored, not as it is shown."""
    if orientation == 1 or answer.boxes is None or answer.size is None:
        return answer
    boxes = []
    for box in answer.boxes:
        boxes.append(Box(box.name, *turned_back((box.x, box.y, box.width, box.height), answer.size, orientation), box.crowd))
    return replace(answer, boxes=tuple(boxes), size=turned_size(answer.size, orientation))


def _read_all(options: ImportLabelsOptions) -> Said:
    reader = lookup(options.format, READERS, "format")
    how = How(options.empty_answers, options.field, options.id_column, options.label_column)
    every, classes = Said(), dict[str, None]()
    for uri in options.answers:
        place = Place(uri)
        if not place.exists():
            raise InputError(f"answers {uri!r} do not exist")
        with reached(uri):
            said = reader(place, how)
        every.answers += said.answers
        every.names += said.names
        every.notes += said.notes
        classes |= dict.fromkeys(said.class_names)
    every.class_names = tuple(classes)
    return every


def _given(said: Said, boxes: bool, out: str) -> list[Answer]:
    """Return the answers that hold what is wanted; raises InputError where none does, and all hold the other."""
    given = [a for a in said.answers if (a.boxes is not None if boxes else a.label is not None)]
    if not given:
        other = any(a.label is not None if boxes else bool(a.boxes) for a in said.answers)
        what, instead = ("boxes", "labels") if boxes else ("labels", "boxes")
        end = " or ".join(LABEL_TABLES if boxes else BOX_FILES)
        way = f"they hold {instead}, which a file that ends in {end} takes" if other else "has anybody answered?"
        raise InputError(f"the answers hold no {what} for --out {out}: {way}")
    return given


def _facts(options: ImportLabelsOptions, asked: Asked, settled: Settled, boxes: bool, notes: Counter[str]) -> dict[str, Any]:
    unanswered = [name for name in asked.ids if name not in settled.answers]
    found = settled.answers.values()
    return {
        "format": options.format,
        "out": Place(options.out).uri,
        "boxes": boxes,
        "num_asked": len(asked.ids),
        "num_answered": len(settled.answers),
        "num_boxes": sum(len(answer.boxes or ()) for answer in found) if boxes else 0,
        "num_unanswered": len(unanswered),
        "unanswered": unanswered[:SHOWN],
        "num_strangers": len(settled.strangers),
        "strangers": list(settled.strangers)[:SHOWN],
        "num_conflicts": len(settled.conflicts),
        "notes": [f"{what}: {count:,}" for what, count in {**notes, DIFFERED: len(settled.conflicts)}.items() if count],
    }


def import_labels(options: ImportLabelsOptions) -> dict[str, Any]:
    """Write what people said of the images that were asked for; return what was found, counted.

    Raises InputError for answers that can't be read, that differ, or that are of none of the images; with --complete, for
    images without one. Nothing is written then.
    """
    out = Place(options.out)
    boxes = out.path.endswith(BOX_FILES)
    with reached(options.out):
        check_out(out, False, (*LABEL_TABLES, *BOX_FILES), options.overwrite, (*options.answers, *options.asked))
    asked = read_asked(options.asked)
    said = _read_all(options)
    settled = settle(_given(said, boxes, options.out), asked, boxes, options.on_conflict)
    if not settled.answers:
        theirs, ours = (", ".join(map(repr, list(names)[:SHOWN])) for names in (settled.strangers, asked.ids))
        raise InputError(f"the answers are of none of the {len(asked.ids):,} images asked for: of {theirs} ..., not {ours} ...")
    facts = _facts(options, asked, settled, boxes, said.notes)
    if options.complete and facts["num_unanswered"]:
        shown = ", ".join(map(repr, facts["unanswered"]))
        more = ", ..." if facts["num_unanswered"] > SHOWN else ""
        raise InputError(f"{facts['num_unanswered']:,} of {len(asked.ids):,} images have no answer: {shown}{more}")
    found = {name: _as_stored(settled.answers[name], asked.turns.get(name, 1)) for name in asked.ids if name in settled.answers}
    with reached(options.out):
        write_file(out, write_boxes(out, found, said.class_names) if boxes else write_labels(out, found))
    return facts
