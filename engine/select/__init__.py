"""Selection: the STRATEGIES table, and `select`, which runs a strategy and publishes what it picked."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from engine.arrays import Ints
from engine.folders import Claim, digest_of, publish, read_manifest
from engine.former import LABELED_IDS, rows_of_former
from engine.placement import open_shards
from engine.places import Place
from engine.reading import PREDICTED, check_same_pool
from engine.runner import Journal, Method, run_method
from engine.schema import (
    InputError,
    Progress,
    build_options,
    fields_of,
    lookup,
    no_progress,
    parse_budgets,
    parse_pairs,
    result_options,
)
from engine.selections import Selection, ids_in, open_selection, rows_in
from engine.shards import Request, Step
from engine.store import INFLUENCE, STABILITY, FeatureStore, no_vectors, table_bytes
from engine.verbs import SelectOptions

SAID = {
    "probs": "probabilities",
    "score": "a detector's boxes",
    "influence": "scores by gradients (influence)",
    "stability": "scores by noise (stability)",
}
"""What predictions are called in errors, by their name in a block."""
COLUMN = "column:"
"""What begins a --labeled or --exclude that names a column of the features."""


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


def read_labeled(uri: str | None, store: FeatureStore) -> Ints:
    """Return the labelled pool rows, ascending: of a selection folder, ids (.txt), rows (.json, .npy) or column:NAME.

    Rows without a vector (rejected images) are left out. Raises InputError for ids or rows the store doesn't know.
    """
    return _read_rows("--labeled", uri, store, "selection", _labeled_and_picked)


def read_excluded(uri: str | None, store: FeatureStore) -> Ints:
    """Return the pool rows that may not be picked, ascending: of a dedup folder, ids (.txt), rows (.json, .npy) or column:NAME.

    As `read_labeled`.
    """
    return _read_rows("--exclude", uri, store, "dedup", _near_copies)


def read_predictions(strategies: Iterable[Strategy], store: FeatureStore, uri: str | None) -> FeatureStore | None:
    """Return the store of a model's predictions that strategies read: --predictions, or `store` itself; None if none does.

    Raises InputError where there is none, or it holds what a strategy can't read, or is of another pool.
    """
    readers = [strategy for strategy in strategies if strategy.predictions]
    if not readers:
        if uri:
            raise InputError(f"--predictions {uri!r}: no strategy named here reads them, leave that out")
        return None
    for strategy in readers:
        if uri is None and (store.column not in PREDICTED or strategy.vectors):
            raise InputError(
                f"strategy {strategy.name!r} reads a model's predictions{' beside the vectors' if strategy.vectors else ''}, "
                f"and {store.place.uri} holds {store.column} alone: give --predictions DIR, what {_writer(strategy)} wrote"
            )
    given = FeatureStore(uri) if uri else store
    if given.column not in PREDICTED:
        raise InputError(f"--predictions {uri!r} holds {given.column}: give what {_writer(readers[0])} wrote of the same pool")
    for strategy in readers:
        _check_reads(strategy, given)
    if uri:
        check_same_pool(store, given)
    return given


def _writer(strategy: Strategy) -> str:
    """Return the command that writes what a strategy reads of a model."""
    return f"`coresift embed --encoder {strategy.encoder}`" if strategy.encoder else "`coresift predict`"


def _check_reads(strategy: Strategy, given: FeatureStore) -> None:
    """Raise InputError where a strategy can't read what a store holds, or another encoder made it."""
    holds = PREDICTED[given.column]
    if holds not in strategy.predictions:
        reads, others = " or ".join(SAID[name] for name in strategy.predictions), []
        others = [name for name, other in STRATEGIES.items() if holds in other.predictions]
        raise InputError(
            f"strategy {strategy.name!r} reads {reads}, and {given.place.uri} holds {SAID[holds]}: use {', '.join(others)}"
        )
    made_by = (given.manifest.get("encoder") or {}).get("name")
    if strategy.encoder is not None and made_by != strategy.encoder:
        raise InputError(
            f"strategy {strategy.name!r} reads what --encoder {strategy.encoder} wrote, and {given.place.uri} is of "
            f"{made_by!r}: use strategy {made_by!r}, or embed again"
        )


