"""What a report is about: the selections, their features, and the other folders that were given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.arrays import Ints
from engine.folders import read_manifest
from engine.places import Place
from engine.schema import InputError
from engine.selections import Selection, open_selection
from engine.store import FeatureStore

OTHERS = ("comparison", "rounds", "curves", "metrics")
"""Kinds of folders that become sections of their own, beside selections."""


@dataclass(frozen=True)
class Subject:
    """A selection as the page calls it: `table` is its picks.parquet, `rows` (b,) its picks in pick order."""

    name: str
    uri: str
    selection: Selection
    table: pa.Table

    @property
    def rows(self) -> Ints:
        """The pool rows picked, in pick order."""
        return self.selection.picks

    @property
    def after(self) -> Ints:
        """The pool rows labelled once the picks are, ascending."""
        return np.union1d(self.selection.labeled, self.selection.picks)


@dataclass(frozen=True)
class Other:
    """Another published folder."""

    kind: str
    uri: str
    place: Place
    manifest: dict[str, Any]


def _names(found: Sequence[tuple[str, Selection]]) -> list[str]:
    """Return what selections are called: by the shortest of these that tells all apart, else by their folders."""
    options = [selection.manifest["options"] for _, selection in found]
    ways = (
        [str(of["strategy"]) for of in options],
        [f"{of['strategy']}, {len(selection.picks):,} picks" for of, (_, selection) in zip(options, found, strict=True)],
        [f"{of['strategy']}, seed {of['seed']}" for of in options],
        [Place(uri).name for uri, _ in found],
        [Place(uri).uri for uri, _ in found],
    )
    return next((names for names in ways if max(Counter(names).values(), default=0) < 2), ways[-1])


def read_folders(folders: Sequence[str]) -> tuple[list[Subject], list[Other]]:
    """Open what a report is asked for.

    Raises InputError for a folder given twice, one of another kind, or selections of different features.
    """
    if not folders:
        raise InputError("coresift report needs folders: give a selection that `coresift select` wrote")
    twice = next((uri for uri, times in Counter(folders).items() if times > 1), None)
    if twice is not None:
        raise InputError(f"{twice} is given twice")
    found, others = list[tuple[str, Selection]](), list[Other]()
    for uri in folders:
        place = Place(uri)
        manifest = read_manifest(place)
        if manifest is not None and manifest["kind"] in OTHERS:
            others.append(Other(manifest["kind"], place.uri, place, manifest))
        elif manifest is not None and manifest["kind"] != "selection":
            allowed = ", ".join(("selection", *OTHERS))
            hint = ": pass it with --dedup" if manifest["kind"] == "dedup" else f" (one of: {allowed})"
            raise InputError(f"{uri} is a {manifest['kind']} folder, which a report has no section for{hint}")
        else:
            found.append((uri, open_selection(uri)))
    for uri, selection in found[1:]:
        if selection.manifest["inputs"]["features"] != found[0][1].manifest["inputs"]["features"]:
            raise InputError(f"{uri} and {found[0][0]} were selected from different features: make a report of each")
    subjects = []
    for name, (uri, selection) in zip(_names(found), found, strict=True):
        table = pq.read_table(pa.BufferReader(Place(uri).at("picks.parquet").read()))
        subjects.append(Subject(name, Place(uri).uri, selection, table))
    return subjects, others


def labelled_before(subjects: Sequence[Subject]) -> Ints:
    """Return the pool rows that were labelled before every one of the selections, ascending."""
    return reduce(np.intersect1d, (subject.selection.labeled for subject in subjects))


def open_features(subjects: Sequence[Subject], given: str | None) -> FeatureStore:
    """Return the feature store that the selections were made from; raises InputError where it is not to be found."""
    uri, wanted = given or subjects[0].selection.manifest["features"], subjects[0].selection.manifest["inputs"]["features"]
    if given is None and not Place(uri).exists():
        raise InputError(f"{subjects[0].uri} was selected from {uri}, which is not there: say where it is with --features")
    store = FeatureStore(uri)
    if store.digest != wanted:
        raise InputError(f"{subjects[0].uri} was selected from other features than {uri}: give those with --features")
    return store
