"""Rounds on a pool of images: a network is finetuned on what is labelled, and reads the whole pool for the next round."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from engine.backbones import NO_FILE
from engine.checkpoints import BEST, HELDOUT, IMAGES
from engine.chosen import read_chosen
from engine.embed import embed_all
from engine.finetune import RESOLVED, UNKNOWN, Data, check, finetune, identity_of, read_test, try_model
from engine.labels import read_labels
from engine.oracles import COLUMN, Oracle, PoolSubject, Subject
from engine.reading import PREDICTED
from engine.recipes import resolve
from engine.retry import reached
from engine.rounds.plan import FEATURES, LABELED, LABELS, Plan, Read, Trained
from engine.schema import InputError, Progress
from engine.scorers import own_options, resolved
from engine.scoring import check_options
from engine.select import Strategy
from engine.sources import Pool, columns_of, open_pool, read
from engine.sources.boxes import BOXES
from engine.store import STABILITY, FeatureStore
from engine.tasks import Setup, build_task
from engine.tasks.setup import WEIGHTS
from engine.verbs import EmbedOptions, FinetuneOptions, ModelOptions, PoolOptions, PreprocessingOptions, RoundsOptions

MODEL = "checkpoint"
START = "start"
START_PX = 1
"""Side of the images that the start's features are: they only tell which images can be read."""


def finetune_options(options: RoundsOptions, out: str, labels: str | None, selection: str) -> FinetuneOptions:
    """Return how a round's network is trained."""
    given: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(ModelOptions)}
    own: dict[str, Any] = {"pool": options.subject, "test": options.test, "seed": options.seed, "address": options.address}
    return FinetuneOptions(out=out, selection=selection, labels=labels, **own, **given)


def embed_options(options: RoundsOptions, out: str, encoder: str, **given: Any) -> EmbedOptions:
    """Return how the pool is embedded."""
    names = ("seed", "max_rejected", "decode_workers", "cpus_per_worker", "gpus_per_worker", "address")
    shared = {name: getattr(options, name) for name in (*names, *(field.name for field in fields(PoolOptions)))}
    return EmbedOptions(pool=options.subject, out=out, encoder=encoder, workers=options.embed_workers, **{**shared, **given})


def encoders_of(strategy: Strategy, task: str, column: str, fixed: bool) -> tuple[str | None, str | None]:
    """Return the encoders that give what a strategy reads: its vectors, and the predictions; None for what it doesn't.

    `column` holds the task's own predictions. Raises InputError for a strategy that can't read what the task gives.
    """
    vectors = predictions = None
    if strategy.vectors and not fixed:
        if column != "probs":
            raise InputError(
                f"strategy {strategy.name!r} reads vectors, and a model for {task} gives none: name some with --features DIR "
                "--fixed-features, or take a strategy that reads predictions alone"
            )
        vectors = "patterns" if strategy.patterns else "embedding"
    if strategy.encoder == STABILITY and column == "probs":
        raise InputError(
            f"strategy {strategy.name!r} reads how boxes move, and a model for {task} gives none: it is for detect"
        )
    if strategy.predictions:
        predictions = strategy.encoder or column
        if predictions == column and PREDICTED[column] not in strategy.predictions:
            raise InputError(f"strategy {strategy.name!r} reads probabilities, and a model for {task} gives boxes: use entropy")
    return vectors, predictions


