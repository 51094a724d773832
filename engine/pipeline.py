"""Parts of a pool through the encoders: in this process, or on an actor pool of Ray Data.

One execution for the whole pool: a row of the dataset is a part, an actor encodes and writes it, and sends back what the
manifests say of it. Batches never mix parts, so a part's bytes depend neither on who made it nor on who decoded it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from engine import session
from engine.arrays import Ints
from engine.backbones import NO_FILE
from engine.chunks import Chunk, Decoder, Inline, Item, OnTasks, OnThreads, Recipe, chunk_rows, open_listing, pool_samples
from engine.encoders import ALONE, Encoder, build_encoders
from engine.inputs import Pixels
from engine.parts import part_table, write_part
from engine.places import Place
from engine.reuse import NOTHING_KNOWN, Reuse
from engine.schema import InputError, RunError, parse_decode_workers, parse_workers
from engine.sources.pool import NO_SUCH_FILE, UNREADABLE, Sample
from engine.store import MIN_PART_ROWS
from engine.tasks.canvas import CanvasInput
from engine.verbs import EmbedOptions

DEFAULT_BATCH = {"cpu": 16, "cuda": 256}
DETECTOR_BATCH = {"cpu": 4, "cuda": 16}
STAGES = ("read_s", "decode_s", "wait_s", "encode_s", "write_s")
"""What a part's seconds went to. Decoding ahead overlaps with encoding: the encoder stood still for `wait_s` of it."""


@dataclass(frozen=True)
class Todo:
    """A part that is missing: pool rows [start, stop), and the encoders whose stores lack it."""

    start: int
    stop: int
    encoders: tuple[str, ...]


@dataclass(frozen=True)
class Stores:
    """Where a run reads its listing and writes: encoder -> place of its feature store; and its pool's `addresses`.

    All with any keys: this travels from process to process, and is never written.
    """

    listing: str = field(repr=False)
    digest: str
    places: Mapping[str, str] = field(repr=False)
    addresses: tuple[str, str] | None = field(default=None, repr=False)
    reuse: Reuse = NOTHING_KNOWN


class Batches:
    """Cuts chunks into batches of `size` images, whatever the chunks' sizes; one for each input of the encoders."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: list[Pixels] = []
        self.count = 0

    def add(self, pixels: Pixels) -> Iterator[Pixels]:
        """Yield the batches that are full with these images."""
        while len(pixels):
            room = self.size - self.count
            self.held.append(pixels[:room])
            self.count += len(self.held[-1])
            pixels = pixels[room:]
            if self.count == self.size:
                yield self.rest()

    def rest(self) -> Pixels:
        """Return the images held, (k, ...) with k <= size, and hold none; the array is the caller's own."""
        batch = np.concatenate(self.held) if self.held else np.empty(0, np.uint8)
        self.held, self.count = [], 0
        return batch


