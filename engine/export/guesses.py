"""What a model says of the images of an export: pre-annotations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.export.wanted import Wanted
from engine.schema import InputError
from engine.store import DETECTIONS, PROBS, FeatureStore


@dataclass(frozen=True)
class Guess:
    """The likeliest class and its probability, or boxes: (class, x, y, width, height, score) in px as stored."""

    label: str | None
    score: float
    boxes: list[tuple[str, float, float, float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Guesses:
    """Guesses by pool row, by the model that `model` names; `boxes` says whether they are boxes."""

    model: str
    boxes: bool
    found: dict[int, Guess]


def _names_of(store: FeatureStore, width: int) -> list[str]:
    names = (store.manifest.get("encoder") or {}).get("class_names") or store.class_names
    return list(names) if names else [str(code) for code in range(width)]


def _boxes(found: list[dict[str, Any]], names: list[str], least: float) -> Guess:
    boxes = [
        (names[box["label"]], box["x"], box["y"], box["width"], box["height"], box["score"])
        for box in found
        if box["score"] >= least
    ]
    return Guess(None, max((box[-1] for box in boxes), default=0.0), boxes)


def read_guesses(uri: str, wanted: Wanted, least: float) -> Guesses:
    """Return what a store says of the wanted images; images that it has not are left out.

    Raises InputError for a store of anything but probabilities or boxes, or of another pool.
    """
    store = FeatureStore(uri)
    if store.column not in (PROBS, DETECTIONS):
        raise InputError(f"--predictions {uri!r} holds {store.column}: give the probabilities or boxes that `predict` wrote")
    rows = np.intersect1d(wanted.rows, store.rows)
    called = dict(zip(wanted.rows.tolist(), wanted.ids, strict=True))
    for row, name in zip(rows.tolist(), store.ids(rows), strict=True):
        if called[row] != name:
            raise InputError(f"--predictions {uri!r} calls row {row} {name!r}, and the selection {called[row]!r}: two pools")
    boxes = store.column == DETECTIONS
    if boxes:
        drawn = store.detections(rows)
        names = _names_of(store, 1 + max((box["label"] for found in drawn for box in found), default=0))
        guesses = [_boxes(found, names, least) for found in drawn]
    else:
        probs = store.vectors(rows)
        names = _names_of(store, probs.shape[1])
        guesses = [Guess(names[int(p.argmax())], float(p.max())) for p in probs]
    return Guesses(f"coresift {store.digest[:12]}", boxes, dict(zip(rows.tolist(), guesses, strict=True)))
