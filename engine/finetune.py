"""A pool and a selection of it -> a trained model: gathers the images, trains, publishes a checkpoint/ folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine import session
from engine.backbones import NO_FILE
from engine.checkpoints import BEST, HELDOUT, IMAGES
from engine.chosen import Chosen, hold_out, read_chosen
from engine.folders import Claim, now, publish, read_manifest, sha256_of
from engine.gather import Wanted, gather
from engine.images import ImageSet
from engine.labels import Labels, read_labels
from engine.places import Place
from engine.recipes import resolve
from engine.retry import reached
from engine.schema import InputError, Progress, no_progress, parse_hold_out, result_options
from engine.sources import Pool, columns_of, open_pool
from engine.tasks import Setup, build_task
from engine.tasks.setup import WEIGHTS
from engine.training.checkpoints import Saved, newest
from engine.training.job import Job
from engine.training.launch import in_process, on_ray
from engine.training.loop import AVERAGE, steps_place
from engine.training.optimizers import build_optimizer, parameter_groups
from engine.training.order import check_split, order_of
from engine.training.rates import rate_of
from engine.training.zero import check_zero
from engine.verbs import FinetuneOptions

KEPT = ". The last checkpoint is kept: the same command goes on from it"
RESOLVED = ("recipe", "task", "model", "weights", "model_option")
"""Options that the setup holds, with every default filled in."""
UNKNOWN = ("0", "1")
"""Classes to try a model with, where no file names them before the images are gathered."""


@dataclass(frozen=True)
class Data:
    """What a training reads: a pool, what was chosen of it, labels that come apart; and what was chosen but is held out."""

    pool: Pool
    chosen: Chosen
    labels: Labels | None
    held: Chosen | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Return the classes, where the labels or the pool name them."""
        return self.labels.class_names if self.labels is not None else self.pool.class_names

    def inputs(self) -> dict[str, Any]:
        """Return the digests of it all."""
        labels = self.labels.digest if self.labels is not None else None
        held = {"held_out": self.held.digest} if self.held is not None else {}
        return {
            "pool": self.pool.digest,
            "num_rows": self.pool.num_rows,
            "chosen": self.chosen.digest,
            "labels": labels,
            **held,
        }


def _read(options: FinetuneOptions) -> tuple[Data, Data | None]:
    """Return the data to train on and to test on; raises InputError for what can't be read, or is the same."""
    with reached(options.pool):
        pool = open_pool(options.pool, columns_of(options))
        chosen = read_chosen(options.selection, pool)
    kept, held = hold_out(chosen, parse_hold_out(options.hold_out, len(chosen.rows)), options.seed)
    train = Data(pool, kept, _labels(options.labels, pool, chosen, pool.class_names, options), held)
    return train, read_test(options, pool, train.class_names)


def read_test(options: FinetuneOptions, pool: Pool, class_names: Sequence[str] | None) -> Data | None:
    """Return what --test names, None where it names nothing; `class_names` are what its labels must be of, if known.

    Raises InputError for what can't be read, or is the pool itself.
    """
    if options.test is None:
        if options.test_labels is not None or options.test_split is not None:
            raise InputError("--test-labels and --test-split are of a --test pool: give it, too")
        return None
    with reached(options.test):
        test = open_pool(options.test, replace(columns_of(options), split=options.test_split))
    if test.digest == pool.digest:
        raise InputError(
            f"--test {test.uri!r} is the pool itself: the metrics would be of images trained on. Give another, or name its "
            "split with --test-split"
        )
    every = read_chosen("all", test)
    return Data(test, every, _labels(options.test_labels, test, every, class_names or test.class_names, options))


def _labels(
    uri: str | None, pool: Pool, chosen: Chosen, class_names: Sequence[str] | None, options: FinetuneOptions
) -> Labels | None:
    if uri is None:
        return None
    with reached(uri):
        return read_labels(uri, pool, chosen, class_names, options.id_column, options.label_column)


def check(options: FinetuneOptions, setup: Setup, num_images: int) -> None:
    """Raise InputError for options that don't go together, before anything is built."""
    training = setup.training
    check_split(training.batch_size, options.workers, training.accumulate)
    if options.deepspeed is not None:
        check_zero(options.deepspeed, options.workers, training)
    order = order_of(training, num_images, options.seed)
    rate_of(training, order.steps_per_epoch, order.total_steps)