def places_read(*uris: str | None) -> list[str]:
    """Return the places among what options name: neither what was not given nor columns of the features."""
    return [uri for uri in uris if uri and not uri.startswith(COLUMN)]


def _labeled_and_picked(uri: str, store: FeatureStore) -> Ints:
    selection = open_selection(uri)
    if selection.manifest["inputs"]["features"] != store.digest:
        return rows_of_former(uri, selection, store)
    return np.concatenate([selection.labeled, selection.picks])


def _near_copies(uri: str, store: FeatureStore) -> Ints:
    place = Place(uri)
    manifest = read_manifest(place)
    if manifest is None or manifest["kind"] != "dedup":
        raise InputError(f"{uri} is not a finished dedup folder: make one with `coresift dedup`")
    if manifest["inputs"]["features"] != store.digest:
        raise InputError(f"{uri} was made from other features than {store.place.uri}")
    return np.array(json.loads(place.at("indices.json").read()), dtype=np.int64)


def _read_rows(
    flag: str, uri: str | None, store: FeatureStore, kind: str, of_folder: Callable[[str, FeatureStore], Ints]
) -> Ints:
    if uri is None:
        return np.empty(0, dtype=np.int64)
    if uri.startswith(COLUMN):
        return _rows_of_column(flag, uri.removeprefix(COLUMN), store)
    place = Place(uri)
    if not place.exists():
        raise InputError(f"{flag} {uri!r} does not exist: give a folder, a .txt, .json or .npy file, or column:NAME")
    if uri.endswith(".txt"):
        return _rows_of_ids(flag, uri, ids_in(place), store)
    if uri.endswith((".json", ".npy")):
        rows = np.unique(rows_in(place, f"{flag} {uri!r}"))
    elif read_manifest(place) is not None:
        rows = np.unique(of_folder(uri, store))
    else:
        raise InputError(f"{flag} {uri!r} is neither a {kind} folder nor a .txt, .json or .npy file")
    outside = rows[(rows < 0) | (rows >= store.num_rows)]
    if len(outside):
        raise InputError(f"{flag} {uri!r} names row {outside[0]}; the pool has rows 0 to {store.num_rows - 1}")
    return np.intersect1d(rows, store.rows)


def _rows_of_column(flag: str, name: str, store: FeatureStore) -> Ints:
    """Return the rows where a column of the store is true, or, if it is not boolean, holds a value."""
    if name not in store.columns:
        raise InputError(f"{flag} 'column:{name}': the features have no column {name!r} (one of: {', '.join(store.columns)})")
    values = store.read_column(name)
    mask = values.fill_null(False) if pa.types.is_boolean(values.type) else values.is_valid()
    return np.asarray(store.rows[mask.to_numpy()], dtype=np.int64)


def _rows_of_ids(flag: str, uri: str, ids: list[str], store: FeatureStore) -> Ints:
    at = pa.compute.index_in(pa.array(ids, pa.string()), store.read_column("id").combine_chunks())
    if at.null_count:
        unknown = ids[at.is_null().to_pylist().index(True)]
        raise InputError(f"{flag} {uri!r} names {unknown!r}, which is not among the pool's ids ({at.null_count} unknown)")
    return np.unique(store.rows[at.to_numpy()])


def write_selection(place: Place, store: FeatureStore, step: Step, labeled: Ints, facts: dict[str, Any]) -> dict[str, Any]:
    """Publish a selection folder: picks.parquet, ids.txt, indices.json, labeled.json, labeled_ids.txt, manifest.json."""
    ids = store.ids(step.picks)
    table = pa.table(
        {
            "rank": pa.array(range(len(ids)), pa.int64()),
            "id": pa.array(ids, pa.string()),
            "row": pa.array(step.picks, pa.int64()),
            "gain": pa.array(step.gains, pa.float64(), from_pandas=True),
            **{name: pa.array(values) for name, values in step.columns.items()},
        }
    )
    data = table_bytes(table)
    place.at("picks.parquet").write(data)
    place.at("ids.txt").write("".join(f"{name}\n" for name in ids).encode())
    place.at("indices.json").write(json.dumps(step.picks.tolist()).encode())
    place.at("labeled.json").write(json.dumps(labeled.tolist()).encode())
    place.at(LABELED_IDS).write("".join(f"{name}\n" for name in store.ids(labeled)).encode())
    return publish(
        place,
        {
            "features": store.place.uri,
            "num_rows": store.num_rows,
            "num_picks": len(ids),
            "num_labeled": len(labeled),
            "objective": step.objective,
            "digest": digest_of(data.to_pybytes()),
            **facts,
        },
    )


