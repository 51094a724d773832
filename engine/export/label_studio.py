"""Label Studio's tasks: what its Import takes, with a model's predictions as pre-annotations.

https://labelstud.io/guide/task_format: percentages of the image as it is shown. Names of controls are those of its own
templates for image classification (`choice`) and object detection (`label`).
"""

from __future__ import annotations

from typing import Any

from engine.export.entries import Entry
from engine.export.guesses import Guess, Guesses
from engine.export.job import Files, Job, as_json
from engine.export.turn import turned

NAME = "tasks.json"
CHOICE, BOX, TO = "choice", "label", "image"


def _result(entry: Entry, guess: Guess, boxes: bool) -> list[dict[str, Any]]:
    if not boxes:
        value = {"choices": [guess.label]}
        return [{"id": f"{entry.row}", "from_name": CHOICE, "to_name": TO, "type": "choices", "value": value}]
    found = []
    wide, high = entry.shown
    for number, (name, *sides, score) in enumerate(guess.boxes):
        x, y, width, height = turned((sides[0], sides[1], sides[2], sides[3]), entry.size, entry.orientation)
        shares = {"x": 100 * x / wide, "y": 100 * y / high, "width": 100 * width / wide, "height": 100 * height / high}
        found.append(
            {
                "id": f"{entry.row}-{number}",
                "from_name": BOX,
                "to_name": TO,
                "type": "rectanglelabels",
                "original_width": wide,
                "original_height": high,
                "image_rotation": 0,
                "score": score,
                "value": {**shares, "rotation": 0, "rectanglelabels": [name]},
            }
        )
    return found


def _predictions(entry: Entry, guesses: Guesses | None) -> dict[str, Any]:
    guess = guesses.found.get(entry.row) if guesses is not None else None
    if guesses is None or guess is None:
        return {}
    said = {"model_version": guesses.model, "score": guess.score, "result": _result(entry, guess, guesses.boxes)}
    return {"predictions": [said]}


def write(job: Job) -> Files:
    """Return the tasks: `data.image` is where the image is, `data.pool_id` what it is called here."""
    tasks = []
    for entry in job.entries:
        data: dict[str, Any] = {"image": entry.uri, "pool_id": entry.id, "pool_row": entry.row, "rank": entry.rank}
        data |= {"orientation": entry.orientation} if entry.orientation != 1 else {}
        tasks.append({"data": data, **_predictions(entry, job.guesses)})
    return {NAME: as_json(tasks, 1)}
