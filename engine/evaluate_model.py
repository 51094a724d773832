"""What a trained model is worth: its predictions for a labelled pool, against that pool's labels or boxes.

Predictions are a feature store like any other, and the labels stand beside them in it, so metrics are computed from the
store alone.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.arrays import Ints
from engine.checkpoints import Checkpoint
from engine.chosen import read_chosen
from engine.folders import Claim, publish, read_manifest
from engine.images import Record, record_of
from engine.labels import Labels, read_labels
from engine.places import Place
from engine.predict import predict
from engine.retry import reached
from engine.schema import InputError, Progress
from engine.sources import Pool, columns_of, open_pool
from engine.sources.boxes import BOXES
from engine.store import DETECTIONS, FeatureStore, detections_numpy, vectors_numpy
from engine.tasks import Prediction, Task, build_task
from engine.verbs import EvaluateOptions, PoolOptions, PredictOptions

PREDICTIONS = "predictions"
FOR_MODELS = (*(field.name for field in fields(PoolOptions)), "labels", "best", "batch_size", "max_rejected")
"""Options that only the evaluation of a checkpoint reads."""
FOR_FEATURES = ("selection", "metrics", "neighbors", "linear_epochs", "emd_sample", "seed", "memory_per_shard", "device")
"""Options that only the evaluation of a selection reads."""


def given_of(options: EvaluateOptions, names: Sequence[str]) -> list[str]:
    """Return the flags of those of some options that have another value than their default."""
    defaults = {field.name: field.default for field in fields(options)}
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != defaults[name]]


def is_checkpoint(uri: str) -> bool:
    """Return whether a folder is a published checkpoint."""
    manifest = read_manifest(Place(uri))
    return manifest is not None and manifest["kind"] == "checkpoint"


def class_map(theirs: Sequence[str] | None, ours: Sequence[str], uri: str) -> Ints | None:
    """Return the model's class of each of a pool's, by name, or None where the pool has no names and the numbers count.

    Raises InputError that names the classes which the model doesn't know. It may know more than the pool has.
    """
    if theirs is None:
        return None
    unknown = [name for name in theirs if name not in ours]
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        known = ", ".join(ours[:10]) + (f" and {len(ours) - 10} more" if len(ours) > 10 else "")
        raise InputError(f"{uri} has classes that the model does not know: {shown} (it knows {known})")
    return np.array([list(ours).index(name) for name in theirs], dtype=np.int64)


@dataclass
class Judged:
    """Predictions with their records; how many images had no truth to hold them against, and how many labels no image."""

    predictions: list[Prediction]
    records: list[Record]
    without: int
    unused: int


@dataclass(frozen=True)
class Truth:
    """What predictions are held against: the store's own labels or boxes, or `labels` that come apart.

    `classes` are the model's, by the pool's own number; None where they have the same numbers.
    """

    classes: Ints | None
    labels: Labels | None

    def beside(self, table: pa.Table) -> pa.Table:
        """Return row, id, label and boxes of a part's images."""
        names = [name for name in ("row", "id", "label", BOXES.name) if name in table.column_names]
        if self.labels is None:
            return table.select(names)
        at = self.labels.find(table["id"].to_pylist())
        there, place = at >= 0, pa.array(np.maximum(at, 0))
        codes = self.labels.codes[np.maximum(at, 0)]
        label = pa.array(codes, pa.int64(), mask=~there | (codes < 0))
        boxes = pa.nulls(len(at), BOXES.type)
        if self.labels.boxes is not None:
            boxes = pc.if_else(pa.array(there), self.labels.boxes.take(place), boxes)
        return pa.table({"row": table["row"], "id": table["id"], "label": label, BOXES.name: boxes})


def read_judged(store: FeatureStore, truth: Truth) -> Judged:
    """Return a store's predictions and the truth beside them: labels or boxes, whichever they are held against.

    Raises InputError for a class that is none of the pool's: its number may be another class of the model.
    """
    boxes = store.column == DETECTIONS
    key = BOXES.name if boxes else "label"
    judged = Judged([], [], 0, 0)
    for part in store.manifest["parts"]:
        table = store.read_part(part["name"])
        values = table[store.column]
        predictions = detections_numpy(values) if boxes else list(vectors_numpy(values).astype(np.float32))
        for row, prediction in zip(_rows(truth.beside(table)), predictions, strict=True):
            if row[key] is None:
                judged.without += 1
                continue
            record = record_of({**row, "label": None, BOXES.name: None, key: row[key], "image": b""})
            judged.predictions.append(prediction)
            judged.records.append(record if truth.classes is None else _mapped(record, truth.classes, store))
    if truth.labels is not None:
        used = pc.is_in(truth.labels.ids, value_set=store.read_column("id").combine_chunks())
        judged.unused = truth.labels.num_unused + used.false_count
    return judged


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _mapped(record: Record, classes: Ints, store: FeatureStore) -> Record:
    boxes = store.column == DETECTIONS
    codes = record.box_labels if boxes else np.array([record.label])
    strange = codes[(codes < 0) | (codes >= len(classes))]
    if len(strange):
        raise InputError(
            f"image {record.id!r} of {store.manifest['pool']['uri']} has class {strange[0]}, and the pool names classes 0 to "
            f"{len(classes) - 1}"
        )
    return replace(record, box_labels=classes[codes]) if boxes else replace(record, label=int(classes[record.label]))


