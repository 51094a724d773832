"""Pool -> features/: claims the folders, encodes the parts that are missing, publishes.

A part is a fixed range of pool rows, one deterministic file in the store of each encoder. Finished parts are skipped when
the same command is run again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from engine import session
from engine.backbones import NO_FILE
from engine.checkpoints import Checkpoint
from engine.encoders import ALONE, Encoder, build_encoders, encoder_names
from engine.folders import Claim, now, read_manifest, read_run, sha256_of, to_json
from engine.models import check_checkpoint
from engine.parts import REJECTED, finished_parts, rejected_rows
from engine.pipeline import STAGES, Stores, Todo, in_process, on_ray
from engine.places import Place
from engine.retry import reached
from engine.reuse import LISTING, Reuse
from engine.schema import (
    InputError,
    Progress,
    RunError,
    fields_of,
    no_progress,
    parse_decode_workers,
    parse_workers,
    result_options,
)
from engine.scoring import Scoring, check_options, open_scoring, prepare, without_h
from engine.sources import Pool, columns_of, open_pool, save_pool
from engine.store import FeatureStore, part_rows, publish_features
from engine.verbs import EmbedOptions, PoolOptions

KEPT = ". Finished parts are kept: the same command goes on"


@dataclass
class Store:
    """The feature store of one encoder on its way: whose it is, its finished parts, its manifest once it is published."""

    name: str
    claim: Claim
    manifest: dict[str, Any] | None
    entries: dict[int, dict[str, Any]]

    @property
    def place(self) -> Place:
        """The store's folder."""
        return self.claim.place


