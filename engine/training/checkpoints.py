"""Checkpoints of an unfinished training: OUT/steps/step-000000123/, published by a step.json written last.

Its files are written so that they appear whole or not at all, and step.json holds their sizes and digests: one that is
torn (a killed worker, a full disk, a power cut) is passed over for the one before. The newest two are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from engine.folders import digest_of, sha256_of, to_json
from engine.places import Place

KEPT = 2


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint: its folder, and what step.json says (`step`, and the facts that were given)."""

    place: Place
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        """The steps that were done."""
        return int(self.facts["step"])

    def names(self) -> list[str]:
        """Return the names of its files."""
        return sorted(self.facts["files"])


def folder_of(steps: Place, step: int) -> Place:
    """Return the folder of the checkpoint after `step` steps."""
    return steps.at(f"step-{step:09d}")


def write_file(folder: Place, name: str, data: bytes) -> dict[str, Any]:
    """Write one file of a checkpoint; return its entry for `publish_step`."""
    folder.at(name).write(data)
    return {name: {"bytes": len(data), "sha256": digest_of(data)}}


def publish_step(steps: Place, step: int, files: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Make a checkpoint of files that are written, then delete all but the newest two, and what nobody names any more.

    `files` are all entries that `write_file` gave, to every worker. `facts` (JSON) may name weights of the best
    evaluation, a file of `steps`, as best.weights. A checkpoint of a later step is torn: this run went on from an
    earlier one.
    """
    folder_of(steps, step).at("step.json").write(to_json({**facts, "step": step, "files": files}))
    kept: list[Place] = []
    weights = set()
    for place in _folders(steps):
        later = place.name > folder_of(steps, step).name
        facts_there = _facts(place) if len(kept) < KEPT and not later else None
        if facts_there is None:
            place.remove()
            continue
        kept.append(place)
        weights.add((facts_there.get("best") or {}).get("weights"))
    for name in steps.names():
        if name.startswith("best-") and name not in weights:
            steps.fs.delete_file(steps.at(name).path)


def newest(steps: Place) -> Saved | None:
    """Return the newest complete checkpoint, every file as it was written, or None where there is none."""
    for place in _folders(steps):
        facts = _facts(place)
        if facts is not None and all(_is_whole(place.at(name), entry) for name, entry in facts["files"].items()):
            return Saved(place, facts)
    return None


def told_kept(steps: Place) -> str:
    """Return what is left of a training that ends early, for an error's text."""
    saved = newest(steps)
    return f"the checkpoint after step {saved.step} is kept" if saved else "no checkpoint was written yet"


def _folders(steps: Place) -> list[Place]:
    """Return the folders of checkpoints, finished or not, newest first."""
    return [steps.at(name) for name in sorted(steps.names(), reverse=True) if name.startswith("step-")]


def _facts(place: Place) -> dict[str, Any] | None:
    file = place.at("step.json")
    if file.kind() != pafs.FileType.File:
        return None
    try:
        found: dict[str, Any] = json.loads(file.read())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return found


def _is_whole(file: Place, entry: Mapping[str, Any]) -> bool:
    info = file.fs.get_file_info(file.path)
    return bool(info.size == entry["bytes"]) and sha256_of(file) == entry["sha256"]
