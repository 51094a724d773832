"""Reading and decoding: ranges of pool rows -> chunks of decoded images, in order.

A chunk is decoded where it suits: in the calling thread, on threads beside a GPU, or by Ray tasks on any node of the
cluster. What it holds is the same everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from engine.arrays import Ints
from engine.decode import BadImageError, decode
from engine.inputs import Input, Pixels
from engine.phash import SIDE_PX, phash
from engine.places import Place
from engine.retry import WAITS_S, is_final
from engine.reuse import HASH_BYTES, NOTHING_KNOWN, Reuse, Source
from engine.schema import InputError, RunError, first_line
from engine.sources import Pool, Sample, load_pool, read_rows, unread

CHUNK_BYTES = 64 << 20
"""Pixels in a chunk, at most, unless a single image has more."""
CHUNK_BATCHES = 4
"""Batches of the encoder in a chunk, at most."""
PATIENCE_S = 10.0
"""How long an actor waits for a decoding task to get a CPU before it decodes the chunk itself."""
TASK_RETRIES = 3
"""How often Ray starts a decoding task again whose process or node died."""


@dataclass(frozen=True)
class Recipe:
    """What decoding needs to know: where the pool is listed, and what the encoders take.

    `addresses` are those of the pool, with any keys: its facts beside the listing lack them. Images that `reuse` knows are
    not decoded.
    """

    listing: str = field(repr=False)
    digest: str
    inputs: tuple[Input, ...]
    max_pixels: int
    draft: bool
    addresses: tuple[str, str] | None = field(default=None, repr=False)
    reuse: Reuse = NOTHING_KNOWN

    @property
    def draft_px(self) -> int | None:
        """The side below which no image is decoded smaller than it is stored; None where none is."""
        return max(SIDE_PX, *(given.wanted_px for given in self.inputs)) if self.draft else None


@dataclass(frozen=True)
class Item:
    """One image without its pixels: what is left of it in its part, or the `reason` why it is rejected.

    `source` says where its vector is already.
    """

    row: int
    id: str
    uri: str
    label: int | None
    extra: dict[str, Any]
    size: tuple[int, int] = (0, 0)
    phash: int = 0
    num_bytes: int | None = None
    content_hash: bytes = b""
    reason: str | None = None
    source: Source | None = None


def content_hash(data: bytes | Image.Image) -> bytes:
    """Return a hash of the bytes of an image's file, or of its size and pixels where its source gives these."""
    found = hashlib.blake2b(digest_size=HASH_BYTES)
    if isinstance(data, bytes):
        found.update(data)
    else:
        found.update(repr((data.mode, data.size)).encode())
        found.update(data.tobytes())
    return found.digest()


@dataclass
class Chunk:
    """The images of a range of pool rows, in order, and for each input the stacked pixels (k, ...) of those to encode."""

    items: list[Item] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)
    read_s: float = 0.0
    decode_s: float = 0.0


