"""The STRATEGIES table: what each strategy is called, what it reads, and where it is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from engine.reading import PREDICTED
from engine.runner import Method
from engine.schema import InputError, build_options, fields_of, lookup
from engine.store import INFLUENCE, STABILITY, FeatureStore, no_vectors


@dataclass(frozen=True)
class Strategy:
    """A row of STRATEGIES. `columns` are the store's columns that the method reads beside the vectors.

    `nested`: the picks for a smaller budget are a prefix of those for a larger one, so one run answers them all.
    `patterns`: it takes images with several vectors. `predictions` are those of a model that it can read, `probs`, `score`,
    `influence` or `stability` (`Block.predictions`), by `encoder` alone where that is named; with `vectors` false it reads
    nothing else.
    """

    module: str
    name: str
    summary: str
    nested: bool = False
    columns: tuple[str, ...] = ()
    patterns: bool = False
    predictions: tuple[str, ...] = ()
    vectors: bool = True
    encoder: str | None = None

    def load(self) -> tuple[Method, type[Any]]:
        """Import the module; return its method and its Options."""
        module = importlib.import_module(self.module)
        return getattr(module, self.name), module.Options


def _scored(name: str, summary: str) -> Strategy:
    """Return the row of a strategy that ranks images by what a model gave for each."""
    return Strategy("engine.select.scored", name, summary, nested=True, predictions=("probs", "score"), vectors=False)


def _lowest(name: str, summary: str, column: str) -> Strategy:
    """Return the row of a strategy that takes the images of lowest score, which the encoder of its name gave."""
    reads = (column,)
    return Strategy("engine.select.lowest", name, summary, nested=True, predictions=reads, vectors=False, encoder=name)


STRATEGIES: dict[str, Strategy] = {
    "random": Strategy(
        "engine.select.baselines", "random", "one seeded permutation of the pool", nested=True, patterns=True, vectors=False
    ),
    "uniform": Strategy(
        "engine.select.baselines",
        "uniform",
        "equally many of every class, by the pool's own labels",
        columns=("label",),
        patterns=True,
        vectors=False,
    ),
    "kmeans": Strategy("engine.select.kmeans", "kmeans", "the image nearest to each of `budget` k-means centres"),
    "activeft": Strategy(
        "engine.select.activeft", "activeft", "vectors moved towards the pool and apart, each snapped to an image"
    ),
    "coreset": Strategy(
        "engine.select.coreset", "coreset", "k-center greedy: always the image farthest from all picks", nested=True
    ),
    "maxherding": Strategy(
        "engine.select.maxherding", "maxherding", "always the image that adds most to the pool's kernel coverage", nested=True
    ),
    "probcover": Strategy(
        "engine.select.probcover", "probcover", "always the image whose ball covers most of what is uncovered", nested=True
    ),
    "facility_location": Strategy(
        "engine.select.facility_location",
        "facility_location",
        "always the image that adds most to each image's similarity to its most similar pick",
        nested=True,
    ),
    "typiclust": Strategy("engine.select.typiclust", "typiclust", "the most typical image of each uncovered k-means cluster"),
    "hierarchical": Strategy(
        "engine.select.hierarchical", "hierarchical", "k-means of k-means, and the budget split evenly down the tree"
    ),
    "freesel": Strategy(
        "engine.select.freesel", "freesel", "images drawn by their patterns' distance to the picks", nested=True, patterns=True
    ),
    "entropy": _scored("entropy", "the images whose predicted class, or boxes, a model is least sure of, by entropy"),
    "margin": _scored("margin", "the same by the smallest margin between the two likeliest classes"),
    "least_confidence": _scored("least_confidence", "the same by the lowest probability of the likeliest class"),
    "influence": _lowest(
        "influence", "the images that lower the loss on a reference set the most, by a trained model", INFLUENCE
    ),
    "gradient_similarity": _lowest(
        "gradient_similarity", "the images whose gradients are most like those of a reference set", INFLUENCE
    ),
    "stability": _lowest("stability", "the images in which a detector's boxes move most under noise", STABILITY),
    "badge": Strategy(
        "engine.select.badge",
        "badge",
        "images drawn by the distance of their gradient embeddings to those of the picks",
        nested=True,
        predictions=("probs",),
    ),
}


def strategy_options(name: str, given: dict[str, Any]) -> tuple[Strategy, Method, Any]:
    """Look a strategy up and check its options; raises InputError that lists what is allowed."""
    strategy = lookup(name, STRATEGIES, "strategy")
    method, declared = strategy.load()
    return strategy, method, build_options(declared, given, f"strategy {name!r}")


def check_vectors(strategy: Strategy, store: FeatureStore) -> None:
    """Raise InputError when the strategy reads vectors and the store has none, or takes one an image and it has several."""
    if strategy.vectors and not store.holds_vectors:
        raise no_vectors(store)
    if store.vectors_per_image > 1 and not strategy.patterns:
        raise InputError(
            f"strategy {strategy.name!r} takes one vector an image, and {store.place.uri} has up to "
            f"{store.vectors_per_image} (patterns): use freesel"
        )


def check_labels(strategy: Strategy, store: FeatureStore) -> None:
    """Raise InputError where a strategy reads the pool's labels and some image has none."""
    lacking = store.num_vectors - store.num_labeled
    if "label" in strategy.columns and lacking:
        where = f"{lacking} images of {store.place.uri}"
        raise InputError(f"strategy {strategy.name!r} reads the pool's labels, and {where} have none: use 'random'")


def describe_strategies() -> list[dict[str, Any]]:
    """Return every strategy with its summary and its options: name, type, default, help."""
    described = []
    for name, strategy in STRATEGIES.items():
        _, declared = strategy.load()
        options = [{"name": f.name, "default": f.default, "help": f.opt.help} for f in fields_of(declared)]
        predictions = " or ".join(column for column, name in PREDICTED.items() if name in strategy.predictions)
        reads = [*(["vectors"] if strategy.vectors else []), *strategy.columns, *([predictions] if predictions else [])]
        described.append(
            {"name": name, "summary": strategy.summary, "reads": reads, "nested": strategy.nested, "options": options}
        )
    return described
