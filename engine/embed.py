"""Pool -> features/: decode and encode on Ray Data's actor pool, one deterministic file a part.

A part is a fixed range of pool rows; batches never mix parts, so a part's bytes don't depend on which actor made
it, or when. Finished parts are skipped when the same command is run again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine import session
from engine.decode import BadImageError, decode
from engine.encoders import ENCODERS, NO_FILE, Encoder, build_encoder
from engine.folders import Claim, Place, digest_of, now
from engine.schema import InputError, Progress, RunError, lookup, no_progress, result_options
from engine.sources import Sample, columns_of, load_pool, open_pool, read, save_pool
from engine.store import (
    PATTERNS,
    labels_numpy,
    part_bytes,
    part_name,
    part_rows,
    patterns_array,
    publish_features,
    table_bytes,
    vector_counts,
    vectors_array,
)
from engine.verbs import EmbedOptions

LISTING = "pool.arrow"
REJECTED = pa.schema([("row", pa.int64()), ("id", pa.string()), ("uri", pa.string()), ("reason", pa.string())])
DEFAULT_BATCH = {"cpu": 16, "cuda": 256}


@dataclass(frozen=True)
class Prepared:
    """One decoded image on its way to the encoder, or the reason why it has none."""

    sample: Sample
    pixels: npt.NDArray[np.uint8] | None
    size: tuple[int, int]
    reason: str = ""


def prepare(sample: Sample, encoder: Encoder, max_pixels: int) -> Prepared:
    """Decode one sample and bring it to the encoder's pixels."""
    try:
        if sample.error is not None:
            raise BadImageError(sample.error)
        if isinstance(sample.data, bytes):
            image, size = decode(sample.data, max_pixels)
        else:
            image, size = sample.data, sample.data.size
        return Prepared(sample, encoder.prepare(image), size)
    except BadImageError as error:
        return Prepared(sample, None, (0, 0), str(error))


class PartEncoder:
    """What an actor does: one part at a time, from reading its samples to its finished file.

    Called by Ray Data with a batch of one part, or directly; returns the part's entry for the manifest.
    """

    def __init__(self, options: EmbedOptions, out: str, threads: int, device: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self.options = options
        self.place = Place(out)
        self.pool = load_pool(self.place.at(LISTING))
        self.encoder = build_encoder(options, device)
        self.batch = options.batch_size or DEFAULT_BATCH[device]
        self.decoders = ThreadPoolExecutor(max(1, threads)) if device == "cuda" or threads > 1 else None

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[str]]:
        """Encode the parts that a batch of Ray Data names; return their entries as JSON.

        Our own errors travel as entries, too: `_on_ray` raises them again, without Ray's stack around them.
        """
        entries = []
        for start, stop in zip(batch["start"], batch["stop"], strict=True):
            try:
                entries.append(self.encode_part(int(start), int(stop)))
            except RunError as error:
                entries.append({"failed": str(error)})
        return {"part": [json.dumps(entry) for entry in entries]}

    def _prepared(self, start: int, stop: int) -> Iterator[Prepared]:
        samples = read(self.pool, start, stop)
        if self.decoders is None:
            return (prepare(sample, self.encoder, self.options.max_pixels) for sample in samples)
        return self._decode_ahead(samples)

    def _decode_ahead(self, samples: Iterator[Sample]) -> Iterator[Prepared]:
        """Decode on threads, at most two batches ahead of the encoder, in order."""
        assert self.decoders is not None
        waiting: list[Any] = []
        for sample in samples:
            waiting.append(self.decoders.submit(prepare, sample, self.encoder, self.options.max_pixels))
            if len(waiting) >= 2 * self.batch:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()

    def encode_part(self, start: int, stop: int) -> dict[str, Any]:
        """Read, decode, encode and write pool rows [start, stop); return the part's manifest entry."""
        good: list[Prepared] = []
        rejected: list[dict[str, Any]] = []
        vectors: list[npt.NDArray[np.float32]] = [np.empty((0, self.encoder.dim), np.float32)]
        batch: list[Prepared] = []
        for item in self._prepared(start, stop):
            if item.pixels is None:
                s = item.sample
                rejected.append({"row": s.row, "id": s.id, "uri": s.uri, "reason": item.reason})
                continue
            batch.append(item)
            if len(batch) == self.batch:
                vectors += self._encode(batch)
                good += [_light(done) for done in batch]
                batch = []
        if batch:
            vectors += self._encode(batch)
            good += [_light(done) for done in batch]
        table = self._table(good, vectors)
        metadata = {"start": str(start), "stop": str(stop), "rejected": json.dumps(rejected)}
        data = part_bytes(table.replace_schema_metadata(metadata))
        self.place.at("parts", part_name(start)).write(data)
        return part_entry(start, stop, data, table, rejected)

    def _encode(self, batch: list[Prepared]) -> list[npt.NDArray[np.float32]]:
        """Return a list with the vectors of each image, or with those of the batch, one an image."""
        pixels = np.stack([item.pixels for item in batch if item.pixels is not None])
        found = self.encoder.encode(pixels, np.array([item.sample.row for item in batch], dtype=np.int64))
        return found if isinstance(found, list) else [found]

    def _table(self, good: list[Prepared], vectors: list[npt.NDArray[np.float32]]) -> pa.Table:
        """Return the part's table; `vectors` begin with an array of no vectors."""
        with np.errstate(over="ignore"):  # what does not fit is an error of ours, below
            stored = np.concatenate(vectors).astype(self.options.dtype)
        several = self.encoder.column == PATTERNS
        counts = np.array([len(own) for own in vectors[1:]] if several else [1] * len(good), dtype=np.int64)
        if not np.isfinite(stored).all():
            first = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
            bad = good[int(np.searchsorted(np.cumsum(counts), first, side="right"))].sample
            raise RunError(
                f"the encoder gave a vector that is not finite as {self.options.dtype} for image {bad.id!r} (row {bad.row})"
            )
        return pa.table(
            {
                "row": pa.array([item.sample.row for item in good], pa.int64()),
                "id": pa.array([item.sample.id for item in good], pa.string()),
                "label": pa.array([item.sample.label for item in good], pa.int64()),
                "width": pa.array([item.size[0] for item in good], pa.int32()),
                "height": pa.array([item.size[1] for item in good], pa.int32()),
                self.encoder.column: patterns_array(stored, counts) if several else vectors_array(stored),
            }
        )