class PartEncoder:
    """What an actor does: one part at a time, from reading its samples to its finished files.

    Called by Ray Data with a batch of one part, or directly.
    """

    def __init__(self, options: EmbedOptions, stores: Stores, device: str, decode_tasks: int = 0) -> None:
        import torch

        began = time.perf_counter()
        threads = options.cpus_per_worker
        torch.set_num_threads(threads)
        self.options, self.stores = options, stores
        self.encoders = build_encoders(options, device, stores.places)
        large = any(isinstance(encoder.input, CanvasInput) for encoder in self.encoders.values())
        self.batch = options.batch_size or (DETECTOR_BATCH if large else DEFAULT_BATCH)[device]
        inputs = tuple(dict.fromkeys(encoder.input for encoder in self.encoders.values()))
        self.recipe = Recipe(
            stores.listing, stores.digest, inputs, options.max_pixels, options.draft, stores.addresses, stores.reuse
        )
        self.pool = open_listing(self.recipe)
        ahead = device == "cuda" or threads > 1
        self.decoder: Decoder = OnTasks(decode_tasks) if decode_tasks else OnThreads(threads) if ahead else Inline()
        self.model_s = time.perf_counter() - began

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[str]]:
        """Encode the parts that a batch of Ray Data names; return their entries as JSON.

        Our own errors travel as entries, too: `on_ray` raises them again, without Ray's stack around them.
        """
        entries = []
        for start, stop, names in zip(batch["start"], batch["stop"], batch["encoders"], strict=True):
            try:
                entries.append(self.encode_part(Todo(int(start), int(stop), tuple(str(names).split(",")))))
            except (InputError, RunError) as error:
                entries.append({"failed": str(error)})
        return {"part": [json.dumps(entry) for entry in entries]}

    def encode_part(self, todo: Todo) -> dict[str, Any]:
        """Read, decode, encode and write one part.

        Returns `start`, `stop`, `stores` (encoder -> the part's entry in its manifest) and `spent` (STAGES, and `model_s`
        with an actor's first part). Raises RunError where the pool can't be read, a vector is not finite, or a file not
        written.
        """
        spent = dict.fromkeys(STAGES, 0.0) | {"model_s": self.model_s}
        self.model_s = 0.0
        encoders = {name: self.encoders[name] for name in todo.encoders}
        made = _Made(encoders, self.batch, self.options.compile)
        inputs = tuple(dict.fromkeys(encoder.input for encoder in encoders.values()))
        recipe = replace(self.recipe, inputs=inputs)
        rows = chunk_rows(self.batch, inputs)
        ranges = [(start, min(start + rows, todo.stop)) for start in range(todo.start, todo.stop, rows)]
        began = time.perf_counter()
        for chunk in self.decoder.chunks(recipe, ranges):
            given = time.perf_counter()
            made.add(chunk, inputs)
            spent["wait_s"] += given - began
            spent["read_s"] += chunk.read_s
            spent["decode_s"] += chunk.decode_s
            began = time.perf_counter()
            spent["encode_s"] += began - given
        made.finish(inputs)
        done = time.perf_counter()
        spent["encode_s"] += done - began
        before = np.arange(max(0, todo.stop - MIN_PART_ROWS), todo.start)
        check_readable(made.items, self.pool.uri, pool_samples(self.pool, before))
        entries = {name: self._write(todo, name, encoder, made) for name, encoder in encoders.items()}
        spent["write_s"] = time.perf_counter() - done
        reused = sum(item.source is not None for item in made.items)
        return {"start": todo.start, "stop": todo.stop, "stores": entries, "spent": spent, "num_reused": reused}

    def _write(self, todo: Todo, name: str, encoder: Encoder, made: _Made) -> dict[str, Any]:
        good = [item for item in made.items if item.reason is None]
        vectors = self._with_known(good, made.vectors[name])
        table = part_table(good, vectors, encoder.column, self.options.dtype, self.pool.schema)
        return write_part(Place(self.stores.places[name]), todo.start, todo.stop, table, made.items)

    def _with_known(self, items: Sequence[Item], encoded: list[npt.NDArray[np.float32]]) -> list[npt.NDArray[np.float32]]:
        """Return the vectors of a part's images, given those that were encoded: with the ones that were there already."""
        sources = {at: item.source for at, item in enumerate(items) if item.source is not None}
        if not sources:
            return encoded
        found = np.empty((len(items), encoded[0].shape[1]), np.float32)
        at = np.array(list(sources), dtype=np.int64)
        found[at] = self.stores.reuse.vectors(list(sources.values()))
        found[np.setdiff1d(np.arange(len(items)), at)] = np.concatenate(encoded)
        return [found]


class PartActor(PartEncoder):
    """A PartEncoder on an actor, given its arguments by a function: Ray shows and exports values, and some hold keys."""

    def __init__(self, given: Callable[[], dict[str, Any]]) -> None:
        super().__init__(**given())


class _Made:
    """What of a part is there so far: its items, and the vectors of each encoder."""

    def __init__(self, encoders: Mapping[str, Encoder], batch: int, compiled: bool) -> None:
        self.encoders, self.batch = encoders, batch
        self.padded = {name for name in encoders if compiled or name in ALONE}
        self.items: list[Item] = []
        self.rows: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.vectors: dict[str, list[npt.NDArray[np.float32]]] = {
            name: [np.empty((0, encoder.dim), np.float32)] for name, encoder in encoders.items()
        }
        self.batches = {encoder.input: Batches(batch) for encoder in encoders.values()}
        self.encoded = dict.fromkeys(self.batches, 0)

    def add(self, chunk: Chunk, inputs: Sequence[Any]) -> None:
        """Take a chunk, whose pixels are those of `inputs`; encode the batches that it fills."""
        self.items += chunk.items
        good = [item for item in chunk.items if item.reason is None and item.source is None]
        self.rows += [item.row for item in good]
        self.sizes += [item.size for item in good]
        for given, pixels in zip(inputs, chunk.pixels, strict=True):
            for batch in self.batches[given].add(pixels):
                self._encode(given, batch)

    def finish(self, inputs: Sequence[Any]) -> None:
        """Encode what fills no batch."""
        for given in inputs:
            batch = self.batches[given].rest()
            if len(batch):
                self._encode(given, batch)

    def _encode(self, given: Any, batch: Pixels) -> None:
        first, count = self.encoded[given], len(batch)
        self.encoded[given] += count
        rows = np.array(self.rows[first : first + count], dtype=np.int64)
        sizes = np.array(self.sizes[first : first + count], dtype=np.int64)
        whole = (batch, rows, sizes) if count == self.batch else _filled(batch, rows, sizes, self.batch)
        for name, encoder in self.encoders.items():
            if encoder.input == given:
                found = encoder.encode(*(whole if name in self.padded else (batch, rows, sizes)))
                self.vectors[name] += found[:count] if isinstance(found, list) else [found[:count]]


