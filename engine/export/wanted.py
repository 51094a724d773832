"""What is to be exported: rows of a pool in pick order, what they are called, and the pool itself."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.arrays import Ints
from engine.chosen import Chosen, names_of, rows_of_ids
from engine.folders import read_manifest
from engine.places import Place
from engine.retry import reached
from engine.schema import InputError
from engine.selections import ids_in, open_selection, rows_in
from engine.sources import Columns, Pool, columns_of, open_pool
from engine.store import FeatureStore
from engine.verbs import ExportOptions

MASK = "***"
"""What stands for keys in the addresses that manifests record."""
TO_LABEL = "to_label.csv"
"""What `rounds` asks for in a folder."""
PICKS, LABELED = "picks", "labeled"
ROWS, IDS, POOL = "rows", "ids", "pool"
"""What a format needs to know."""


@dataclass(frozen=True)
class Named:
    """One selection: rows (n,), -1 where only the id is known, ids, '' where only the row is, and what each image is tagged."""

    rows: Ints
    ids: list[str]
    tags: list[str]
    manifest: dict[str, Any] | None = None


@dataclass(frozen=True)
class Wanted:
    """Rows (n,) of a pool in pick order, what they are called, PICKS or LABELED for each; the pool is None if nobody needs it.

    `notes` are what could not be checked. `by_row`: the selection calls images by the numbers of their rows.
    """

    rows: Ints
    ids: list[str]
    tags: list[str]
    pool: Pool | None
    notes: list[str] = field(default_factory=list)

    @property
    def by_row(self) -> bool:
        """Whether images are called by their rows' numbers, as features without ids are."""
        return all(name == str(row) for name, row in zip(self.ids, self.rows.tolist(), strict=True))


def _of_folder(uri: str, which: str) -> Named:
    found = open_selection(uri)
    picks = pq.read_table(pa.BufferReader(Place(uri).at("picks.parquet").read()), columns=["id"])["id"].to_pylist()
    rows = {PICKS: [found.picks], LABELED: [found.labeled], "both": [found.labeled, found.picks]}[which]
    names = {PICKS: picks, LABELED: [""] * len(found.labeled), "both": [""] * len(found.labeled) + picks}[which]
    tags = {PICKS: [PICKS] * len(picks), LABELED: [LABELED] * len(found.labeled)}
    return Named(np.concatenate(rows), names, tags[which] if which in tags else [*tags[LABELED], *tags[PICKS]], found.manifest)


def _of_round(place: Place) -> Named:
    """Return what a round of `rounds` asks for in its folder."""
    asked = list(csv.DictReader(io.StringIO(place.at(TO_LABEL).read().decode())))
    rows = np.array([int(entry["row"]) for entry in asked], dtype=np.int64)
    return Named(rows, [entry["id"] for entry in asked], [PICKS] * len(asked))


def read_named(uri: str, which: str) -> Named:
    """Return what one SELECTION names; raises InputError for what is none."""
    place = Place(uri)
    if not place.exists():
        raise InputError(f"selection {uri!r} does not exist: give a selection folder, .txt, .json or .npy")
    if uri.endswith((".txt", ".json", ".npy")) or place.at(TO_LABEL).exists():
        if which != PICKS:
            raise InputError(f"--which {which}: {uri!r} is no selection folder, so nothing says what was labelled before it")
        if uri.endswith(".txt"):
            names = ids_in(place)
            return Named(np.full(len(names), -1, dtype=np.int64), names, [PICKS] * len(names))
        if not uri.endswith((".json", ".npy")):
            return _of_round(place)
        rows = rows_in(place, f"selection {uri!r}")
        return Named(rows, [""] * len(rows), [PICKS] * len(rows))
    return _of_folder(uri, which)


def _features_of(options: ExportOptions, named: Sequence[Named]) -> FeatureStore | None:
    """Return the features of the selections, None where nothing says where they are, or they are not there any more.

    Raises InputError where selections are of several, or --features names others.
    """
    told = [one.manifest for one in named if one.manifest is not None]
    digests = {manifest["inputs"]["features"] for manifest in told}
    if len(digests) > 1:
        raise InputError(f"{len(told)} selections are of {len(digests)} different features: export them one by one")
    uri = options.features or next((manifest["features"] for manifest in told), None)
    if uri is None or (options.features is None and MASK in uri):
        return None
    with reached(uri):
        if options.features is None and read_manifest(Place(uri)) is None:
            return None
        store = FeatureStore(uri)
    if digests and store.digest not in digests:
        if options.features is None:
            return None  # another store lies there by now
        raise InputError(
            f"--features {uri} has digest {store.digest}, and what was selected from had {digests.pop()}: give those"
        )
    return store


