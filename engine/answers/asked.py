"""What was asked for: the pool's ids, and what the export calls them, so that answers find their images again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.export import coco, cvat, fiftyone, label_studio
from engine.export.output import IDS
from engine.export.wanted import PICKS, read_named
from engine.folders import read_manifest
from engine.places import Place
from engine.schema import InputError
from engine.sources.pool import IMAGE_SUFFIXES
from engine.sources.tables import suffix_of

INSIDE = (label_studio.NAME, cvat.NAME, coco.NAME, fiftyone.NAME)
"""Files of exported folders that say more of their images."""


def _stem(name: str) -> str:
    return name.rpartition(".")[0] if suffix_of(name) in IMAGE_SUFFIXES else name


def _key(name: str) -> str:
    """Return the last part of a name, without its ending: names of one image have it in common."""
    return _stem(name.rsplit("/", 1)[-1])


@dataclass
class Asked:
    """Images in the order in which they were asked for; `turns` are EXIF orientations of those that are shown turned."""

    ids: dict[str, None] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    _by_key: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, other: str = "", orientation: int = 1) -> None:
        """Take one image: its id, and what the export calls it."""
        self.ids[name] = None
        for called in (name, other) if other else (name,):
            if self.names.setdefault(called, name) != name and called != name:
                raise InputError(
                    f"{called!r} is asked for as {self.names[called]!r} and as {name!r}: give one export at a time"
                )
            if called not in (known := self._by_key.setdefault(_key(called), [])):
                known.append(called)
        if orientation != 1:
            self.turns[name] = orientation

    def find(self, name: str) -> str | None:
        """Return the id of the image that a tool calls so, None for one that was not asked for.

        That is its id, or its name in the export, or what ends in one of them, or the other way round, at a slash; endings
        of files count where both have one. Raises InputError where several images are called so.
        """
        if name in self.ids:
            return name
        if name in self.names:
            return self.names[name]
        found = {self.names[known] for known in self._by_key.get(_key(name), ()) if _fits(known, name)}
        if len(found) > 1:
            first, second = sorted(found)[:2]
            raise InputError(f"{name!r} may be {first!r} or {second!r}: give the export with --asked, which knows")
        return found.pop() if found else None


def _fits(one: str, other: str) -> bool:
    both = one != _stem(one) and other != _stem(other)
    short, long = sorted((one, other) if both else (_stem(one), _stem(other)), key=len)
    return long == short or long.endswith(f"/{short}")


def _of_table(asked: Asked, text: str) -> None:
    for entry in csv.DictReader(io.StringIO(text)):
        asked.add(entry["id"], entry["file_name"])


def _of_json(asked: Asked, value: Any, place: Place) -> None:
    """Take the images of an exported file: Label Studio's tasks, COCO's images, FiftyOne's samples."""
    entries: list[tuple[dict[str, Any], str]] = []
    if isinstance(value, list) and all(isinstance(task, dict) and "data" in task for task in value):
        entries = [(task["data"], "image") for task in value]
    elif isinstance(value, dict) and isinstance(value.get("images"), list):
        entries = [(image, "file_name") for image in value["images"]]
    elif isinstance(value, dict) and isinstance(value.get("samples"), list):
        entries = [(sample, "filepath") for sample in value["samples"]]
    if not entries or not all("pool_id" in entry for entry, _ in entries):
        raise InputError(f"--asked {place.uri} is neither a selection nor an export that says which images it holds (pool_id)")
    for entry, key in entries:
        asked.add(entry["pool_id"], str(entry[key]), int(entry.get("orientation", 1)))


def _of_manifest(asked: Asked, text: str, place: Place) -> None:
    for line in text.splitlines()[2:]:
        entry = json.loads(line)
        meta = entry.get("meta") or {}
        if "pool_id" not in meta:
            raise InputError(f"--asked {place.uri} was not written by export: its images have no pool_id")
        asked.add(meta["pool_id"], f"{entry['name']}{entry['extension']}", int(meta.get("orientation", 1)))


def _of_file(asked: Asked, place: Place) -> None:
    text = place.read().decode()
    try:
        if place.path.endswith(".jsonl"):
            _of_manifest(asked, text, place)
        else:
            _of_json(asked, json.loads(text), place)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"--asked {place.uri} cannot be read as an export: {error}") from error


def read_asked(uris: Iterable[str]) -> Asked:
    """Return what exports, selection folders and lists of ids asked for; raises InputError for what is none."""
    asked = Asked()
    for uri in uris:
        place = Place(uri)
        if not place.exists():
            raise InputError(f"--asked {uri!r} does not exist: give the export, a selection folder, or ids (.txt)")
        if place.at(IDS).exists() and read_manifest(place) is None:
            _of_table(asked, place.at(IDS).read().decode())
            for name in INSIDE:
                if place.at(name).exists():
                    _of_file(asked, place.at(name))
        elif uri.endswith((".json", ".jsonl")):
            _of_file(asked, place)
        else:
            named = read_named(uri, PICKS)
            if "" in named.ids:
                raise InputError(f"--asked {uri!r} has rows and no ids: give the selection folder, or its ids.txt")
            for name in named.ids:
                asked.add(name)
    return asked
