"""`dedup`: which images are copies of others, an exclusion list to give to `select`; or have a copy in another pool."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa

from engine.arrays import Bools, Ints
from engine.copies import (
    Copies,
    Decide,
    Prints,
    copies_of,
    exact_copies,
    first_near,
    keep_order,
    phash_copies,
    read_prints,
)
from engine.folders import Claim, digest_of, publish
from engine.leaks import hash_leaks, same_leaks, telling, vector_leaks
from engine.placement import open_shards
from engine.places import Place
from engine.runner import ATTEMPTS
from engine.schema import InputError, Progress, RunError, no_progress, result_options
from engine.select import places_read, read_labeled
from engine.semdedup import default_clusters, find_copies
from engine.shards import LostShardError, Shards
from engine.store import FeatureStore, table_bytes
from engine.verbs import DedupOptions
from engine.whiten import Cosines, whitened_cosines, whitening


def _persist(shards: list[Shards], work: Callable[[], Copies]) -> Copies:
    """Return what `work` returns; where a shard is lost, make it again and start over. Raises RunError after ATTEMPTS."""
    for _ in range(ATTEMPTS):
        try:
            return work()
        except LostShardError:
            for one in shards:
                one.restore()
    raise RunError(f"shards were lost {ATTEMPTS} times in a row: run the same command again")


def _agreeing(prints: Prints, others: Prints, options: DedupOptions, cosines: Cosines) -> Decide:
    """Return what says which pairs within --wide-bits are copies: the hashes' word, or the whitened vectors'."""
    alone = telling(prints, others)

    def decide(i: Ints, j: Ints, bits: Ints) -> Bools:
        copies = alone(i, j, bits) & (bits <= options.max_bits)
        asked = np.flatnonzero(~copies)
        copies[asked] = cosines(prints.rows[i[asked]], others.rows[j[asked]]) > options.min_cosine
        return copies

    return decide


def _both(prints: list[Prints], shards: list[Shards], labeled: Ints, options: DedupOptions, progress: Progress) -> Copies:
    larger = max(range(len(prints)), key=lambda at: len(prints[at].rows))
    whiten = whitening(shards[larger], prints[larger].rows, options.seed)
    cosines = whitened_cosines(shards[0], shards[-1], whiten)
    if options.against:
        decide = _agreeing(prints[0], prints[1], options, cosines)
        found = hash_leaks(prints[0], prints[1], options.wide_bits, decide, progress)
    else:
        ordered = prints[0].at(keep_order(prints[0], labeled))
        decide = _agreeing(ordered, ordered, options, cosines)
        always = np.isin(ordered.rows, labeled)
        found = copies_of(ordered, first_near(ordered.hashes, always, options.wide_bits, decide, progress))
    return Copies(found.rows, found.kept, cosines(found.rows, found.kept), found.bits)


def _by_hashes(prints: list[Prints], labeled: Ints, options: DedupOptions, progress: Progress) -> Copies:
    """Return the copies by content or perceptual hashes."""
    if options.by == "exact":
        return same_leaks(*prints) if options.against else exact_copies(prints[0], labeled)
    if not options.against:
        return phash_copies(prints[0], labeled, options.max_bits, progress)
    return hash_leaks(prints[0], prints[1], options.max_bits, telling(*prints), progress)


def _by_vectors(
    stores: list[FeatureStore], shards: list[Shards], labeled: Ints, clusters: int, options: DedupOptions, progress: Progress
) -> Copies:
    if options.against:
        return vector_leaks(shards[0], shards[1], stores[1].rows, options.eps, progress)
    return find_copies(shards[0], clusters, options.eps, options.iterations, options.seed, progress, labeled)


def _write(place: Place, stores: list[FeatureStore], copies: Copies, facts: dict[str, Any]) -> dict[str, Any]:
    store = stores[0]
    ids, kept = store.ids(copies.rows), stores[-1].ids(copies.kept)
    measured = {"bits": copies.bits, "similarity": copies.similarity}
    columns = {"kept_row": copies.kept, "kept_id": pa.array(kept, pa.string())}
    columns |= {name: values for name, values in measured.items() if values is not None}
    data = table_bytes(pa.table({"row": copies.rows, "id": pa.array(ids, pa.string()), **columns}))
    place.at("excluded.parquet").write(data)
    place.at("ids.txt").write("".join(f"{name}\n" for name in ids).encode())
    place.at("indices.json").write(json.dumps(copies.rows.tolist()).encode())
    counts = {"num_rows": store.num_rows, "num_vectors": store.num_vectors, "num_excluded": len(ids)}
    counts["num_kept"] = store.num_vectors - len(ids)
    return publish(place, {"features": store.place.uri, **counts, "digest": digest_of(data.to_pybytes()), **facts})


def _open(options: DedupOptions) -> tuple[list[FeatureStore], list[Prints]]:
    """Return the store, and the one to compare with if there is one, and what they know of their images if that is read.

    Raises InputError for stores that can't be read this way.
    """
    uris = [options.features, *([options.against] if options.against else [])]
    reads_vectors = options.by in ("embedding", "both")
    stores = [FeatureStore.of_vectors(uri) if reads_vectors else FeatureStore(uri) for uri in uris]
    for store in stores:
        if reads_vectors and store.vectors_per_image > 1:
            raise InputError(f"{store.place.uri} has several vectors an image (patterns): --by phash or exact")
    if reads_vectors and stores[0].dim != stores[-1].dim:
        raise InputError(
            f"{stores[0].place.uri} has vectors of {stores[0].dim} floats, {stores[1].place.uri} of {stores[1].dim}: "
            "embed both by the same encoder"
        )
    if options.against and options.labeled:
        raise InputError("--labeled says what is kept, and --against drops nothing: give one of them")
    if options.clusters is not None and (options.by != "embedding" or options.against):
        raise InputError("--clusters means nothing here: only --by embedding within one pool is sought in clusters")
    return stores, read_prints(*stores) if options.by != "embedding" else []


def dedup(options: DedupOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Find the copies in a feature store and publish them as a folder of kind "dedup"; return its manifest.

    excluded.parquet (row, id, kept_row, kept_id, then `bits` and `similarity` where they are measured) in row order; ids.txt
    and indices.json, the images' ids and pool rows, as `select --exclude` takes them. Raises InputError for unusable input.
    """
    stores, prints = _open(options)
    store = stores[0]
    if options.by == "exact" and not all((of.content >= 0).all() for of in prints):
        raise InputError("a store without content hashes was embedded by an earlier version: embed again, or use --by phash")
    clusters = default_clusters(store.num_vectors) if options.clusters is None else options.clusters
    if clusters > store.num_vectors:
        raise InputError(f"option clusters is {clusters}: {store.place.uri} has {store.num_vectors} vectors")
    labeled = read_labeled(options.labeled, store)
    inputs = {"features": store.digest} | ({"against": stores[1].digest} if options.against else {})
    inputs |= {"labeled": digest_of(labeled.tolist())} if options.labeled else {}
    place, reads = Place(options.out), places_read(options.features, options.against, options.labeled)
    claim = Claim.of(place, "dedup", inputs, result_options(options), options.overwrite, reads)
    published = claim.published()
    if published is not None:
        return published
    with ExitStack() as opened:
        shards: list[Shards] = []
        if options.by in ("embedding", "both"):
            shards = [opened.enter_context(open_shards(one, options, True, ())) for one in stores]
        claim.take()
        began = time.perf_counter()
        if options.by == "both":
            copies = _persist(shards, lambda: _both(prints, shards, labeled, options, progress))
        elif shards:
            copies = _persist(shards, lambda: _by_vectors(stores, shards, labeled, clusters, options, progress))
        else:
            copies = _by_hashes(prints, labeled, options, progress)
    facts: dict[str, Any] = {"by": options.by, "time": {"seconds_s": round(time.perf_counter() - began, 3)}}
    facts |= {"against": options.against} if options.against else {}
    facts |= {"num_clusters": clusters} if options.by == "embedding" and not options.against else {}
    return _write(place, stores, copies, facts)