def _columns(options: ExportOptions, told: dict[str, Any]) -> Columns:
    """Return how the pool is read: as options say, else as it was read for its features."""
    given = columns_of(options)
    if MASK in str(told.get("images")) and given.images is None:
        raise InputError("the pool's --images had keys, which are not kept: give it again")
    return Columns(
        image=given.image or told.get("image_column"),
        label=given.label or told.get("label_column"),
        id=given.id or told.get("id_column"),
        metadata=given.metadata or tuple(told.get("metadata_column") or ()),
        images=given.images or told.get("images"),
        split=given.split or told.get("split"),
    )


def _pool_of(options: ExportOptions, store: FeatureStore | None, named: Sequence[Named], notes: list[str]) -> Pool:
    """Return the pool; raises InputError where nothing says where it is, or its digest is not the one recorded."""
    manifest = store.manifest if store is not None else {}
    was = manifest.get("pool", {}).get("uri")
    uri = options.pool or was
    if uri is None or (options.pool is None and MASK in uri):
        gone = next((one.manifest["features"] for one in named if one.manifest is not None), None)
        why = f"its address {uri!r} had keys, which are not kept" if uri else "nothing says where it is"
        why = f"the features that say where it is are not at {gone} any more" if store is None and gone else why
        way = ", or those with --features" if store is None and gone else ""
        raise InputError(f"the pool is needed, and {why}: give it with --pool{way}")
    with reached(uri):
        pool = open_pool(uri, _columns(options, manifest.get("options", {}) if was else {}))
    recorded = manifest.get("inputs", {}).get("pool", {}).get("digest")
    if recorded is None:
        notes.append(f"nothing records which pool this was selected from: {pool.uri} was checked by its ids alone")
    elif pool.digest != recorded and not options.by_ids:
        raise InputError(
            f"pool {pool.uri!r} has digest {pool.digest}, and the one that was embedded had {recorded}: give that pool with "
            "--pool, or, if this is a copy of it, compare the ids alone with --by-ids"
        )
    if store is not None and pool.num_rows != store.num_rows:
        raise InputError(f"pool {pool.uri!r} has {pool.num_rows:,} rows, and the one that was embedded {store.num_rows:,}")
    return pool


def _complete(named: Named, store: FeatureStore | None, pool: Pool | None, needs: Set[str], what: str) -> Named:
    """Fill in the rows or ids that are needed and not known; raises InputError for those that there are not."""
    count = pool.num_rows if pool is not None else store.num_rows if store is not None else np.iinfo(np.int64).max
    outside = named.rows[(named.rows < -1) | (named.rows >= count)]
    if len(outside):
        raise InputError(f"{what} names row {outside[0]}; the pool has rows 0 to {count - 1}")
    if ROWS in needs and (named.rows < 0).any():
        assert pool is not None
        named = replace(named, rows=rows_of_ids(pool, named.ids, what))
    at = [place for place, name in enumerate(named.ids) if not name] if IDS in needs else []
    if at:
        rows = np.unique(named.rows[at])
        names = names_of(Chosen(rows, ""), pool) if pool is not None else store.ids(rows) if store is not None else []
        called, ids = dict(zip(rows.tolist(), names, strict=True)), list(named.ids)
        for place in at:
            ids[place] = called[int(named.rows[place])]
        named = replace(named, ids=ids)
    return named


def _once(rows: list[int], ids: list[str]) -> list[int]:
    """Return the places of images where they come first; raises InputError where one id is of two rows."""
    seen_rows, seen_ids, of, kept = set[int](), set[str](), dict[str, int](), list[int]()
    for at, (row, name) in enumerate(zip(rows, ids, strict=True)):
        if name and row >= 0 and of.setdefault(name, row) != row:
            raise InputError(f"rows {of[name]} and {row} are both called {name!r}: the selections are of different pools")
        if not (row >= 0 and row in seen_rows) and not (name and name in seen_ids):
            kept.append(at)
        seen_rows.add(row)
        seen_ids.add(name)
    return kept


def find_wanted(options: ExportOptions, needs: Set[str]) -> Wanted:
    """Return what all selections name, each image once, in order; `needs` says which of ROWS, IDS and POOL it takes.

    Raises InputError for what can't be found, is empty, or is of another pool.
    """
    named = [read_named(uri, options.which) for uri in options.selection]
    store, notes = _features_of(options, named), list[str]()
    lacking = {ROWS} if any((one.rows < 0).any() for one in named) else set()
    lacking |= {IDS} if store is None and any("" in one.ids for one in named) else set()
    by_pool = POOL in needs or options.pool is not None or bool(lacking & needs)
    pool = _pool_of(options, store, named, notes) if by_pool else None
    rows, ids, tags = list[int](), list[str](), list[str]()
    for uri, one in zip(options.selection, named, strict=True):
        one = _complete(one, store, pool, needs, f"selection {uri!r}")
        rows += one.rows.tolist()
        ids += one.ids
        tags += one.tags
    if not rows:
        raise InputError(f"selection {', '.join(options.selection)} is empty with --which {options.which}: nothing to export")
    kept = _once(rows, ids)
    found = np.array(rows, dtype=np.int64)[kept]
    return Wanted(found, [ids[at] for at in kept], [tags[at] for at in kept], pool, notes)
