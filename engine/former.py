"""A selection of a pool that has grown since: its picks and what was labelled before them, found again by their ids."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.arrays import Ints
from engine.places import Place
from engine.schema import InputError
from engine.selections import Selection, ids_in
from engine.store import FeatureStore

LABELED_IDS = "labeled_ids.txt"
SHOWN = 4


def _former_store(selection: Selection) -> FeatureStore | None:
    """Return the store that a selection was made from, if it is still where it was."""
    place = Place(selection.manifest["features"])
    if not place.at("manifest.json").exists():
        return None
    store = FeatureStore(place.address)
    return store if store.digest == selection.manifest["inputs"]["features"] else None


def _ids(uri: str, selection: Selection, former: FeatureStore | None) -> list[str]:
    """Return the ids of the rows that were labelled before a selection, then of its picks."""
    place = Place(uri)
    picks = ids_in(place.at("ids.txt"))
    if place.at(LABELED_IDS).exists():
        return ids_in(place.at(LABELED_IDS)) + picks
    if len(selection.labeled) and former is None:
        raise InputError(
            f"{uri} was selected from other features, {selection.manifest['features']}, which are gone, and does not say what "
            "was labelled before it by id: give a .txt of all ids that are labelled"
        )
    return (former.ids(selection.labeled) if former and len(selection.labeled) else []) + picks


def _check_same(uri: str, former: FeatureStore, old: Ints, store: FeatureStore, new: Ints, ids: list[str]) -> None:
    """Raise InputError where an image is not what it was: by its content, else by its vector."""
    if "content_hash" in former.columns and "content_hash" in store.columns:
        same = np.array(former.values(old, "content_hash"), object) == np.array(store.values(new, "content_hash"), object)
    elif former.column == store.column and former.dim == store.dim and store.vectors_per_image == 1:
        same = (former.vectors(old) == store.vectors(new)).all(axis=1)
    else:
        return
    if not np.all(same):
        wrong = [ids[at] for at in np.flatnonzero(~same)]
        raise InputError(
            f"{uri} was selected from other features than {store.place.uri}, and {len(wrong)} of its images are other images "
            f"there ({_list(wrong)}): give a .txt of the ids that are labelled"
        )


def _list(ids: list[str]) -> str:
    shown = ", ".join(repr(name) for name in ids[:SHOWN])
    return shown + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")


def rows_of_former(uri: str, selection: Selection, store: FeatureStore) -> Ints:
    """Return the rows in `store` of all that a selection of an earlier state of the pool says is labelled.

    Raises InputError where one is not there any more, or nothing says that they are the same images: ids that are no more
    than row numbers are believed only where the earlier features can be compared with.
    """
    former = _former_store(selection)
    ids = _ids(uri, selection, former)
    old = np.concatenate([selection.labeled, selection.picks])
    at = pc.index_in(pa.array(ids, pa.string()), store.read_column("id").combine_chunks())
    if at.null_count:
        gone = [name for name, there in zip(ids, at.is_valid().to_pylist(), strict=True) if not there]
        raise InputError(
            f"{uri} was selected from other features, and {len(gone)} of its {len(ids)} images have no vector in "
            f"{store.place.uri}: {_list(gone)}. Give features of a pool that holds them, or a .txt of the ids that are labelled"
        )
    new: Ints = store.rows[at.to_numpy()]
    if former is not None:
        _check_same(uri, former, old, store, new, ids)
    elif ids == [str(row) for row in old.tolist()]:
        raise InputError(
            f"{uri} was selected from other features than {store.place.uri}, whose ids are only row numbers: nothing says that "
            "they are the same images. Give the rows themselves, as .json"
        )
    return new
