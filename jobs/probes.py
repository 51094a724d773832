"""What was measured for a plan, each thing once; and the file that keeps it for the next plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.folders import digest_of, versions
from engine.places import Place
from engine.schema import InputError, Progress, no_progress, result_options
from engine.store import FeatureStore, vectors_numpy
from engine.verbs import EmbedOptions, FinetuneOptions
from jobs import embedding, finetuning, selecting
from jobs.embedding import Embedded, Piece, Stored
from jobs.finetuning import Trained
from jobs.selecting import Measured, Point
from jobs.traffic import Size

FORMAT = 1
KIND = "coresift probe"
MADE_UP = 256
"""Vectors that are made up where there are none of the pool yet."""


@dataclass
class Probes:
    """Measurements by what they are of: read from a file, or made when they are asked for."""

    rows: int
    progress: Progress = no_progress
    embedded: dict[str, Embedded] = field(default_factory=dict)
    trained: dict[str, Trained] = field(default_factory=dict)
    selected: dict[str, Measured] = field(default_factory=dict)
    vectors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    made: int = 0
    """Measurements that were made now."""

    def embed(self, options: EmbedOptions) -> Embedded:
        """Return the probe of an embedding."""
        key = _key(replace(options, out=""), options.pool, options.weights, options.checkpoint)
        if key not in self.embedded:
            self.embedded[key], vectors = embedding.probe(options, self.rows, self.progress)
            self.vectors |= {f"{key}/{name}": x for name, x in vectors.items()}
            self.made += 1
        return self.embedded[key]

    def vectors_of(self, options: EmbedOptions, encoder: str) -> npt.NDArray[np.float32] | None:
        """Return the vectors that the probe of an embedding made, where it was made now."""
        key = _key(replace(options, out=""), options.pool, options.weights, options.checkpoint)
        return self.vectors.get(f"{key}/{encoder}")

    def train(self, options: FinetuneOptions) -> Trained:
        """Return the probe of a training."""
        key = _key(replace(options, out=""), options.pool, options.weights, options.recipe, options.option)
        if key not in self.trained:
            self.trained[key] = finetuning.probe(options, self.progress)
            self.made += 1
        return self.trained[key]

    def select(
        self, strategy: str, given: dict[str, Any], d: int, most: Size, each: int, x: npt.NDArray[np.float32] | None
    ) -> Measured:
        """Return the measurements of a strategy on vectors like x, or made up where there are none."""
        shape = min(most.n, max(selecting.LARGE)), min(most.b, selecting.SEVERAL_ROUNDS)
        key = digest_of([strategy, {name: str(value) for name, value in given.items()}, d, each, *shape])[:16]
        if key not in self.selected:
            vectors = made_up(d) if x is None or not len(x) else x
            self.selected[key] = selecting.measure(strategy, given, vectors, most, each, self.progress)
            self.made += 1
        return self.selected[key]

    def to_json(self) -> dict[str, Any]:
        """Return what a file keeps."""
        kinds: dict[str, Mapping[str, Any]] = {"embedded": self.embedded, "trained": self.trained, "selected": self.selected}
        told = {kind: {key: dataclasses.asdict(found) for key, found in some.items()} for kind, some in kinds.items()}
        return {"kind": KIND, "format": FORMAT, "versions": versions(), **told}

    def read(self, file: Place) -> None:
        """Take in what a file keeps; raises InputError where it is no such file."""
        if not file.exists():
            raise InputError(f"--probe {file.uri!r} does not exist: make one with --out")
        try:
            value = json.loads(file.read())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"--probe {file.uri!r} is not JSON: give what --out wrote") from error
        if not isinstance(value, dict) or value.get("kind") != KIND or value.get("format") != FORMAT:
            raise InputError(f"--probe {file.uri!r} is not what `coresift plan --out` wrote")
        self.embedded |= {key: _embedded(found) for key, found in value["embedded"].items()}
        self.trained |= {key: Trained(**found) for key, found in value["trained"].items()}
        self.selected |= {key: _measured(found) for key, found in value["selected"].items()}


def _key(options: Any, *more: Any) -> str:
    return digest_of([result_options(options), *map(str, more)])[:16]


def _embedded(found: Mapping[str, Any]) -> Embedded:
    stored = {name: Stored(**value) for name, value in found["stored"].items()}
    return Embedded(**{**found, "stored": stored, "pieces": tuple(Piece(**piece) for piece in found["pieces"])})


def _measured(found: Mapping[str, Any]) -> Measured:
    return Measured(**{**found, "points": tuple(Point(**point) for point in found["points"])})


def made_up(d: int) -> npt.NDArray[np.float32]:
    """Return vectors around 32 centres: for want of the pool's own."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((32, d)).astype(np.float32)
    return centres[rng.integers(0, 32, MADE_UP)] + 0.7 * rng.standard_normal((MADE_UP, d)).astype(np.float32)


def some_vectors(store: FeatureStore) -> npt.NDArray[np.float32]:
    """Return the vectors of a store's first part."""
    return vectors_numpy(store.read_part(store.manifest["parts"][0]["name"])[store.column])[: 4 * MADE_UP].astype(np.float32)