def measure_store(task: Task, store: FeatureStore, truth: Truth) -> list[dict[str, Any]]:
    """Return the task's metrics of a store of predictions, [{metric, value, note}].

    Images without truth are left out; the first metric's note says how many, and how many could not be read. Raises
    InputError where none has any, or a label is none of the model's.
    """
    uri, judged = store.manifest["pool"]["uri"], read_judged(store, truth)
    what = "boxes" if store.column == DETECTIONS else "a label"
    if not judged.records:
        raise InputError(f"no image of {uri} has {what}: there is nothing to measure against")
    for record in judged.records:
        reason = task.check(record)
        if reason:
            raise InputError(f"image {record.id!r} of {uri} can't be measured against: it has {reason}")
    (metric, value, note), *others = task.measure(judged.predictions, judged.records)
    counts = (
        (judged.without, f"without {what}"),
        (store.manifest["num_rejected"], "that can't be read"),
        (judged.unused, "of the labels, whose images are not there"),
    )
    out = [f"{count:,} {why}" for count, why in counts if count]
    told = [note] if note else []
    told += [f"left out: {', '.join(out)}"] if out else []
    results = [(metric, value, "; ".join(told)), *others]
    return [{"metric": metric, "value": value, "note": note} for metric, value, note in results]


def _check(options: EvaluateOptions) -> str:
    """Return the test pool's address; raises InputError for options that a checkpoint's evaluation can't have."""
    if options.test is None:
        raise InputError(f"{options.subject} is a checkpoint: give --test POOL, the labelled images to measure it on")
    given = given_of(options, FOR_FEATURES)
    if given:
        raise InputError(f"{', '.join(given)}: for features, and {options.subject} is a checkpoint; leave that out")
    if options.precision == "tf32":
        raise InputError("--precision tf32 is for features: a checkpoint takes float32 or bf16")
    if options.address is not None and options.out is None:
        raise InputError("--address needs --out: the cluster writes predictions to a folder that all its nodes reach")
    return options.test


@contextlib.contextmanager
def _folder(out: Place | None) -> Iterator[str]:
    """Give the folder for predictions: of the metrics' own, or one that is gone afterwards."""
    if out is not None:
        yield out.at(PREDICTIONS).address
        return
    with tempfile.TemporaryDirectory(prefix="coresift-") as folder:
        yield f"{folder}/{PREDICTIONS}"


def evaluate_model(options: EvaluateOptions, progress: Progress) -> list[dict[str, Any]]:
    """Measure a checkpoint on a labelled pool; return [{metric, value, note}], and publish it as metrics/ if `out` is given.

    OUT/predictions keeps the predictions, and goes on where it stopped.
    """
    test = _check(options)
    checkpoint = Checkpoint(options.subject)
    digest, task = checkpoint.digest(options.best), build_task(checkpoint.setup)
    with reached(test):
        pool = open_pool(test, columns_of(options))
    truth = _truth(options, checkpoint, pool)
    has_boxes = truth.labels.boxes is not None if truth.labels is not None else BOXES.name in pool.schema.names
    if task.column == DETECTIONS and not has_boxes:
        where = test if truth.labels is None else f"--labels {options.labels}"
        raise InputError(f"{where} has no boxes: a detector is measured on COCO, VOC, or a table with a column `boxes`")
    claim = _claim(options, digest, pool, truth)
    if claim:
        published = claim.published()
        if published is not None:
            return list(published["metrics"])
        claim.take()
    with _folder(claim.place if claim else None) as folder:
        told = {field.name: getattr(options, field.name) for field in fields(PoolOptions)}
        told |= {name: getattr(options, name) for name in ("best", "batch_size", "precision", "max_rejected", "workers")}
        predict(PredictOptions(pool=test, checkpoint=options.subject, out=folder, address=options.address, **told), progress)
        results = measure_store(task, FeatureStore(folder), truth)
    if claim:
        publish(claim.place, {"metrics": results})
    return results


def _truth(options: EvaluateOptions, checkpoint: Checkpoint, pool: Pool) -> Truth:
    """Return what predictions are held against; raises InputError where its classes are not the model's."""
    names = checkpoint.setup.class_names
    if options.labels is None:
        return Truth(class_map(pool.class_names, names, pool.uri), None)
    with reached(options.labels):
        every = read_chosen("all", pool)
        return Truth(None, read_labels(options.labels, pool, every, names, options.id_column, options.label_column))


def _claim(options: EvaluateOptions, digest: str, pool: Pool, truth: Truth) -> Claim | None:
    if options.out is None:
        return None
    labels = truth.labels.digest if truth.labels is not None else None
    inputs = {"checkpoint": digest, "test": {"digest": pool.digest, "num_rows": pool.num_rows}, "labels": labels}
    decisive = [name for name in FOR_MODELS if name not in ("labels", "best", "max_rejected")]
    identity = {name: getattr(options, name) for name in (*decisive, "precision")}
    reads = [uri for uri in (options.subject, options.test, options.labels) if uri is not None]
    return Claim.of(Place(options.out), "metrics", inputs, identity, options.overwrite, reads)
