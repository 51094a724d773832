"""Images that look alike: by their perceptual hashes, which the features have, and by a folder that `dedup` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from engine.arrays import Floats, Ints
from engine.folders import read_manifest
from engine.places import Place
from engine.schema import InputError
from engine.store import FeatureStore

MOST_BITS = 4
"""Hashes of 64 bits that differ in so many at most are those of near copies."""
COMPARED = 2000
"""Picks that are compared with the whole pool, the first ones."""
GROUPS_SHOWN, GROUP_SHOWN, PAIRS_SHOWN = 8, 6, 24
TILE_PICKS, TILE_ROWS = 256, 16384


@dataclass(frozen=True)
class Alike:
    """Groups of images with one hash: how many groups, of how many images; the largest groups' first rows and sizes."""

    num_groups: int
    num_images: int
    largest: list[tuple[int, Ints]]


@dataclass(frozen=True)
class PickCopies:
    """Picks (p,) and the pool rows that look like them, (p,), pick after pick; how many picks were compared."""

    picks: Ints
    others: Ints
    bits: Ints
    compared: int


@dataclass(frozen=True)
class Excluded:
    """What a dedup folder leaves out: rows (n,), the row that each is a copy of, their similarity where it is told."""

    rows: Ints
    kept: Ints
    similarity: Floats | None


def hashes_of(store: FeatureStore) -> npt.NDArray[np.uint64] | None:
    """Return the perceptual hash of each vector's image, (n,); None where the features have none."""
    if "phash" not in store.schema.names:
        return None
    column = store.read_column("phash")
    return None if column.null_count else np.asarray(column.to_numpy(), dtype=np.uint64)


def alike(hashes: npt.NDArray[np.uint64], rows: Ints) -> Alike:
    """Return the groups of images that have the same hash, (n,), among pool rows (n,) ascending; the largest first."""
    order = np.argsort(hashes, kind="stable")
    _, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    several = np.flatnonzero(counts > 1)
    first = several[np.lexsort((rows[order[starts[several]]], -counts[several]))[:GROUPS_SHOWN]]
    largest = [(int(counts[at]), rows[order[starts[at] : starts[at] + min(counts[at], GROUP_SHOWN)]]) for at in first]
    return Alike(len(several), int(counts[several].sum()), largest)


def copies_of_picks(hashes: npt.NDArray[np.uint64], rows: Ints, picks: Ints) -> PickCopies:
    """Return the images whose hashes are within MOST_BITS of a pick's, in pick order, then by bits and row."""
    some = picks[:COMPARED]
    own = hashes[np.searchsorted(rows, some)]
    found: list[tuple[Ints, Ints, Ints]] = []
    for first in range(0, len(some), TILE_PICKS):
        mine = own[first : first + TILE_PICKS]
        for start in range(0, len(rows), TILE_ROWS):
            bits = np.bitwise_count(mine[:, None] ^ hashes[None, start : start + TILE_ROWS])
            pick, other = np.nonzero(bits <= MOST_BITS)
            different = some[first + pick] != rows[start + other]
            pick, other = pick[different], other[different]
            found.append((first + pick, start + other, bits[pick, other].astype(np.int64)))
    pick, other, near = (np.concatenate(parts) if parts else rows[:0] for parts in (*zip(*found, strict=True),) or ((),) * 3)
    order = np.lexsort((other, near, pick))
    return PickCopies(some[pick[order]], rows[other[order]], near[order], len(some))


def read_dedup(uri: str, store: FeatureStore) -> Excluded:
    """Return what a dedup folder leaves out; raises InputError for another folder, or one of other features."""
    place = Place(uri)
    manifest = read_manifest(place)
    if manifest is None or manifest["kind"] != "dedup":
        raise InputError(f"--dedup {uri} is not a finished dedup folder: make one with `coresift dedup`")
    if manifest["inputs"].get("features") != store.digest:
        raise InputError(f"--dedup {uri} was made from other features than {store.place.uri}")
    table = pq.read_table(pa.BufferReader(place.at("excluded.parquet").read()))
    similarity = table["similarity"].to_numpy().astype(np.float64) if "similarity" in table.schema.names else None
    return Excluded(table["row"].to_numpy().astype(np.int64), table["kept_row"].to_numpy().astype(np.int64), similarity)


def shown_rows(groups: Alike | None, near: Sequence[PickCopies], excluded: Excluded | None) -> Ints:
    """Return the pool rows that the page shows of all these."""
    parts = [rows for _, rows in groups.largest] if groups else []
    parts += [found[:PAIRS_SHOWN] for copies in near for found in (copies.picks, copies.others)]
    if excluded:
        parts += [excluded.rows[shown_pairs(excluded)], excluded.kept[shown_pairs(excluded)]]
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


def shown_pairs(excluded: Excluded) -> Ints:
    """Return the places of the pairs that the page shows: the most similar ones, else the first."""
    if excluded.similarity is None:
        return np.arange(min(PAIRS_SHOWN, len(excluded.rows)))
    return np.argsort(-excluded.similarity, kind="stable")[:PAIRS_SHOWN]
