"""Images of a pool that earlier feature stores have: a grown pool costs what is new in it.

An image is known by the hash of its file's bytes. In a folder of images that is the same place as before, a file with the
path, size and time of change that it had then is not even read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from engine.arrays import Ints
from engine.places import Place
from engine.sources import Pool, load_pool
from engine.sources.listing import Listing
from engine.store import FeatureStore

LISTING = "pool.arrow"
HASH_BYTES = 16
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Source:
    """Where a known image is: the number of its store among those given, its pool row there."""

    store: int
    row: int


@dataclass(frozen=True)
class Facts:
    """What a store says of a known image beside its vector."""

    size: tuple[int, int]
    phash: int
    num_bytes: int | None
    content_hash: bytes


class Known:
    """The images of one published store: 40 bytes of memory each, and its mapped files."""

    def __init__(self, uri: str) -> None:
        self.store = FeatureStore(uri)
        names = ("width", "height", "phash", "bytes", "content_hash")
        self.columns = {name: self.store.read_column(name) for name in names}
        hashes = self.columns["content_hash"].combine_chunks()
        data = np.frombuffer(hashes.buffers()[1], np.uint64, 2 * len(hashes), hashes.offset * HASH_BYTES)
        self.keys: Keys = data.reshape(-1, 2)
        self.order = np.argsort(self.keys[:, 0], kind="stable")
        self.sorted = self.keys[self.order, 0]

    def find(self, content: bytes) -> int | None:
        """Return the pool row of the first image with this content hash, or None."""
        key = np.frombuffer(content, np.uint64)
        low, high = np.searchsorted(self.sorted, key[0]), np.searchsorted(self.sorted, key[0], side="right")
        same = self.order[low:high][self.keys[self.order[low:high], 1] == key[1]]
        return int(self.store.rows[same[0]]) if len(same) else None

    def facts(self, row: int) -> Facts:
        """Return what the store says of a row that has a vector."""
        at = int(np.searchsorted(self.store.rows, row))
        width, height, phash, num_bytes, content = (column[at].as_py() for column in self.columns.values())
        return Facts((width, height), phash, num_bytes, content)

    @functools.cached_property
    def listing(self) -> Pool | None:
        """The pool as it was listed then, if it was a folder of images."""
        place = self.store.place.at(LISTING)
        pool = load_pool(place) if place.exists() else None
        return pool if pool is not None and pool.kind == "folder" else None

    def unchanged(self, pool: Pool, start: int, stop: int) -> dict[int, int]:
        """Return row -> row here, of rows [start, stop) of the same folder, whose files are as they were."""
        if self.listing is None or pool.kind != "folder" or self.listing.uri != pool.uri:
            return {}
        new = pool.listing.read(start, stop)
        paths = new["path"]
        low, high = _lower_bound(self.listing.listing, paths[0].as_py()), _lower_bound(self.listing.listing, paths[-1].as_py())
        old = self.listing.listing.read(low, high + 1)
        if not len(old):
            return {}
        at = pc.index_in(paths.combine_chunks(), old["path"].combine_chunks()).fill_null(-1).to_numpy()
        same = at >= 0
        for name in ("size", "mtime_ns"):
            same &= new[name].to_numpy() == old[name].to_numpy()[at]
        same &= new["mtime_ns"].to_numpy() > 0
        mine, rows = np.flatnonzero(same) + start, at[same].astype(np.int64) + low
        has = np.isin(rows, self.store.rows)
        return dict(zip(mine[has].tolist(), rows[has].tolist(), strict=True))


def _lower_bound(listing: Listing, path: str) -> int:
    """Return the first row of a listing whose path is not before `path`; paths stand in the order of their bytes."""
    low, high, wanted = 0, listing.num_rows, path.encode()
    while low < high:
        middle = (low + high) // 2
        if listing.read(middle, middle + 1)["path"][0].as_py().encode() < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@functools.lru_cache(maxsize=8)
def _open(uri: str, digest: str) -> Known:
    return Known(uri)


@dataclass(frozen=True)
class Reuse:
    """The stores whose vectors are taken, as (address, digest) each; small, so that it travels to who decodes."""

    stores: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return f"Reuse({[Place(uri).uri for uri, _ in self.stores]})"

    @property
    def known(self) -> list[Known]:
        """The stores, opened once a process."""
        return [_open(*store) for store in self.stores]

    def unchanged(self, pool: Pool, start: int, stop: int) -> dict[int, Source]:
        """Return the pool rows in [start, stop) that need not be read, and where they are; the first store goes first."""
        found: dict[int, Source] = {}
        for number, known in enumerate(self.known):
            found = {row: Source(number, old) for row, old in known.unchanged(pool, start, stop).items()} | found
        return found

    def find(self, content: bytes) -> Source | None:
        """Return where an image with this content hash is, or None."""
        for number, known in enumerate(self.known):
            row = known.find(content)
            if row is not None:
                return Source(number, row)
        return None

    def facts(self, source: Source) -> Facts:
        """Return what its store says of a known image."""
        return self.known[source.store].facts(source.row)

    def vectors(self, sources: Sequence[Source]) -> npt.NDArray[np.float32]:
        """Return the vectors of some known images, at least one, in the order given, (m, d)."""
        numbers: Ints = np.array([source.store for source in sources])
        rows: Ints = np.array([source.row for source in sources], dtype=np.int64)
        opened = self.known
        out = np.empty((len(sources), opened[0].store.dim), np.float32)
        for number in np.unique(numbers).tolist():
            out[numbers == number] = opened[number].store.vectors(rows[numbers == number])
        return out


NOTHING_KNOWN = Reuse()