def _rejected_limit(text: str, num_rows: int) -> float:
    """Return the number of rejected images that `--max-rejected` allows."""
    try:
        value = float(text.rstrip("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"--max-rejected {text!r} is neither a share (1%) nor a count (100)")
    return value * num_rows / 100 if text.endswith("%") else value


def _check_rejected(store: Store, options: EmbedOptions, num_rows: int) -> int:
    """Write a store's rejected.parquet; return how many rows it has.

    Raises RunError with a summary by reason when they are above the limit.
    """
    place, reasons, sink = store.place, Counter[str](), pa.BufferOutputStream()
    with pq.ParquetWriter(sink, REJECTED, compression="zstd") as writer:
        for batch in rejected_rows(place, [store.entries[start] for start in sorted(store.entries)]):
            writer.write_batch(batch)
            reasons.update(reason.split(":")[0] for reason in batch["reason"].to_pylist())
    place.at("rejected.parquet").write(sink.getvalue())
    count = reasons.total()
    if count > _rejected_limit(options.max_rejected, num_rows):
        summary = "; ".join(f"{number} x {reason}" for reason, number in reasons.most_common(4))
        raise RunError(
            f"{count} of {num_rows} images are bad, above --max-rejected {options.max_rejected} ({summary}). "
            f"They are listed in {place.uri}/rejected.parquet; run again with a higher limit to go on without them"
        )
    if count == num_rows:
        raise RunError(f"all {num_rows} images are bad: see {place.uri}/rejected.parquet")
    return count


def _inputs(options: EmbedOptions, pool: Pool) -> dict[str, Any]:
    """Return the digests of what a run reads."""
    inputs: dict[str, Any] = {"pool": {"digest": pool.digest, "num_rows": pool.num_rows}}
    if options.weights not in NO_FILE:
        weights = Place(options.weights)
        if not weights.exists():
            raise InputError(f"weights file {options.weights!r} does not exist")
        inputs["weights"] = sha256_of(weights)
    if options.checkpoint is not None:
        inputs["checkpoint"] = Checkpoint(options.checkpoint).digest(options.best)
    return inputs


def _reuse(options: EmbedOptions, inputs: dict[str, Any]) -> Reuse:
    """Return the stores that --reuse names. Raises InputError for one whose vectors are not those that this run would make."""
    names = encoder_names(options.encoder)
    if options.reuse and (len(names) > 1 or names[0] not in ALONE):
        raise InputError(f"--reuse takes one encoder of {', '.join(sorted(ALONE))}: of others, vectors depend on the pool, too")
    found = []
    for uri in options.reuse:
        store = FeatureStore(uri)
        theirs, ours = store.manifest["options"], json.loads(to_json(result_options(options)))
        of_pool = {"pool", *(field.name for field in fields_of(PoolOptions))}
        differ = [name for name in ours if name not in of_pool and theirs.get(name, ours[name]) != ours[name]]
        told = [f"{name} is {theirs[name]!r} there and {ours[name]!r} here" for name in differ]
        told += [
            f"other {name}" for name in ("weights", "checkpoint") if store.manifest["inputs"].get(name) != inputs.get(name)
        ]
        if told or "encoder" not in store.manifest:
            raise InputError(
                f"--reuse {uri!r} was not embedded like this ({'; '.join(told) or 'it was imported'}): leave it out"
            )
        if "content_hash" not in store.columns:
            raise InputError(f"--reuse {uri!r} has no content hashes (an earlier version wrote it): embed the whole pool again")
        found.append((store.place.absolute, store.digest))
    return Reuse(tuple(found))


def _claims(options: EmbedOptions, inputs: dict[str, Any], scoring: Scoring) -> list[Store]:
    """Return the store of each encoder, OUT or OUT/<encoder>, with its manifest where it is published already.

    The identity of a store is that of a run of its encoder alone.
    """
    names, out = encoder_names(options.encoder), Place(options.out)
    itself = (read_manifest(out) or read_run(out)) if len(names) > 1 else None
    if itself is not None:
        raise InputError(
            f"{out.uri} is a {itself['kind']} folder itself: several encoders write folders below --out, choose another"
        )
    reads = [options.pool, *options.reuse, *([] if options.weights in NO_FILE else [options.weights])]
    reads += [uri for uri in (options.checkpoint, options.reference, options.reference_labels) if uri is not None]
    stores = []
    for name in names:
        identity = result_options(replace(options, encoder=name))
        if "weights" in inputs or "checkpoint" in inputs:
            del identity["weights"]
        place = out if len(names) == 1 else out.at(name)
        own = {**inputs, **scoring.inputs(name)}
        told = {**identity, **scoring.identity(name)}
        claim = Claim.of(place, "features", own, told, options.overwrite, reads)
        stores.append(Store(name, claim, claim.published(), {}))
    return stores


def _ready(options: EmbedOptions) -> dict[str, Encoder]:
    """Return the encoders, on the CPU, once Ray is up where it is needed: it starts while they are built.

    They are built here first so that a wrong one is one error and claims no folder.
    """
    with ThreadPoolExecutor(1) as aside:
        building = aside.submit(build_encoders, options, "cpu")
        if parse_workers(options.workers) != (0, 0):
            session.connect(options.address)
        return building.result()


def _encode_missing(
    options: EmbedOptions, stores: Sequence[Store], pool: Pool, reuse: Reuse, began: float, progress: Progress
) -> dict[str, Any]:
    """Encode the parts that stores lack, and fill in their entries; return the times of a run that `began` then."""
    size = part_rows(pool.num_rows)
    ranges = [(start, min(start + size, pool.num_rows)) for start in range(0, pool.num_rows, size)]
    ready, first, first_rows, run_rows, reused = time.perf_counter(), 0.0, 0, 0, 0
    for store in stores:
        store.entries = finished_parts(store.place, ranges)
    missing = {r: tuple(store.name for store in stores if r[0] not in store.entries) for r in ranges}
    todo = [Todo(*rows, names) for rows, names in missing.items() if names]
    rows_before = pool.num_rows - sum(part.stop - part.start for part in todo)
    by_name, spent = {store.name: store for store in stores}, Counter[str]()
    progress("embed", rows_before, pool.num_rows, "")
    here = parse_workers(options.workers) == (0, 0)
    places = {store.name: store.place.absolute for store in stores}
    where = Stores(stores[0].place.at(LISTING).absolute, pool.digest, places, pool.addresses, reuse)
    for part in (in_process if here else on_ray)(options, where, todo) if todo else ():
        for name, entry in part["stores"].items():
            by_name[name].entries[entry["start"]] = entry
        spent.update(part["spent"])
        run_rows += part["stop"] - part["start"]
        reused += part["num_reused"]
        if not first:
            first, first_rows = time.perf_counter() - began, run_rows
        progress("embed", rows_before + run_rows, pool.num_rows, "")
    seconds = time.perf_counter() - began
    steady = (run_rows - first_rows) / (seconds - first) if run_rows > first_rows else None
    return {
        "finished": now(),
        "seconds_s": round(seconds, 3),
        "first_part_s": round(first, 3),
        "rows_per_s": round(run_rows / seconds, 2),
        "steady_rows_per_s": round(steady, 2) if steady else None,
        **({"num_reused": reused} if reuse.stores else {}),
        "ready_s": round(ready - began, 3),
        "stages": {stage: round(spent[stage], 3) for stage in ("model_s", *STAGES)},
    }


def _publish(store: Store, options: EmbedOptions, pool: Pool, encoder: Encoder, spent: dict[str, Any]) -> dict[str, Any]:
    num_rejected = _check_rejected(store, options, pool.num_rows)
    from_checkpoint = {"checkpoint": options.checkpoint, "best": options.best}
    weights = {"weights": options.weights} if options.checkpoint is None else from_checkpoint
    return publish_features(
        store.place,
        list(store.entries.values()),
        {
            "num_rows": pool.num_rows,
            "num_rejected": num_rejected,
            "dim": encoder.dim,
            "column": encoder.column,
            "vectors_per_image": encoder.vectors_per_image,
            "dtype": options.dtype,
            "class_names": list(pool.class_names) if pool.class_names else None,
            "pool": {"uri": pool.uri, "kind": pool.kind, **pool.left_out},
            "encoder": {"name": store.name, **weights, **encoder.describe()},
            "time": spent,
        },
    )


def embed_all(options: EmbedOptions, progress: Progress = no_progress) -> list[dict[str, Any]]:
    """Embed every image of a pool by each of `options.encoder`; return the manifests of their features/ folders.

    Each image is read and decoded once. One encoder writes to `options.out`, several to a folder each below it, named
    like them, as runs of their own would. Bad images become rows of rejected.parquet with a reason; the rest keep their
    pool row. Raises InputError for unusable input, RunError when too many images are bad, or a place can't be reached.
    """
    names = encoder_names(options.encoder)
    check_checkpoint(options)
    check_options(options, names)
    parse_workers(options.workers)
    parse_decode_workers(options.decode_workers)
    with reached(options.pool):
        pool = open_pool(options.pool, columns_of(options))
    _rejected_limit(options.max_rejected, pool.num_rows)
    with reached(options.out):
        scoring = open_scoring(options, names, pool)
        inputs = _inputs(options, pool)
        reuse = _reuse(options, inputs)
        stores = _claims(options, inputs, scoring)
    missing = [store for store in stores if store.manifest is None]
    if missing:
        left = replace(options, encoder=",".join(store.name for store in missing))
        began = time.perf_counter()
        encoders = _ready(left)
        places = {store.name: store.place for store in missing}
        lacking = without_h(encoders, places, options.overwrite)
        with scoring.images(bool(lacking), progress) as reference, reached(options.out, KEPT):
            for store in missing:
                store.claim.take()
                save_pool(pool, store.place.at(LISTING))
            if reference is not None:
                threads = options.cpus_per_worker
                prepare(lacking, places, reference, scoring.labelled, pool.num_rows, threads, progress)
            spent = _encode_missing(left, missing, pool, reuse, began, progress)
            for store in missing:
                store.manifest = _publish(store, options, pool, encoders[store.name], spent)
    manifests = {store.name: store.manifest for store in stores if store.manifest is not None}
    return [manifests[name] for name in names]


def embed(options: EmbedOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Embed every image of a pool by one encoder, as `embed_all`; return the manifest of its features/ folder."""
    (manifest,) = embed_all(options, progress)
    return manifest