class Networks:
    """A network that is trained on a pool's images; everything that can be wrong is found out when it is made."""

    model = MODEL
    unused: tuple[str, ...] = (
        *RESOLVED,
        *(field.name for field in fields(PreprocessingOptions)),
        "linear_epochs",
        "linear_rate",
    )
    heavy: tuple[str, ...] = (*(f"{MODEL}/{name}" for name in (WEIGHTS, BEST, IMAGES, HELDOUT, "test")), FEATURES)

    def __init__(self, options: RoundsOptions, strategy: Strategy, oracle: Oracle) -> None:
        self.options, self.strategy = options, strategy
        told = finetune_options(options, options.out, None, "all")
        self.setup: Setup = resolve(told)
        with reached(options.subject):
            self.pool: Pool = open_pool(options.subject, columns_of(options))
        test = read_test(told, self.pool, self.pool.class_names)
        assert test is not None
        self.test: Data = test
        task = build_task(replace(self.setup, class_names=UNKNOWN))
        self.criterion, boxes = task.criterion, task.column != "probs"
        self.encoders = encoders_of(strategy, self.setup.task, task.column, options.fixed_features)
        self.features = self._features()
        self.num_rows = self.features.num_vectors if self.features else self.pool.num_rows
        names = self.pool.class_names or test.class_names
        labelled = self.pool
        if oracle.kind == COLUMN and oracle.where:
            labelled = open_pool(options.subject, replace(columns_of(options), label=oracle.where))
            names = labelled.class_names or names
        self.subject: Subject = PoolSubject(self.pool, labelled, boxes, names, options.id_column, options.label_column)
        self.least_classes = 0 if names else _num_classes(test, boxes)
        self.told = told
        self.scoring = self._scoring()

    def _scoring(self) -> dict[str, Any]:
        """Return what decides an encoder's scores: its options, and the reference pool's digest.

        Raises InputError for options that it has not, and a pool that can't be read, or is the one that is picked from.
        """
        options, name = self.options, self.strategy.encoder
        if name is None:
            return {}
        told = embed_options(options, options.out, name, encoder_option=options.encoder_option)
        check_options(told, [name])
        named = replace(self.setup, class_names=self.subject.class_names or tuple(map(str, range(self.least_classes))))
        found = {"encoder_option": asdict(resolved(own_options(told, name), build_task(named)))}
        if options.reference is not None:
            with reached(options.reference):
                reference = open_pool(options.reference, replace(columns_of(options), split=None))
            if reference.digest == self.pool.digest:
                raise InputError(f"--reference {options.reference!r} is the pool itself, whose labels nobody has paid for yet")
            found["reference"] = {"pool": reference.digest, "labels": self._reference_labels(reference)}
        return found

    def _reference_labels(self, reference: Pool) -> str | None:
        """Return the digest of --reference-labels, None where the pool's own count."""
        uri, options = self.options.reference_labels, self.options
        if uri is None:
            return None
        names, every = self.subject.class_names, read_chosen("all", reference)
        with reached(uri):
            return read_labels(uri, reference, every, names, options.id_column, options.label_column).digest

    def check(self, start: int) -> None:
        """Raise InputError for a model that can't be had, or options that don't go together."""
        check(self.told, self.setup, start)
        try_model(replace(self.setup, class_names=self.subject.class_names or UNKNOWN))

    def _features(self) -> FeatureStore | None:
        """Return the store of --features; raises InputError where it is of other images, or needed and not given."""
        options = self.options
        if options.features is None:
            if options.fixed_features:
                raise InputError("--fixed-features are those of --features DIR: give it, too")
            return None
        store = FeatureStore(options.features)
        known = store.manifest["inputs"].get("pool", {}).get("digest")
        if store.num_rows != self.pool.num_rows or known not in (None, self.pool.digest):
            raise InputError(
                f"--features {options.features!r} are of other images than pool {options.subject!r}: embed that pool, with the "
                "same options of how it is read"
            )
        return store

    def needs(self, strategy: Strategy) -> bool:
        """Return whether a strategy reads what the last round's model gives."""
        return bool(strategy.predictions) or (strategy.vectors and not self.options.fixed_features)

    def digests(self) -> tuple[str, str]:
        """Return those of the pool and of the test pool."""
        return self.pool.digest, self.test.pool.digest

    def identity(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the digests of what it reads, and the options of its own that decide what comes out."""
        setup, weights = identity_of(self.setup)
        inputs = {
            "pool": {"digest": self.pool.digest, "num_rows": self.pool.num_rows},
            "features": self.features.digest if self.features else None,
            "test": self.test.inputs(),
            "weights": weights,
        }
        return inputs, {"setup": setup, **self.scoring}

    def reads(self) -> list[str]:
        """Return the places that it reads."""
        options = self.options
        weights = None if self.setup.weights in NO_FILE else self.setup.weights
        named = (options.subject, options.test, options.test_labels, options.features, weights, options.reference)
        return [uri for uri in (*named, options.reference_labels) if uri]

    def base(self, plan: Plan, progress: Progress) -> str:
        """Return --features, or a store of OUT/start that says which images can be read."""
        if self.features is not None:
            return self.features.place.address
        out = plan.out.at(START).address
        embed_all(embed_options(self.options, out, "pixels", pixels_size=START_PX), progress)
        return out

    def read(self, plan: Plan, number: int, progress: Progress) -> Read:
        """Return what round `number` selects from; the pool goes through the last model for what that must give."""
        base, before = self.base(plan, progress), plan.place(number - 1)
        stores = {name: before.at(FEATURES, name) for name in self.encoders if name is not None}
        spent = 0.0
        if stores:
            out = before.at(FEATURES) if len(stores) > 1 else next(iter(stores.values()))
            checkpoint = before.at(MODEL).address
            scoring = ("reference", "reference_labels", "encoder_option") if self.strategy.encoder else ()
            given = {"checkpoint": checkpoint, **{name: getattr(self.options, name) for name in scoring}}
            made = embed_all(embed_options(self.options, out.address, ",".join(stores), **given), progress)
            spent = max(manifest["time"]["seconds_s"] for manifest in made)
        vectors, predictions = (None if name is None else stores[name].address for name in self.encoders)
        return Read(vectors or base, predictions, self._normalized(vectors is not None), spent)

    def _normalized(self, own: bool) -> bool:
        """Return whether vectors are normalised: badge's, where they are the model's `own`, are what its last layer sees."""
        if own and self.strategy.name == "badge":
            return bool(getattr(self.setup.training, "normalize", False))
        return self.options.normalize

    def train(self, plan: Plan, number: int, progress: Progress) -> Trained:
        """Finetune on everything labelled so far; the checkpoint is OUT/round-RR/checkpoint."""
        place = plan.place(number)
        labels, rows = place.at(LABELS).address, place.at(LABELED).address
        manifest = finetune(finetune_options(self.options, place.at(MODEL).address, labels, rows), progress)
        return Trained(manifest["metrics"], manifest["num_images"], manifest["time"]["seconds_s"])


def _num_classes(test: Data, boxes: bool) -> int:
    """Return one more than the largest class of a test pool whose classes are numbers."""
    if test.labels is not None:
        drawn = test.labels.boxes.flatten().field("label").to_numpy() if boxes and test.labels.boxes is not None else []
        return 1 + int(max(test.labels.codes.max(initial=-1), np.max(drawn, initial=-1)))
    most = -1
    for sample in read(test.pool, 0, test.pool.num_rows):
        drawn = [box["label"] for box in sample.extra.get(BOXES.name) or ()] if boxes else [sample.label]
        most = max(most, *(label for label in drawn if label is not None), -1)
    return 1 + most
