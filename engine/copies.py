"""Copies by what a feature store knows of its images beside their vectors: content hashes and perceptual hashes.

Images stand in an order, the ones to keep first. One is dropped only if one before it is kept that it is a copy of, so
copies of copies don't merge: of A ~ B ~ C, with A and C not alike, B goes and A and C stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from engine.arrays import Bools, Floats, Ints
from engine.hamming import Hashes, HashTable, bits_apart
from engine.schema import InputError, Progress, no_progress
from engine.store import FeatureStore

CHUNK = 16_384
"""Images that are compared with the kept ones before them at once, then with one another."""
BALANCED = 32
"""Bits that are set in the hash of every image whose frequencies all differ."""
NOTHING: Ints = np.empty(0, dtype=np.int64)

Decide = Callable[[Ints, Ints, Ints], Bools]
"""(places of some images, places of others, bits apart) -> which pairs are copies."""


@dataclass(frozen=True)
class Copies:
    """Rows that are copies, (m,), ascending: their pool rows, and the kept row that each is a copy of.

    `similarity` is the cosine of their vectors, `bits` in how many their perceptual hashes differ; None: not measured.
    """

    rows: Ints
    kept: Ints
    similarity: Floats | None = None
    bits: Ints | None = None


@dataclass(frozen=True)
class Prints:
    """What is known of each image of a store, (n,): its pool row, perceptual hash, size in px, and content by number.

    Equal numbers of `content` are equal bytes, also between stores that were read together; -1: not known.
    """

    rows: Ints
    hashes: Hashes
    pixels: Ints
    content: Ints

    @property
    def plain(self) -> Bools:
        """Images whose hash says too little: of one colour, symmetrical, or nearly so, with frequencies that are alike."""
        return np.asarray(np.bitwise_count(self.hashes) != BALANCED)

    def at(self, places: Ints | Bools) -> Prints:
        """Return some of the images, in the order given."""
        return Prints(self.rows[places], self.hashes[places], self.pixels[places], self.content[places])


def read_prints(*stores: FeatureStore) -> list[Prints]:
    """Return what some stores know of their images. Raises InputError for one without perceptual hashes."""
    found, contents = [], []
    for store in stores:
        if "phash" not in store.columns:
            raise InputError(
                f"{store.place.uri} has no perceptual hashes: only `coresift embed` computes them; use --by embedding"
            )
        width, height = (store.read_column(name).to_numpy().astype(np.int64) for name in ("width", "height"))
        found.append((store.rows, store.read_column("phash").to_numpy(), width * height))
        known = "content_hash" in store.columns
        contents.append(store.read_column("content_hash") if known else pa.chunked_array([pa.nulls(len(width), pa.binary(16))]))
    chunks = [chunk for column in contents for chunk in column.cast(pa.binary()).chunks]
    numbers = pa.chunked_array(chunks, pa.binary()).combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
    ends = np.cumsum([len(column) for column in contents])[:-1]
    return [Prints(*own, content) for own, content in zip(found, np.split(numbers.astype(np.int64), ends), strict=True)]


def keep_order(prints: Prints, labeled: Ints) -> Ints:
    """Return the places of the images in the order of keeping: labelled ones, then larger ones, then smaller rows."""
    return np.lexsort((prints.rows, -prints.pixels, ~np.isin(prints.rows, labeled)))


def first_same(content: Ints, always: Bools) -> Ints:
    """Return for each image, in order of keeping, the first one with the same content; -1 where it is kept itself."""
    _, first, back = np.unique(content, return_index=True, return_inverse=True)
    leader = first[back].astype(np.int64)
    return np.where((leader == np.arange(len(content))) | always | (content < 0), -1, leader)


def first_near(hashes: Hashes, always: Bools, radius: int, decide: Decide, progress: Progress = no_progress) -> Ints:
    """Return for each image, in order of keeping, the first kept one that it is a copy of; -1 where it is kept itself.

    Copies are the pairs within `radius` bits for which `decide` says so. Those that `always` (n,) names are kept.
    """
    leader = np.full(len(hashes), -1, dtype=np.int64)
    for start in range(0, len(hashes), CHUNK):
        chunk = np.arange(start, min(start + CHUNK, len(hashes)))
        kept, asked = np.flatnonzero(leader[:start] < 0), chunk[~always[chunk]]
        for i, j, bits in HashTable(hashes[kept], radius).near(hashes[asked]):
            _follow(leader, asked[i], kept[j], bits, decide)
        left = chunk[leader[chunk] < 0]
        for i, j, bits in HashTable(hashes[left], radius).near(hashes[left]):
            before = (j < i) & ~always[left[i]]
            _follow(leader, left[i[before]], left[j[before]], bits[before], decide)
        progress("dedup", int(chunk[-1]) + 1, len(hashes), f"{int((leader >= 0).sum()):,} copies")
    return leader


def _follow(leader: Ints, i: Ints, j: Ints, bits: Ints, decide: Decide) -> None:
    """Give the images `i` their leaders among `j`, which stand before them; the pairs are sorted by both."""
    open_ = leader[j] < 0
    i, j, bits = i[open_], j[open_], bits[open_]
    copies = decide(i, j, bits)
    for copy, kept in zip(i[copies].tolist(), j[copies].tolist(), strict=True):
        if leader[copy] < 0 and leader[kept] < 0:
            leader[copy] = kept


def phash_copies(prints: Prints, labeled: Ints, max_bits: int, progress: Progress = no_progress) -> Copies:
    """Return the copies of a pool by their perceptual hashes; plain images are copies only where their bytes are equal."""
    order = keep_order(prints, labeled)
    ordered = prints.at(order)
    always, leader = np.isin(ordered.rows, labeled), np.full(len(order), -1, dtype=np.int64)
    plain, telling = np.flatnonzero(ordered.plain), np.flatnonzero(~ordered.plain)
    near = first_near(ordered.hashes[telling], always[telling], max_bits, _all, progress)
    same = first_same(ordered.content[plain], always[plain])
    for places, found in ((telling, near), (plain, same)):
        leader[places[found >= 0]] = places[found[found >= 0]]
    return copies_of(ordered, leader)


def _all(i: Ints, j: Ints, bits: Ints) -> Bools:
    return np.ones(len(i), dtype=np.bool_)


def exact_copies(prints: Prints, labeled: Ints) -> Copies:
    """Return the copies of a pool that are the same bytes."""
    ordered = prints.at(keep_order(prints, labeled))
    found = copies_of(ordered, first_same(ordered.content, np.isin(ordered.rows, labeled)))
    return Copies(found.rows, found.kept)


def copies_of(prints: Prints, leader: Ints) -> Copies:
    """Return the images that have a leader, by pool rows, ascending."""
    copy = np.flatnonzero(leader >= 0)
    copy = copy[np.argsort(prints.rows[copy])]
    kept = leader[copy]
    return Copies(prints.rows[copy], prints.rows[kept], bits=bits_apart(prints.hashes[copy], prints.hashes[kept]))
