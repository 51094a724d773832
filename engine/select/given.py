"""What a selection is given beside the features: labelled and excluded rows, a model's predictions, a former selection."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

from engine.arrays import Ints
from engine.folders import read_manifest
from engine.former import rows_of_former
from engine.places import Place
from engine.reading import PREDICTED, check_same_pool
from engine.schema import InputError
from engine.select.strategies import STRATEGIES, Strategy
from engine.selections import Selection, ids_in, open_selection, rows_in
from engine.store import FeatureStore

SAID = {
    "probs": "probabilities",
    "score": "a detector's boxes",
    "influence": "scores by gradients (influence)",
    "stability": "scores by noise (stability)",
}
"""What predictions are called in errors, by their name in a block."""
COLUMN = "column:"
"""What begins a --labeled or --exclude that names a column of the features."""


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
    return store.having(rows)


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


def read_selection(uri: str, store: FeatureStore) -> Selection:
    """Open a selection folder; raises InputError if it is not one, or of other features."""
    selection = open_selection(uri)
    if selection.manifest["inputs"]["features"] != store.digest:
        raise InputError(f"{uri} was selected from other features than {store.place.uri}")
    return selection
