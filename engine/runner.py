"""Runs a method to its end: progress, a journal to go on from, and shards that are lost on the way."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.ledger import Ledger
from engine.places import Place
from engine.schema import Progress, RunError, no_progress
from engine.shards import LostShardError, Request, Shards, Step, prepare

Method = Callable[[Shards, Request, Any], Iterator[Step]]

ATTEMPTS = 3
"""Times that shards may be lost without a step between, before the run gives up."""


@dataclass(frozen=True)
class Journal:
    """The last step of an unfinished run, in one file of its folder, written at most every `every_s` seconds."""

    file: Place
    every_s: float

    def write(self, step: Step) -> None:
        """Replace what is there by this step."""
        facts = {"number": step.number, "total": step.total, "note": step.note, "objective": step.objective}
        entries: dict[str, Any] = {"facts": np.array(json.dumps(facts)), "picks": step.picks, "gains": step.gains}
        entries |= {f"arrays.{name}": values for name, values in step.arrays.items()}
        entries |= {f"columns.{name}": values for name, values in step.columns.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **entries)
        self.file.write(buffer.getvalue())

    def read(self) -> Step | None:
        """Return the step to go on from, or None where nothing was journalled."""
        if not self.file.exists():
            return None
        with np.load(io.BytesIO(self.file.read()), allow_pickle=False) as archive:
            facts: dict[str, Any] = json.loads(str(archive["facts"]))
            for kind in ("arrays", "columns"):
                inside = [name for name in archive.files if name.startswith(f"{kind}.")]
                facts[kind] = {name.partition(".")[2]: archive[name] for name in inside}
            return Step(picks=archive["picks"], gains=archive["gains"], **facts)

    def remove(self) -> None:
        """Delete the file: the run is published."""
        if self.file.exists():
            self.file.fs.delete_file(self.file.path)


def _said(step: Step) -> str:
    """Return a step's note, with the objective where it has one."""
    objective = "" if step.objective is None else f"objective {step.objective:.6g}"
    return ", ".join(filter(None, [objective, step.note]))


def _lacking(request: Request, step: Step) -> int:
    """Return how many picks are due after a step: what a ledger says that is made again from its picks."""
    return replace(request, ledger=Ledger(request.terms, step.picks.tolist())).lacking(len(step.picks))


def run_method(
    method: Method,
    shards: Shards,
    request: Request,
    options: Any,
    progress: Progress = no_progress,
    journal: Journal | None = None,
) -> Step:
    """Run a method to its end and return its last step, checked against the contract of every strategy.

    Rows labelled already or excluded are not eligible, and picks meet the request's terms. Goes on from the journal, and
    from the step before where a shard is lost: the shards are made again, and the method rebuilds what it kept there.
    Raises RunError when shards are lost ATTEMPTS times in a row.
    """
    last = journal.read() if journal else None
    written = -np.inf
    lost = 0
    while last is None or last.number < last.total or _lacking(request, last):
        try:
            prepare(shards, np.union1d(request.labeled, request.excluded), request.terms)
            ledger = Ledger(request.terms, last.picks.tolist() if last else ())
            for step in method(shards, replace(request, resume=last, ledger=ledger), options):
                last, lost = step, 0
                progress("select", last.number, last.total, _said(last))
                if journal and time.monotonic() - written >= journal.every_s:
                    journal.write(last)
                    written = time.monotonic()
        except LostShardError as error:
            lost += 1
            if lost > ATTEMPTS:
                raise RunError(f"shards were lost {lost} times in a row: {error}") from error
            progress("select", last.number if last else 0, last.total if last else 0, "a shard was lost and is made again")
            shards.restore()
    assert len(last.picks) == len(last.gains) == len(np.unique(last.picks))
    assert not _lacking(request, last)
    assert not np.isin(last.picks, np.union1d(request.labeled, request.excluded)).any()
    return last
