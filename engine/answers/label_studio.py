"""Label Studio's JSON export: tasks with annotations; choices are classes, rectanglelabels boxes in percent."""

from __future__ import annotations

from typing import Any

from engine.answers.said import OTHER_SHAPES, ROTATED, Answer, Box, How, Said, number, one_label, read_json, rotated
from engine.places import Place
from engine.schema import InputError

NAMES = ("pool_id", "image")
"""Fields of a task's data that say which image it is."""


def _name(task: Any, place: Place) -> str:
    data = task.get("data") if isinstance(task, dict) else None
    if not isinstance(data, dict) or not isinstance(task.get("annotations"), list):
        raise InputError(f"{place.uri} holds a task without `data` or `annotations`: export the project as JSON, not JSON-MIN")
    for key in NAMES:
        if isinstance(data.get(key), str):
            return str(data[key])
    raise InputError(f"{place.uri}: task {task.get('id')} has neither {' nor '.join(NAMES)} in its data ({', '.join(data)})")


def _value(found: dict[str, Any], what: str) -> dict[str, Any]:
    value = found.get("value")
    if not isinstance(value, dict):
        raise InputError(f"{what} has a result of type {found.get('type')!r} without a value")
    return value


def _box(found: dict[str, Any], size: tuple[int, int], what: str, said: Said) -> Box:
    value, (wide, high) = _value(found, what), size
    x, y, width, height = (number(value.get(side), f"{what}: {side}") for side in ("x", "y", "width", "height"))
    box = (x * wide / 100, y * high / 100, width * wide / 100, height * high / 100)
    angle = number(value.get("rotation") or 0, f"{what}: rotation")
    if angle:
        said.notes[ROTATED] += 1
        box = rotated(box, angle, (box[0], box[1]))
    label = one_label([str(name) for name in value.get("rectanglelabels") or ()], f"{what}: a box")
    if label is None:
        raise InputError(f"{what} has a box without a class")
    return Box(label, *box)


def _answer(name: str, annotation: dict[str, Any], said: Said, place: Place) -> Answer:
    what, labels, boxes = f"{place.uri}: {name!r}", list[str](), list[Box]()
    size: tuple[int, int] | None = None
    others = 0
    for found in annotation.get("result") or ():
        kind = found.get("type")
        if kind == "choices":
            labels += [str(choice) for choice in _value(found, what).get("choices") or ()]
        elif kind == "rectanglelabels":
            if found.get("image_rotation"):
                raise InputError(f"{what} was turned in Label Studio, so where its boxes are is not known: turn it back there")
            wide, high = (number(found.get(f"original_{side}"), f"{what}: original_{side}") for side in ("width", "height"))
            size = round(wide), round(high)
            boxes.append(_box(found, size, what, said))
        else:
            others += 1
    said.notes[OTHER_SHAPES] += others
    who = annotation.get("completed_by")
    who = str(who.get("email") or who.get("id")) if isinstance(who, dict) else "" if who is None else str(who)
    when = str(annotation.get("updated_at") or annotation.get("created_at") or "")
    drawn = tuple(boxes) if boxes or not (labels or others) else None
    return Answer(name, one_label(labels, what), drawn, size, when, who)


def read(place: Place, how: How) -> Said:
    """Return the answers of all tasks; skipped ones are none. Nothing drawn in a task that was submitted is an answer."""
    tasks, said = read_json(place), Said()
    if not isinstance(tasks, list):
        raise InputError(f"{place.uri} is no list of tasks: export the project as JSON")
    for task in tasks:
        name = _name(task, place)
        said.names.append(name)
        for annotation in task["annotations"]:
            if annotation.get("was_cancelled"):
                said.notes["answers that were skipped"] += 1
            else:
                said.answers.append(_answer(name, annotation, said, place))
    return said