def try_model(setup: Setup) -> None:
    """Build the model and its optimiser once: a wrong name, option or file of weights is one error and claims no folder.

    A GPU's memory and the workers' are not touched. Global generators stay as they were.
    """
    with torch.random.fork_rng():
        task = build_task(setup)
        model = task.build(pretrained=True)
        build_optimizer(parameter_groups(model, task.rates(model), setup.training), setup.training)


def _weights_digest(setup: Setup) -> str | None:
    """Return the digest of the weights to start from, where they are a file or a checkpoint folder."""
    if setup.weights in NO_FILE:
        return None
    place = Place(setup.weights)
    manifest = read_manifest(place)
    if manifest is not None:
        return str(manifest["files"][WEIGHTS]["sha256"]) if manifest["kind"] == "checkpoint" else None
    if not place.exists():
        raise InputError(f"weights file {place.uri!r} does not exist")
    return sha256_of(place)


def identity_of(setup: Setup) -> tuple[dict[str, Any], str | None]:
    """Return what a setup says, JSON-ready, its classes aside, and the digest of the weights where they are a file."""
    digest = _weights_digest(setup)
    told = {key: value for key, value in setup.to_json().items() if key != "class_names"}
    return told if digest is None else {**told, "weights": "file"}, digest


def _claim(options: FinetuneOptions, setup: Setup, train: Data, test: Data | None) -> Claim:
    """Return the claim on OUT: all that decides what comes out."""
    told, digest = identity_of(setup)
    inputs = {"train": train.inputs(), "test": test.inputs() if test is not None else None, "weights": digest}
    kept = {key: value for key, value in result_options(options).items() if key not in (*RESOLVED, *told)}
    weights = setup.weights if digest is not None else None
    named = (options.pool, options.selection, options.labels, options.test, options.test_labels, weights)
    reads = [uri for uri in named if uri is not None]
    return Claim.of(Place(options.out), "checkpoint", inputs, {**kept, "setup": told}, options.overwrite, reads)


def _gather(
    options: FinetuneOptions, setup: Setup, train: Data, test: Data | None, progress: Progress
) -> tuple[Setup, ImageSet, ImageSet | None]:
    """Gather the images into OUT/images, OUT/heldout and OUT/test; return those to train and to test on, and the setup with
    its classes.
    """
    place, boxes, address = Place(options.out), setup.task == "detect", options.address
    wanted = Wanted(boxes, strict=True, max_pixels=options.max_pixels)
    images = gather(train.pool, train.chosen, place.at(IMAGES), wanted, train.labels, address, False, progress)
    most = images.manifest["max_label"]
    if train.held is not None:
        held = gather(train.pool, train.held, place.at(HELDOUT), wanted, train.labels, address, False, progress)
        most = max(most, held.manifest["max_label"])
    tests = None
    if test is not None:
        known = images.class_names if train.class_names is not None and test.class_names is not None else None
        wanted = Wanted(boxes, strict=False, max_pixels=options.max_pixels, class_names=known)
        tests = gather(test.pool, test.chosen, place.at("test"), wanted, test.labels, address, False, progress)
        largest = tests.manifest["max_label"]
        if not images.class_names:  # numbers: a small selection may lack the largest
            most = max(most, largest)
        elif largest >= len(images.class_names):
            raise InputError(
                f"--test {test.pool.uri!r} has label {largest}, and what was trained on has classes 0 to "
                f"{len(images.class_names) - 1}: both must number them alike"
            )
    names = images.class_names or tuple(str(label) for label in range(most + 1))
    setup = replace(setup, class_names=names)
    if names != (train.class_names or UNKNOWN):
        try_model(setup)
    return setup, images, tests


def _gpus(options: FinetuneOptions) -> float:
    """Return the GPUs of a worker: 1 by default, where there is one."""
    there = session.gpus() if options.workers else torch.cuda.device_count()
    return float(there > 0) if options.gpus_per_worker is None else options.gpus_per_worker