def check_labels(strategy: Strategy, store: FeatureStore) -> None:
    """Raise InputError where a strategy reads the pool's labels and some image has none."""
    lacking = store.num_vectors - store.num_labeled
    if "label" in strategy.columns and lacking:
        where = f"{lacking} images of {store.place.uri}"
        raise InputError(f"strategy {strategy.name!r} reads the pool's labels, and {where} have none: use 'random'")


def prefix(step: Step, count: int) -> Step:
    """Return the first `count` picks of a nested method's last step."""
    columns = {name: values[:count] for name, values in step.columns.items()}
    objective = step.objective if count == len(step.picks) else None
    return Step(step.number, step.total, step.picks[:count], step.gains[:count], step.note, objective, columns)


def select(options: SelectOptions, progress: Progress = no_progress) -> list[dict[str, Any]]:
    """Pick images from a feature store; return the manifest of each selection folder, one a budget.

    One budget is published at `options.out`, several each in a folder below it named by its count. Raises InputError
    for unusable input.
    """
    store = FeatureStore(options.features)
    strategy, method, chosen = strategy_options(options.strategy, parse_pairs(options.option, "--option"))
    check_vectors(strategy, store)
    check_labels(strategy, store)
    predictions = read_predictions([strategy], store, options.predictions)
    labeled = read_labeled(options.labeled, store)
    excluded = read_excluded(options.exclude, store)
    available = store.num_vectors - len(np.union1d(labeled, excluded))
    budgets = parse_budgets(options.budget, store.num_vectors, available)
    out = Place(options.out)
    places = {count: out.at(str(count)) if len(budgets) > 1 else out for count in budgets}
    inputs = {"features": store.digest, "labeled": digest_of(labeled.tolist()), "excluded": digest_of(excluded.tolist())}
    inputs |= {"predictions": predictions.digest} if predictions else {}
    identity = {**result_options(options), "options": result_options(chosen)}
    reads = places_read(options.features, options.labeled, options.exclude, options.predictions)
    claims = {
        count: Claim.of(place, "selection", inputs, {**identity, "count": count}, options.overwrite, reads)
        for count, place in places.items()
    }
    manifests = {count: manifest for count, claim in claims.items() if (manifest := claim.published()) is not None}
    todo = sorted(set(budgets) - set(manifests))
    if todo:
        read = (strategy.columns, predictions, strategy.vectors)
        with open_shards(store, options, options.normalize, *read) as shards:
            for count in todo:
                claims[count].take()
            runs = [todo] if strategy.nested else [[count] for count in todo]
            for counts in runs:
                journal = Journal(places[counts[-1]].at("journal.npz"), options.journal_s)
                began = time.perf_counter()
                request = Request(counts[-1], options.seed, labeled, excluded)
                step = run_method(method, shards, request, chosen, progress, journal)
                facts = {"num_excluded": len(excluded), "time": {"seconds_s": round(time.perf_counter() - began, 3)}}
                for count in counts:
                    manifests[count] = write_selection(places[count], store, prefix(step, count), labeled, facts)
                journal.remove()
    return [manifests[count] for count in budgets]


def read_selection(uri: str, store: FeatureStore) -> Selection:
    """Open a selection folder; raises InputError if it is not one, or of other features."""
    selection = open_selection(uri)
    if selection.manifest["inputs"]["features"] != store.digest:
        raise InputError(f"{uri} was selected from other features than {store.place.uri}")
    return selection


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
