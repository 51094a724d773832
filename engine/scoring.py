"""What the scoring encoders of a run read beside its pool, and what is made for them before anybody encodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from engine.checkpoints import Checkpoint
from engine.images import ImageSet
from engine.influence import Gradient
from engine.places import Place
from engine.reference import H, Reference, make_h, make_v, open_labelled, open_reference, write_h
from engine.schema import InputError, Progress, nearest
from engine.scorers import Scorer, option_pairs, own_options, resolved
from engine.sources import Pool
from engine.tasks import Task, build_task
from engine.verbs import SCORING, EmbedOptions, InfluenceOptions

DIFFERENTIATED = ("influence", "gradient_similarity")
"""Encoders that need h."""


@dataclass(frozen=True)
class Scoring:
    """The options of each scoring encoder of a run, by name, whole; its reference set, and the images of LiSSA's steps."""

    options: dict[str, Any]
    task: Task | None = None
    reference: Reference | None = None
    labelled: ImageSet | None = None

    def inputs(self, name: str) -> dict[str, Any]:
        """Return the digests of what an encoder reads beside pool and checkpoint."""
        found: dict[str, Any] = {}
        if name in DIFFERENTIATED and self.reference is not None:
            found["reference"] = self.reference.inputs()
        if isinstance(self.options.get(name), InfluenceOptions) and self.labelled is not None:
            found["labelled"] = self.labelled.digest
        return found

    def identity(self, name: str) -> dict[str, Any]:
        """Return the options of an encoder that decide what comes out: none of those that don't score."""
        return {"encoder_option": asdict(self.options[name])} if name in self.options else {}

    @contextlib.contextmanager
    def images(self, wanted: bool, progress: Progress) -> Iterator[ImageSet | None]:
        """Give the reference images for as long as this lasts, if they are wanted."""
        if not wanted or self.reference is None or self.task is None:
            yield None
            return
        with self.reference.opened(self.task, progress) as images:
            yield images


def check_options(options: EmbedOptions, names: Sequence[str]) -> None:
    """Raise InputError for options of scoring encoders that none of a run's encoders takes, or that don't go together."""
    scoring = [name for name in names if name in SCORING]
    known = sorted({field.name for name in scoring for field in fields(SCORING[name])})
    for name in option_pairs(options):
        if name not in known:
            allowed = f"options: {', '.join(known)}" if known else f"it is for {', '.join(SCORING)}"
            raise InputError(
                f"--encoder-option {name!r} is none of --encoder {options.encoder}{nearest(name, known)} ({allowed})"
            )
    for flag, given in (("--reference", options.reference), ("--reference-labels", options.reference_labels)):
        if given and not set(DIFFERENTIATED) & set(scoring):
            raise InputError(f"{flag} is for --encoder {' and '.join(DIFFERENTIATED)}, not for {options.encoder}")
    if options.reference_labels and not options.reference:
        raise InputError("--reference-labels are of a --reference pool: give it, too")


def open_scoring(options: EmbedOptions, names: Sequence[str], pool: Pool) -> Scoring:
    """Return what a run's scoring encoders read; raises InputError where it is not there."""
    scoring = [name for name in names if name in SCORING]
    if not scoring or options.checkpoint is None:  # without a checkpoint the encoders say what they need
        return Scoring({})
    checkpoint = Checkpoint(options.checkpoint)
    task = build_task(checkpoint.setup)
    given = {name: resolved(own_options(options, name), task) for name in scoring}
    reference = open_reference(options, checkpoint, pool) if set(DIFFERENTIATED) & set(scoring) else None
    return Scoring(given, task, reference, open_labelled(checkpoint) if "influence" in scoring else None)


def without_h(encoders: Mapping[str, Any], places: Mapping[str, Place], overwrite: bool) -> dict[str, Scorer]:
    """Return the scorers, by encoder, whose stores hold no h of an earlier run of the same command."""
    scorers = {name: encoders[name].scorer for name in DIFFERENTIATED if name in encoders}
    return {name: scorer for name, scorer in scorers.items() if overwrite or not places[name].at(H).exists()}


@contextlib.contextmanager
def _at_work(model: torch.nn.Module, threads: int) -> Iterator[None]:
    """Within this, the model is on a GPU where this process has one, and torch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        yield
    finally:
        model.to("cpu")
        torch.set_num_threads(before)


def prepare(
    scorers: Mapping[str, Scorer],
    places: Mapping[str, Place],
    reference: ImageSet,
    labelled: ImageSet | None,
    num_images: int,
    threads: int,
    progress: Progress,
) -> None:
    """Make h for each scorer, by encoder, and write it to its store's folder, whence those who encode read it.

    In one process, with as many threads as an actor has, so that it is the same bits for any number of actors. v is the
    same for all: it is made once.
    """
    v: Gradient | None = None
    for name, scorer in scorers.items():
        task, model, names = scorer.task, scorer.model, scorer.names
        with _at_work(model, threads):
            if v is None:
                v = make_v(task, model, names, reference, scorer.seed, progress)
            h = v
            if isinstance(scorer.options, InfluenceOptions):
                assert labelled is not None
                h = make_h(task, model, names, v, labelled, scorer.options, scorer.seed, progress)
        write_h(places[name], h, num_images)
