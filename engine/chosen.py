"""What a command is to train on: rows of a pool, however they are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.arrays import Ints
from engine.draws import random_keys
from engine.folders import digest_of
from engine.places import Place
from engine.schema import InputError
from engine.selections import ids_in, open_selection, rows_in
from engine.sources import Pool, ids_of

SHOWN = 3
HELD_OUT = 71
"""The key of the draw of images that are held out."""


@dataclass(frozen=True)
class Chosen:
    """Rows of a pool (n,), ascending; `ids` are what some of them must be called; `digest` tells the choice from others.

    `by_row`: the selection calls every image by its row's number, as its features had no ids.
    """

    rows: Ints
    digest: str
    ids: dict[int, str] = field(default_factory=dict)
    by_row: bool = False


def read_chosen(selection: str, pool: Pool) -> Chosen:
    """Return what `--selection` names of a pool: a selection folder (what was labelled before it, and its picks), ids
    (.txt), pool rows (.json, .npy), or `all`.

    Raises InputError for what is none of these, rows or ids that the pool does not have, or a choice of nothing.
    """
    ids: dict[int, str] = {}
    place, what = Place(selection), f"--selection {selection!r}"
    if selection == "all":
        rows = np.arange(pool.num_rows, dtype=np.int64)
    elif not place.exists():
        raise InputError(f"{what} does not exist: give a selection folder, .txt, .json, .npy, or all")
    elif selection.endswith(".txt"):
        names = ids_in(place)
        rows = rows_of_ids(pool, names, what)
        ids = dict(zip(rows.tolist(), names, strict=True))
    elif selection.endswith((".json", ".npy")):
        rows = rows_in(place, what)
    else:
        rows, ids = _rows_of_folder(selection, place, pool)
    rows, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{what} names row {rows[counts > 1][0]} more than once")
    if len(rows) == 0:
        raise InputError(f"{what} is empty: there is nothing to train on")
    if rows[0] < 0 or rows[-1] >= pool.num_rows:
        outside = rows[0] if rows[0] < 0 else rows[-1]
        raise InputError(f"{what} names row {outside}; the pool has rows 0 to {pool.num_rows - 1}")
    by_row = bool(ids) and all(name == str(row) for row, name in ids.items())
    return Chosen(rows, digest_of(rows.tobytes()), {} if by_row else ids, by_row)


def hold_out(chosen: Chosen, count: int, seed: int) -> tuple[Chosen, Chosen | None]:
    """Return the chosen images to train on, and `count` of them that are held out (None for 0).

    Which ones is a function of (seed, row) alone, whatever else was chosen beside them or in which order.
    """
    if count == 0:
        return chosen, None
    keys = random_keys(seed, (HELD_OUT,), chosen.rows)
    held = np.isin(chosen.rows, chosen.rows[np.lexsort((chosen.rows, keys))[:count]])
    kept, out = (
        replace(chosen, rows=rows, digest=digest_of(rows.tobytes())) for rows in (chosen.rows[~held], chosen.rows[held])
    )
    return kept, out


def _rows_of_folder(selection: str, place: Place, pool: Pool) -> tuple[Ints, dict[int, str]]:
    found = open_selection(selection)
    if found.manifest["num_rows"] != pool.num_rows:
        raise InputError(
            f"{selection} was selected from {found.manifest['num_rows']:,} rows, and pool {pool.uri!r} has "
            f"{pool.num_rows:,}: give the pool that its features were embedded from"
        )
    picks = pq.read_table(pa.BufferReader(place.at("picks.parquet").read()), columns=["row", "id"])
    ids = dict(zip(picks["row"].to_pylist(), picks["id"].to_pylist(), strict=True))
    return np.concatenate([found.labeled, found.picks]), ids


def rows_of_ids(pool: Pool, ids: Sequence[str], what: str) -> Ints:
    """Return the pool row of each id (n,), in one pass over the pool's ids.

    Raises InputError where `what` names an id twice, or one that the pool does not have.
    """
    wanted = pa.array(ids, pa.string())
    twice = next((entry["values"] for entry in pc.value_counts(wanted).to_pylist() if entry["counts"] > 1), None)
    if twice is not None:
        raise InputError(f"{what} names {twice!r} more than once")
    rows, first, left = np.full(len(ids), -1, dtype=np.int64), 0, len(ids)
    for some in ids_of(pool) if left else ():
        at = pc.index_in(some, value_set=wanted)
        found = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
        rows[at.drop_null().to_numpy()] = first + found
        first, left = first + len(some), left - len(found)
        if not left:
            break
    unknown = [ids[i] for i in np.flatnonzero(rows < 0).tolist()]
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:SHOWN])
        raise InputError(
            f"{what} names {len(unknown):,} ids, of {len(ids):,}, that pool {pool.uri!r} does not have: {shown}. Give the pool "
            "that they were picked from"
        )
    return rows


def names_of(chosen: Chosen, pool: Pool) -> list[str]:
    """Return what the chosen images are called where they are labelled apart (n,), in their order.

    The pool's ids, in one pass over them; the numbers of the rows, as text, where the selection calls them that.
    """
    if chosen.by_row:
        return [str(row) for row in chosen.rows.tolist()]
    names, first = list[str](), 0
    for some in ids_of(pool):
        low, high = np.searchsorted(chosen.rows, [first, first + len(some)])
        names += some.take(pa.array(chosen.rows[low:high] - first)).to_pylist()
        first += len(some)
        if high == len(chosen.rows):
            break
    return names