def _light(item: Prepared) -> Prepared:
    """Return the item without its pixels and file: what is left of it until its part is written."""
    s = item.sample
    return Prepared(Sample(s.row, s.id, s.uri, s.label, b""), None, item.size)


def part_entry(start: int, stop: int, data: pa.Buffer, table: pa.Table, rejected: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the manifest says of a part."""
    return {
        "name": part_name(start),
        "start": start,
        "stop": stop,
        "num_vectors": len(table),
        **({"num_patterns": int(vector_counts(table[PATTERNS]).sum())} if PATTERNS in table.column_names else {}),
        "num_labeled": int((labels_numpy(table["label"]) >= 0).sum()),
        "sha256": digest_of(memoryview(data).tobytes()),
        "bytes": data.size,
        "rejected": rejected,
    }


def _finished(place: Place, ranges: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return the entries of the parts that an earlier run of the same command finished."""
    names = set(place.at("parts").names())
    entries = []
    for start, stop in ranges:
        if part_name(start) in names:
            data = pa.py_buffer(place.at("parts", part_name(start)).read())
            table = pa.ipc.open_file(data).read_all()
            entries.append(part_entry(start, stop, data, table, json.loads(table.schema.metadata[b"rejected"])))
    return entries


def _rejected_limit(text: str, num_rows: int) -> float:
    """Return the number of rejected images that `--max-rejected` allows."""
    try:
        value = float(text.rstrip("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"--max-rejected {text!r} is neither a share (1%) nor a count (100)")
    return value * num_rows / 100 if text.endswith("%") else value


def _on_ray(options: EmbedOptions, todo: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Encode parts on an actor pool of Ray Data; yield their entries as they are finished."""
    import ray.data

    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if session.gpus() else 0.0
    fit = int(session.gpus() / gpus) if gpus else session.cpus() // options.cpus_per_worker
    workers = min(options.workers or max(1, fit), len(todo))
    weights = options.weights if options.weights in NO_FILE else Place(options.weights).absolute
    parts = ray.data.from_items([{"start": start, "stop": stop} for start, stop in todo], override_num_blocks=len(todo))
    arguments = {
        "options": replace(options, weights=weights),
        "out": Place(options.out).absolute,
        "threads": options.cpus_per_worker,
        "device": "cuda" if gpus else "cpu",
    }
    done = parts.map_batches(
        PartEncoder,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=options.cpus_per_worker,
        num_gpus=gpus or None,
    )
    for batch in done.iter_batches(batch_size=1, prefetch_batches=0):
        for part in batch["part"]:
            entry = json.loads(part)
            if "failed" in entry:
                raise RunError(entry["failed"])
            yield entry


def _in_process(options: EmbedOptions, todo: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    try:
        encoder = PartEncoder(options, options.out, options.cpus_per_worker, device)
        for start, stop in todo:
            yield encoder.encode_part(start, stop)
    finally:
        torch.set_num_threads(before)


def _encode_parts(
    options: EmbedOptions, todo: list[tuple[int, int]], num_rows: int, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Encode the parts that are missing; return their entries and the times of this run."""
    began, first, first_rows, run_rows = time.perf_counter(), 0.0, 0, 0
    rows_before = num_rows - sum(stop - start for start, stop in todo)
    entries: list[dict[str, Any]] = []
    progress("embed", rows_before, num_rows, "")
    if todo and options.workers != 0:
        session.connect(options.address)
    for entry in (_in_process if options.workers == 0 else _on_ray)(options, todo) if todo else ():
        entries.append(entry)
        run_rows += entry["stop"] - entry["start"]
        if not first:
            first, first_rows = time.perf_counter() - began, run_rows
        progress("embed", rows_before + run_rows, num_rows, "")
    seconds = time.perf_counter() - began
    steady = (run_rows - first_rows) / (seconds - first) if run_rows > first_rows else None
    return entries, {
        "finished": now(),
        "seconds_s": round(seconds, 3),
        "first_part_s": round(first, 3),
        "rows_per_s": round(run_rows / seconds, 2),
        "steady_rows_per_s": round(steady, 2) if steady else None,
    }


def _check_rejected(place: Place, entries: list[dict[str, Any]], options: EmbedOptions, num_rows: int) -> list[dict[str, Any]]:
    """Return the rejected rows; raise RunError with a summary by reason when they are above the limit."""
    rejected = [entry for part in sorted(entries, key=lambda e: e["start"]) for entry in part["rejected"]]
    place.at("rejected.parquet").write(table_bytes(pa.Table.from_pylist(rejected, schema=REJECTED)))
    if len(rejected) > _rejected_limit(options.max_rejected, num_rows):
        reasons = Counter(entry["reason"].split(":")[0] for entry in rejected).most_common(4)
        summary = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise RunError(
            f"{len(rejected)} of {num_rows} images are bad, above --max-rejected {options.max_rejected} ({summary}). "
            f"They are listed in {place.uri}/rejected.parquet; run again with a higher limit to go on without them"
        )
    if len(rejected) == num_rows:
        raise RunError(f"all {num_rows} images are bad: see {place.uri}/rejected.parquet")
    return rejected


def embed(options: EmbedOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Embed every image of a pool; return the manifest of the features/ folder published at `options.out`.

    Bad images become rows of rejected.parquet with a reason; the rest keep their pool row. Raises InputError for
    unusable input, RunError when too many images are bad.
    """
    lookup(options.encoder, ENCODERS, "encoder")
    pool = open_pool(options.pool, columns_of(options))
    _rejected_limit(options.max_rejected, pool.num_rows)
    place = Place(options.out)
    inputs: dict[str, Any] = {"pool": {"digest": pool.digest, "num_rows": pool.num_rows}}
    if options.weights not in NO_FILE:
        weights = Place(options.weights)
        if not weights.exists():
            raise InputError(f"weights file {options.weights!r} does not exist")
        inputs["weights"] = digest_of(weights.read())
    identity = {key: value for key, value in result_options(options).items() if key != "weights" or "weights" not in inputs}
    reads = [options.pool, *([] if options.weights in NO_FILE else [options.weights])]
    claim = Claim.of(place, "features", inputs, identity, options.overwrite, reads)
    published = claim.published()
    if published is not None:
        return published
    encoder = build_encoder(options, "cpu")  # here first: a wrong backbone is one error, and claims no folder
    claim.take()
    save_pool(pool, place.at(LISTING))
    size = part_rows(pool.num_rows)
    ranges = [(start, min(start + size, pool.num_rows)) for start in range(0, pool.num_rows, size)]
    entries = _finished(place, ranges)
    resumed = {entry["start"] for entry in entries}
    todo = [r for r in ranges if r[0] not in resumed]
    new, spent = _encode_parts(options, todo, pool.num_rows, progress)
    entries += new
    rejected = _check_rejected(place, entries, options, pool.num_rows)
    for entry in entries:
        entry["num_rejected"] = len(entry.pop("rejected"))
    return publish_features(
        place,
        entries,
        {
            "num_rows": pool.num_rows,
            "num_rejected": len(rejected),
            "dim": encoder.dim,
            "column": encoder.column,
            "vectors_per_image": encoder.vectors_per_image,
            "dtype": options.dtype,
            "class_names": list(pool.class_names) if pool.class_names else None,
            "pool": {"uri": pool.uri, "kind": pool.kind},
            "encoder": {"name": options.encoder, "weights": options.weights, **encoder.describe()},
            "time": spent,
        },
    )