def _job(options: FinetuneOptions, setup: Setup, images: ImageSet, test: ImageSet | None) -> Job:
    return Job(
        setup=setup if setup.weights in NO_FILE else replace(setup, weights=Place(setup.weights).absolute),
        out=Place(options.out).absolute,
        images=images.place.absolute,
        test=test.place.absolute if test is not None else None,
        seed=options.seed,
        workers=options.workers,
        threads=options.cpus_per_worker,
        gpus=_gpus(options),
        loaders=options.loaders,
        checkpoint_steps=options.checkpoint_steps,
        deepspeed=options.deepspeed,
        max_pixels=options.max_pixels,
    )


def _train(job: Job, options: FinetuneOptions, progress: Progress) -> None:
    if job.workers:
        on_ray(job, options.max_failures, progress)
    else:
        in_process(job, progress)


def _metrics(saved: Saved, criterion: str) -> list[dict[str, Any]]:
    """Return the metrics after the last step, then the best evaluation's, with its epoch."""
    last, best = saved.facts["last"], saved.facts["best"]
    metrics = list(last["metrics"]) if last else []
    if best:
        note = next(entry["note"] for entry in best["metrics"] if entry["metric"] == criterion)
        when = f"best of the evaluations, after epoch {best['epoch']:g}, step {best['step']}"
        metrics.append({"metric": f"best_{criterion}", "value": best["value"], "note": f"{note}; {when}"})
    return metrics


def _publish(claim: Claim, setup: Setup, images: ImageSet, num_held_out: int, spent: dict[str, Any]) -> dict[str, Any]:
    """Publish the last weights (their moving average, where there is one), the best ones, and what they gave."""
    place, steps = claim.place, steps_place(claim.place.address)
    saved = newest(steps)
    assert saved is not None
    averaged = setup.training.ema_decay is not None
    place.at(WEIGHTS).write(saved.place.at(AVERAGE if averaged else WEIGHTS).read())
    best = saved.facts["best"]
    if best:
        place.at(BEST).write(steps.at(best["weights"]).read())
    manifest = publish(
        place,
        {
            "model": replace(setup, weights=setup.weights if setup.weights in NO_FILE else Place(setup.weights).uri).to_json(),
            "metrics": _metrics(saved, build_task(setup).criterion),
            "best": {key: best[key] for key in ("epoch", "step", "metrics")} if best else None,
            "steps": saved.step,
            "epochs": saved.facts["epoch"],
            "num_images": len(images),
            "num_held_out": num_held_out,
            "time": {**spent, **{key: round(value, 3) for key, value in saved.facts["spent"].items()}},
        },
    )
    _tidy(place)
    return manifest


def _tidy(place: Place) -> None:
    """Delete the checkpoints of a training that is published."""
    if place.at("steps").exists():
        place.at("steps").remove()


def finetune(options: FinetuneOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Train a model on the chosen images of a pool; return the manifest of its checkpoint/ folder.

    Run again it goes on from the newest checkpoint, or does nothing where it is done. Raises InputError for unusable
    input, RunError for a training that diverges, workers that fail too often, or a place that can't be reached.
    """
    setup = resolve(options)
    train, test = _read(options)
    check(options, setup, len(train.chosen.rows))
    with reached(options.out):
        claim = _claim(options, setup, train, test)
        published = claim.published()
        if published is not None:
            _tidy(claim.place)
            return published
    try_model(replace(setup, class_names=train.class_names or UNKNOWN))
    began = time.perf_counter()
    with reached(options.out, KEPT):
        claim.take()
        if options.workers:
            session.connect(options.address)
        try:
            setup, images, tests = _gather(options, setup, train, test, progress)
        except InputError:
            if not claim.place.at("steps").exists():
                claim.place.remove()  # another input is needed, so none of this is
            raise
        gathered = time.perf_counter()
        _train(_job(options, setup, images, tests), options, progress)
        spent = {
            "finished": now(),
            "seconds_s": round(time.perf_counter() - began, 3),
            "gather_s": round(gathered - began, 3),
            "train_s": round(time.perf_counter() - gathered, 3),
        }
        return _publish(claim, setup, images, len(train.held.rows) if train.held is not None else 0, spent)
