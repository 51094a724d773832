"""Rounds on stored vectors: a linear head is trained on what is labelled, in seconds, and reads all vectors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load, save

from engine.arrays import Floats, Ints
from engine.canonical import canonical_norms, normalize
from engine.chosen import Chosen, hold_out
from engine.evaluate import Labelled, read_test
from engine.folders import begin, digest_of, publish, read_manifest
from engine.influence import influenced
from engine.oracles import COLUMN, Oracle, StoreSubject, Subject
from engine.probe import accuracy, train_head
from engine.rounds.gradients import HEAD, Head, head_gradient, head_options, head_scores
from engine.rounds.plan import FEATURES, LABELED, LABELS, Plan, Read, Trained, given_of
from engine.schema import InputError, Progress, fields_of, parse_hold_out
from engine.select import Strategy, check_vectors
from engine.store import INFLUENCE, PROBS, STABILITY, FeatureStore, part_bytes, publish_features, vectors_array, vectors_numpy
from engine.verbs import ModelOptions, RoundsOptions

MODEL = "head"
WEIGHTS = "head.safetensors"
FOR_IMAGES = (*(f.name for f in fields_of(ModelOptions) if f.name != "hold_out"), "features", "fixed_features")
"""Options that only mean something where images are trained on."""


class Heads:
    """A linear head on a store's vectors; everything that can be wrong is found out when it is made."""

    model, criterion, least_classes = MODEL, "accuracy", 0
    unused: tuple[str, ...] = FOR_IMAGES
    heavy: tuple[str, ...] = (f"{MODEL}/{WEIGHTS}", FEATURES)

    def __init__(self, options: RoundsOptions, strategy: Strategy, oracle: Oracle) -> None:
        given = given_of(options, FOR_IMAGES)
        if given:
            raise InputError(f"{', '.join(given)}: for pools of images, and {options.subject} holds features; leave that out")
        self.options, self.strategy = options, strategy
        self.store = FeatureStore.of_vectors(options.subject)
        if self.store.vectors_per_image > 1:
            raise InputError(f"{options.subject} has up to {self.store.vectors_per_image} vectors an image: a head takes one")
        check_vectors(strategy, self.store)
        if strategy.encoder == STABILITY:
            raise InputError(f"strategy {strategy.name!r} reads what a detector says, and {options.subject} holds vectors")
        if options.reference_labels is not None:
            raise InputError("--reference-labels are for pools of images: a --reference of features has its own")
        self.scoring = head_options(strategy.encoder, options.encoder_option) if strategy.encoder else None
        if self.scoring is not None:
            influenced(torch.nn.Linear(1, 1), self.scoring.parameters or "all", HEAD)  # before anything is trained
        self.reference = self._reference()
        self.test: Labelled = read_test(options.test, self.store, options.normalize)
        self.test_store = FeatureStore(options.test)
        if self.test_store.digest == self.store.digest:
            raise InputError(f"--test {options.test!r} is what is picked from: the metrics would be of vectors trained on")
        column = oracle.where if oracle.kind == COLUMN and oracle.where else "label"
        if oracle.kind == COLUMN and column not in self.store.columns:
            known = ", ".join(self.store.columns)
            raise InputError(f"--oracle 'column:{column}': the features have no column {column!r} (one of: {known})")
        names = self.store.class_names or self.test_store.class_names
        self.subject: Subject = StoreSubject(self.store, column, tuple(names) if names else None)
        self.num_rows = self.store.num_vectors
        self.norms: dict[str, Floats] = {}

    def _reference(self) -> Labelled | None:
        """Return the vectors of --reference; raises InputError where they don't fit, or are those that are picked from."""
        uri = self.options.reference
        if uri is None:
            return None
        if FeatureStore(uri).digest == self.store.digest:
            raise InputError(f"--reference {uri!r} is what is picked from, whose labels nobody has paid for yet")
        return read_test(uri, self.store, self.options.normalize)

    def check(self, start: int) -> None:
        """Do nothing: a head fits any number of vectors."""

    def needs(self, strategy: Strategy) -> bool:
        """Return whether a strategy reads what the last round's head gives."""
        return bool(strategy.predictions)

    def digests(self) -> tuple[str, str]:
        """Return those of the store and of the test store."""
        return self.store.digest, self.test_store.digest

    def identity(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the digests of what it reads, and the options of its own that decide what comes out."""
        uri = self.options.reference
        inputs = {"features": self.store.digest, "test": self.test_store.digest}
        inputs |= {"reference": FeatureStore(uri).digest} if uri else {}
        return inputs, {"encoder_option": asdict(self.scoring)} if self.scoring else {}

    def reads(self) -> list[str]:
        """Return the places that it reads."""
        return [uri for uri in (self.options.subject, self.options.test, self.options.reference) if uri]

    def base(self, plan: Plan, progress: Progress) -> str:
        """Return the store itself."""
        return self.options.subject

    def read(self, plan: Plan, number: int, progress: Progress) -> Read:
        """Return what round `number` selects from: the store's vectors, and what the last head gives for them."""
        predictions, spent = None, 0.0
        if self.strategy.predictions:
            spent = self._predict(plan, number - 1, progress)["time"]["seconds_s"]
            predictions = plan.place(number - 1).at(FEATURES, self.encoder).address
        return Read(self.options.subject, predictions, self.options.normalize, spent)

    @property
    def encoder(self) -> str:
        """What the strategy reads of a head: probs, or scores, by the name of the encoder that gives them of images."""
        return self.strategy.encoder or PROBS

    def _labelled(self, plan: Plan, number: int) -> tuple[Labelled, Labelled | None]:
        """Return the vectors to train on after a round's picks, ascending by row, and those that are held out."""
        place = plan.place(number)
        rows = np.array(json.loads(place.at(LABELED).read()), dtype=np.int64)
        table = pq.read_table(pa.BufferReader(place.at(LABELS).read()))
        code = dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
        count = parse_hold_out(self.options.hold_out, len(rows))
        kept, held = hold_out(Chosen(rows, ""), count, self.options.seed)

        def of(some: Ints) -> Labelled:
            labels = np.array([code[name] for name in self.store.ids(some)], dtype=np.int64)
            return Labelled(self._vectors(self.store.vectors(some)), labels)

        return of(kept.rows), None if held is None else of(held.rows)

    def _vectors(self, stored: npt.NDArray[Any], part: str | None = None) -> torch.Tensor:
        """Return vectors as the head takes them; the norms of a `part` are kept, they take longer than all the rest."""
        x = torch.from_numpy(np.array(stored, dtype=np.float32))
        if not self.options.normalize:
            return x
        if part is None:
            return normalize(x)
        if part not in self.norms:
            self.norms[part] = canonical_norms(x)
        return normalize(x, self.norms[part])

    def train(self, plan: Plan, number: int, progress: Progress) -> Trained:
        """Train a head on everything labelled so far, or return what was; it is OUT/round-RR/head."""
        place = plan.place(number).at(MODEL)
        inputs = {"features": self.store.digest, "labels": digest_of(plan.place(number).at(LABELS).read())}
        inputs |= {"test": self.test_store.digest}
        options = {
            name: getattr(self.options, name) for name in ("linear_epochs", "linear_rate", "seed", "normalize", "hold_out")
        }
        manifest = begin(place, MODEL, inputs, options, overwrite=False)
        if manifest is None:
            began = time.perf_counter()
            train, held = self._labelled(plan, number)
            names, seen = self.subject.class_names, [one.y for one in (train, held, self.reference) if one is not None]
            classes = len(names) if names else 1 + int(max(y.max() for y in seen))
            given = self.options
            head = train_head(train.x, train.y, classes, given.linear_epochs, given.seed, given.linear_rate)
            value = accuracy(head, self.test.x, self.test.y)
            place.at(WEIGHTS).write(save({"weight": head.weight.detach(), "bias": head.bias.detach()}))
            note = f"% top-1 of a linear head on {len(train.y):,} stored vectors, {len(self.test.y):,} to test on"
            facts: dict[str, Any] = {"metrics": [{"metric": self.criterion, "value": value, "note": note}]}
            facts |= {"num_images": len(train.y), "num_classes": classes, "class_names": list(names) if names else None}
            manifest = publish(place, {**facts, "time": {"seconds_s": round(time.perf_counter() - began, 3)}})
        return Trained(manifest["metrics"], manifest["num_images"], manifest["time"]["seconds_s"])

    def _head(self, place: Any) -> torch.nn.Linear:
        """Return a published head."""
        state = load(place.at(WEIGHTS).read())
        head = torch.nn.Linear(state["weight"].shape[1], len(state["bias"]))
        head.load_state_dict(state)
        return head.requires_grad_(False)

    def _predict(self, plan: Plan, number: int, progress: Progress) -> dict[str, Any]:
        """Write what a round's head gives for all vectors as OUT/round-RR/features/ENCODER; return that store's manifest."""
        model, place = plan.place(number).at(MODEL), plan.place(number).at(FEATURES, self.encoder)
        trained = read_manifest(model)
        assert trained is not None
        digest = trained["files"][WEIGHTS]["sha256"]
        inputs, options = {"features": self.store.digest, "head": digest}, {"encoder": self.encoder}
        published = begin(place, "features", inputs, options, overwrite=False)
        if published is not None:
            return published
        began, parts = time.perf_counter(), list[dict[str, Any]]()
        give = self._giver(plan, number, self._head(model), progress)
        column = INFLUENCE if self.scoring else PROBS
        for name, rows, ids, x in self._parts():
            values = give(x).numpy()
            columns = {"row": rows, "id": ids, "label": pa.nulls(len(rows), pa.int64()), column: vectors_array(values)}
            data = part_bytes(pa.table(columns))
            place.at("parts", name).write(data)
            parts.append(_entry(self.store, name, len(rows), data))
            progress("embed", sum(part["num_vectors"] for part in parts), self.num_rows, "")
        facts = {
            "num_rows": self.store.num_rows,
            "num_rejected": self.store.manifest["num_rejected"],
            "dim": 1 if self.scoring else trained["num_classes"],
            "column": column,
            "dtype": "float32",
            "class_names": None,
            "pool": self.store.manifest["pool"],
            "encoder": {"name": self.encoder, "head": digest, "class_names": trained["class_names"]},
            "time": {"seconds_s": round(time.perf_counter() - began, 3)},
        }
        return publish_features(place, parts, facts)

    def _giver(
        self, plan: Plan, number: int, head: torch.nn.Linear, progress: Progress
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what makes probabilities, or scores, of vectors (r, d)."""
        if self.scoring is None or self.strategy.encoder is None:
            return lambda x: head(x).softmax(dim=1)
        train, held = self._labelled(plan, number)
        reference = self.reference or held
        assert reference is not None
        scored = Head(head, self.strategy.encoder, self.scoring, self.options.seed)
        return head_scores(scored, head_gradient(scored, train, reference, progress), self.num_rows)

    def _parts(self) -> Iterator[tuple[str, Ints, pa.ChunkedArray, torch.Tensor]]:
        """Yield (name, rows, ids, vectors as the head takes them) of every part of the store."""
        for part in self.store.manifest["parts"]:
            table = self.store.read_part(part["name"], ["row", "id", self.store.column])
            x = self._vectors(vectors_numpy(table[self.store.column]), part["name"])
            yield part["name"], table["row"].to_numpy(), table["id"], x


def _entry(store: FeatureStore, name: str, num_vectors: int, data: pa.Buffer) -> dict[str, Any]:
    """Return what a manifest says of a part that has no labels, beside what it says of the store's own part."""
    given = next(part for part in store.manifest["parts"] if part["name"] == name)
    kept = {key: given[key] for key in ("name", "start", "stop", "num_rejected")}
    return {**kept, "num_vectors": num_vectors, "num_labeled": 0, "sha256": digest_of(data.to_pybytes()), "bytes": data.size}
