"""Runs a job's steps in this process, one after the other; what is done before is not done again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.folders import read_manifest, read_run
from engine.masks import masked
from engine.places import Place
from engine.schema import InputError, Progress, RunError, known_error, lookup
from engine.verbs import VERBS
from jobs.checks import check_steps
from jobs.expand import expand
from jobs.jobfile import JobFile
from jobs.options import FileOptions
from jobs.overlay import load
from jobs.step import Step

FILE = "job.yaml"
"""Beside the steps' folders: the file that was run, without keys."""


@dataclass(frozen=True)
class Job:
    """A job file, and those of its steps that are to be run."""

    file: JobFile
    steps: Sequence[Step]
    all_steps: Sequence[Step]


class Observer(Protocol):
    """Is told of each step, before it and after."""

    def begins(self, number: int, total: int, step: Step) -> Progress:
        """Take note of a step that begins; return what its progress is told."""

    def ends(self, number: int, total: int, step: Step, result: Any, seconds: float, done_before: bool) -> bool:
        """Take note of what a step's function returned; return whether the job may go on."""


def open_job(options: FileOptions, address: str | None = None) -> Job:
    """Return a job, all of it checked; raises InputError that lists what is wrong."""
    file = load(options.job, options.small, options.set)
    steps = expand(file, address)
    names = {step.name: step for step in steps}
    for name in options.only:
        lookup(name, names, "step")
    check_steps(steps)
    return Job(file, [step for step in steps if not options.only or step.name in options.only], steps)


def is_done(step: Step) -> bool:
    """Return whether a step's folder, or each folder of it where it writes several, is published."""
    place = Place(step.out)
    if step.verb == "embed" and "," in step.options.encoder:
        return all(read_manifest(place.at(name.strip())) is not None for name in step.options.encoder.split(","))
    if step.verb == "select" and "," in step.options.budget:
        budgets = {budget.strip() for budget in step.options.budget.split(",")}
        return sum(read_manifest(place.at(name)) is not None for name in place.names()) >= len(budgets)
    return read_manifest(place) is not None


def begin(job: Job) -> None:
    """Write OUT/job.yaml. Raises InputError where OUT is a folder of some other command."""
    out = Place(job.file.out)
    if read_manifest(out) is not None or read_run(out) is not None:
        raise InputError(
            f"out {out.uri} is what another command wrote: a job's folder holds its steps' folders, choose another"
        )
    out.at(FILE).write(masked(job.file.as_yaml()).encode())


def run_steps(job: Job, observer: Observer) -> bool:
    """Run every step, in order; return False where one ended the job early, by what the observer said of its result.

    Raises the error of a step that failed, with which it is, and its command.
    """
    for number, step in enumerate(job.steps, 1):
        try:
            done_before = is_done(step)
            progress = observer.begins(number, len(job.steps), step)
            began = time.monotonic()
            result = VERBS[step.verb].load()(step.options, progress)
        except Exception as failure:
            where = f"step {number} of {len(job.steps)}, {step.label} ({masked(step.command)})"
            known = known_error(failure)
            if known is None:
                failure.add_note(f"in {where}")
                raise
            kind = InputError if isinstance(known, InputError) else RunError
            raise kind(f"{where}: {known}. What is done is kept: the same command goes on from there") from failure
        if not observer.ends(number, len(job.steps), step, result, time.monotonic() - began, done_before):
            return False
    return True