def _filled(batch: Pixels, rows: Ints, sizes: Ints, size: int) -> tuple[Pixels, Ints, Ints]:
    """Return a batch filled up to `size` with its last image: kernels round by the batch's size."""
    at = np.minimum(np.arange(size), len(batch) - 1)
    return batch[at], rows[at], sizes[at]


def _is_refused(reason: str | None) -> bool:
    """Return whether the filesystem did not give an image that may well be there."""
    return reason is not None and reason.startswith(UNREADABLE) and reason != NO_SUCH_FILE


def check_readable(items: Sequence[Item], pool: str, before: Iterable[Sample] = ()) -> None:
    """Raise RunError where the filesystem gave not one image of a part: that is not the images' fault.

    The images of a last part may be too few to tell: then those `before` them are tried, until there is one that is
    given. Files that are not there are the images' fault: they are rejected, however many.
    """
    if all(_is_refused(item.reason) for item in items) and all(_is_refused(sample.error) for sample in before):
        first = str(items[0].reason)[len(UNREADABLE) :]
        raise RunError(
            f"none of rows {items[0].row} to {items[-1].row} of pool {pool!r} can be read, the first one: {first}. "
            "Finished parts are kept: run the same command again once the pool can be read"
        )


@dataclass(frozen=True)
class Crew:
    """Who does the work on Ray: least and most actors, the GPUs of each, and the tasks that decode ahead of each."""

    low: int
    high: int
    gpus: float
    decode_tasks: int


def crew(options: EmbedOptions, num_parts: int, up: session.Size, most: session.Size | None) -> Crew:
    """Return who works on `num_parts` parts in a cluster that has so much now and can have `most`; None: nobody knows.

    By default an actor for each GPU, or each CPU, that there can be: all are asked for at once, and those that have a place
    begin. Where nobody knows, one for each that is up, and more as nodes come. Tasks decode where actors are on GPUs and
    leave CPUs. Raises InputError for options that can't be.
    """
    known = most or up
    each = options.gpus_per_worker if options.gpus_per_worker is not None else float(known.gpus > 0)
    if each > 1 and each != int(each):
        raise InputError(f"option gpus_per_worker is {each:g}: above 1 it must be a whole number")
    asked = parse_decode_workers(options.decode_workers)
    fit = max(1, int(known.gpus / each) if each else known.cpus // (options.cpus_per_worker + (asked or 0)))
    low, high = parse_workers(options.workers) or (fit, fit if most else num_parts)
    low, high = min(low, num_parts), min(high, num_parts)
    beside = min(high, fit) if most is None else high
    spare = known.cpus - beside * options.cpus_per_worker
    automatic = max(1, spare // beside) if each and spare > 0 else 0
    return Crew(low, high, each, automatic if asked is None else asked)


def on_ray(options: EmbedOptions, stores: Stores, todo: Sequence[Todo]) -> Iterator[dict[str, Any]]:
    """Encode parts on an actor pool of Ray Data; yield their entries as they are finished."""
    import ray.data

    who = crew(options, len(todo), session.now(), session.most())
    rows = [{"start": part.start, "stop": part.stop, "encoders": ",".join(part.encoders)} for part in todo]
    weights = options.weights if options.weights in NO_FILE else Place(options.weights).absolute
    checkpoint = options.checkpoint and Place(options.checkpoint).absolute
    arguments = {
        "options": replace(options, weights=weights, checkpoint=checkpoint),
        "stores": stores,
        "device": "cuda" if who.gpus else "cpu",
        "decode_tasks": who.decode_tasks,
    }
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        PartActor,
        fn_constructor_kwargs={"given": lambda: arguments},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=who.low, max_size=who.high),
        num_cpus=options.cpus_per_worker,
        num_gpus=who.gpus or None,
    )
    with session.waiting() as moved:
        for batch in done.iter_batches(batch_size=1, prefetch_batches=0):
            moved()
            for part in batch["part"]:
                entry = json.loads(part)
                if "failed" in entry:
                    raise RunError(entry["failed"])
                yield entry


def in_process(options: EmbedOptions, stores: Stores, todo: Sequence[Todo]) -> Iterator[dict[str, Any]]:
    """Encode parts in this process, one after another; yield their entries."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    try:
        encoder = PartEncoder(options, stores, device)
        for part in todo:
            yield encoder.encode_part(part)
    finally:
        torch.set_num_threads(before)