def chunk_rows(batch: int, inputs: Iterable[Input]) -> int:
    """Return the pool rows of a chunk: whole batches, at most CHUNK_BATCHES, in CHUNK_BYTES of pixels if one fits."""
    room = CHUNK_BYTES // max(1, sum(given.num_bytes for given in inputs))
    if room < batch:
        return max(1, room)
    return batch * min(CHUNK_BATCHES, room // batch)


@functools.lru_cache(maxsize=2)
def listed_pool(listing: str, digest: str, addresses: tuple[str, str] | None) -> Pool:
    """Return the pool that is listed at a place; `digest` tells it from one that stood there before."""
    pool = load_pool(Place(listing))
    return replace(pool, address=addresses[0], base=addresses[1]) if addresses else pool


def open_listing(recipe: Recipe) -> Pool:
    """Return the pool that a recipe is for, loaded once a process."""
    return listed_pool(recipe.listing, recipe.digest, recipe.addresses)


def pool_samples(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of ascending pool rows; go on at the same row where an object store was away for a while.

    What happens to single files is the source's business: this is for containers. Raises RunError where a container
    cannot be read in the end.
    """
    at, tries = 0, 0
    while True:
        try:
            for sample in read_rows(pool, rows[at:]):
                yield sample
                at, tries = at + 1, 0
            return
        except (OSError, InputError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            passing = Place(pool.address).remote and isinstance(cause, OSError) and not is_final(cause)
            if not passing or tries == len(WAITS_S):
                raise RunError(
                    f"row {rows[at]} of pool {pool.uri!r} cannot be read: {first_line(error)}. Finished parts are kept: run "
                    "the same command again once it can"
                ) from error
            time.sleep(WAITS_S[tries])
            tries += 1


def _decoded(sample: Sample, recipe: Recipe) -> tuple[Item, list[Pixels]]:
    """Return one image, and its pixels for each input: none if it is rejected."""
    facts = (sample.row, sample.id, sample.uri, sample.label, sample.extra)
    try:
        if sample.error is not None:
            raise BadImageError(sample.error)
        content = content_hash(sample.data)
        source = recipe.reuse.find(content)
        if source is not None:
            return _known(sample, source, recipe.reuse), []
        image: Image.Image
        if isinstance(sample.data, bytes):
            image, size = decode(sample.data, recipe.max_pixels, recipe.draft_px)
            num_bytes = len(sample.data)
        else:
            image, size, num_bytes = sample.data, sample.data.size, None
        pixels = [given.prepare(image) for given in recipe.inputs]
        return Item(*facts, size, phash(image), num_bytes, content), pixels
    except BadImageError as error:
        return Item(*facts, reason=str(error)), []


def _known(sample: Sample, source: Source, reuse: Reuse) -> Item:
    """Return an image whose vector is there already."""
    found = reuse.facts(source)
    facts = (sample.row, sample.id, sample.uri, sample.label, sample.extra)
    return Item(*facts, found.size, found.phash, found.num_bytes, found.content_hash, source=source)


def decode_chunk(recipe: Recipe, start: int, stop: int) -> Chunk:
    """Return the chunk of pool rows [start, stop), read and decoded here."""
    chunk, stacks = Chunk(), [list[Pixels]() for _ in recipe.inputs]
    pool = open_listing(recipe)
    there = recipe.reuse.unchanged(pool, start, stop)
    rows = np.array([row for row in range(start, stop) if row not in there], dtype=np.int64)
    samples, began = pool_samples(pool, rows), time.perf_counter()
    for sample in samples:
        given = time.perf_counter()
        item, pixels = _decoded(sample, recipe)
        chunk.items.append(item)
        for stack, own in zip(stacks, pixels, strict=False):  # a rejected image has none
            stack.append(own)
        done = time.perf_counter()
        chunk.read_s += given - began
        chunk.decode_s += done - given
        began = done
    chunk.read_s += time.perf_counter() - began
    if there:
        named = unread(pool, np.array(sorted(there), dtype=np.int64))
        chunk.items += [_known(sample, there[sample.row], recipe.reuse) for sample in named]
        chunk.items.sort(key=lambda item: item.row)
    chunk.pixels = [np.stack(stack) if stack else np.empty(0, np.uint8) for stack in stacks]
    return chunk


class Inline:
    """Decodes in the calling thread."""

    def chunks(self, recipe: Recipe, ranges: list[tuple[int, int]]) -> Iterator[Chunk]:
        """Yield the chunk of each range, in order."""
        return (decode_chunk(recipe, start, stop) for start, stop in ranges)


class OnThreads:
    """Reads and decodes on threads, a chunk each, one chunk more than threads ahead of the caller."""

    def __init__(self, threads: int) -> None:
        self.ahead, self.threads = threads + 1, ThreadPoolExecutor(threads)

    def chunks(self, recipe: Recipe, ranges: list[tuple[int, int]]) -> Iterator[Chunk]:
        """Yield the chunk of each range, in order."""
        left = iter(ranges)
        waiting = deque(self.threads.submit(decode_chunk, recipe, *given) for given in islice(left, self.ahead))
        while waiting:
            chunk = waiting.popleft().result()
            waiting.extend(self.threads.submit(decode_chunk, recipe, *given) for given in islice(left, 1))
            yield chunk


def _task(recipe: Recipe, start: int, stop: int) -> Iterator[Chunk | str | None]:
    """Yield None once there is a CPU, then the chunk, or the text of the RunError that ended it."""
    yield None
    try:
        yield decode_chunk(recipe, start, stop)
    except RunError as error:
        yield str(error)


class OnTasks:
    """Decodes by Ray tasks, a CPU each, `ahead` chunks at a time: the next ones while the caller encodes the last.

    Where no CPU is to be had for them (actors hold them all), the caller decodes the chunk that it waits for itself: a
    slow run, but no deadlock.
    """

    def __init__(self, ahead: int) -> None:
        import ray

        self.ahead, self.patience_s = ahead, PATIENCE_S
        self.task = ray.remote(num_cpus=1, num_returns="streaming", max_retries=TASK_RETRIES)(_task)

    def chunks(self, recipe: Recipe, ranges: list[tuple[int, int]]) -> Iterator[Chunk]:
        """Yield the chunk of each range, in order."""
        left = iter(ranges)
        waiting = deque((given, self.task.remote(recipe, *given)) for given in islice(left, self.ahead))
        while waiting:
            given, stream = waiting.popleft()
            chunk = self._result(recipe, given, stream)
            waiting.extend((following, self.task.remote(recipe, *following)) for following in islice(left, 1))
            yield chunk

    def _result(self, recipe: Recipe, given: tuple[int, int], stream: Any) -> Chunk:
        import ray

        started, _ = ray.wait([stream], timeout=self.patience_s)
        if not started:
            ray.cancel(stream)
            self.patience_s = 0.0  # the next ones have waited for as long
            return decode_chunk(recipe, *given)
        self.patience_s = PATIENCE_S
        try:
            ray.get(next(stream))
            chunk = ray.get(next(stream))
        except ray.exceptions.RayError as error:
            raise RunError(
                f"rows {given[0]} to {given[1] - 1} of the pool could not be decoded: {first_line(error)}. Finished parts "
                "are kept; run the same command again, with --decode-workers 0 to see what happens in the actors"
            ) from error
        if isinstance(chunk, str):
            raise RunError(chunk)
        found: Chunk = chunk
        return found


Decoder = Inline | OnThreads | OnTasks
