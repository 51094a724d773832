"""Data sets of the `datasets` library: a folder that `save_to_disk` wrote, or a name on the hub, hf://owner/name.

A hub data set is downloaded into the library's own cache, on every machine that reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from engine.arrays import Ints
from engine.folders import digest_of
from engine.places import Place
from engine.schema import InputError, first_line
from engine.sources.listing import EXTENT, ListingWriter, extents
from engine.sources.pool import Columns, Pool, Sample
from engine.sources.rows import columns_read, ids_of, samples, survey

USES = frozenset(("image", "label", "id", "metadata", "split"))
EXTENT_ROWS = 256
BATCH_ROWS = 1024
DEFAULT_SPLIT = "train"
HUB = "hf://"
FILES = ("datasets/", "buckets/", "spaces/", "models/")
"""hf:// also names files on the hub, below these."""


def is_hub_name(uri: str) -> bool:
    """Return whether a URI names a data set on the hub: hf://name or hf://owner/name, not a file there."""
    name = uri.removeprefix(HUB).strip("/")
    return uri.startswith(HUB) and not f"{name}/".startswith(FILES) and 1 <= len(name.split("/")) <= 2


def is_saved(place: Place) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return place.at("dataset_dict.json").exists() or (
        place.at("state.json").exists() and place.at("dataset_info.json").exists()
    )


def _choose(uri: str, splits: dict[str, Any], split: str | None) -> Any:
    name = split or (DEFAULT_SPLIT if DEFAULT_SPLIT in splits or len(splits) > 1 else next(iter(splits)))
    if name not in splits:
        raise InputError(f"{uri} has no split {name!r} (one of: {', '.join(sorted(splits))}): name it with --split")
    return splits[name]


@functools.lru_cache(maxsize=1)
def load(uri: str, split: str | None) -> Any:
    """Return a split as a `datasets.Dataset` whose images stay as they are stored.

    Raises InputError where there is no such data set or split, or the hub can't be reached.
    """
    import datasets

    if not is_hub_name(uri):
        try:
            saved = datasets.load_from_disk(uri)
        except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
            raise InputError(f"{uri} cannot be read as a saved data set: {first_line(error)}") from error
        if not isinstance(saved, datasets.DatasetDict):
            if split is not None:
                raise InputError(f"--split {split!r}: {uri} is a single data set, without splits: leave it out")
            return saved.with_format("arrow")
        return _choose(uri, dict(saved), split).with_format("arrow")
    try:
        found = datasets.load_dataset(uri.removeprefix(HUB).strip("/"), split=split or DEFAULT_SPLIT)
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise InputError(f"{uri} cannot be loaded from the hub: {reason}. Is the name right, and the hub reachable?") from error
    return found.with_format("arrow")


def _read_all(data: Any, names: list[str]) -> Iterator[pa.RecordBatch]:
    some = data.select_columns([name.split(".")[0] for name in names])
    for start in range(0, len(some), BATCH_ROWS):
        yield from some[start : start + BATCH_ROWS].combine_chunks().to_batches()


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the rows of one split, a fixed number an extent."""
    data = load(place.address, columns.split)
    writer = ListingWriter(EXTENT)
    starts = list(range(0, len(data), EXTENT_ROWS))
    writer.add(pa.table([starts, [min(EXTENT_ROWS, len(data) - start) for start in starts]], schema=EXTENT))
    schema = data.features.arrow_schema
    told = survey(functools.partial(_read_all, data), len(data), schema, columns, place.uri)
    # the library's own fingerprint of what a data set was made of
    digest = digest_of(["datasets", data._fingerprint, len(data), told.detail, str(told.schema), told.class_names])
    detail = {**told.detail, "split": columns.split}
    return Pool(place.address, "datasets", len(data), digest, told.class_names, detail, writer.finish(), told.schema)


def read(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of ascending pool rows."""
    data = load(pool.address, pool.detail["split"]).select_columns(columns_read(pool))
    for extent, at in extents(pool.listing, rows):
        first = extent["start"]
        low, high = first + int(at[0]), first + int(at[-1]) + 1
        yield from samples(pool, data[low:high], low, first + at, pool.uri, Place(pool.address))


def ids(pool: Pool) -> Iterator[pa.Array]:
    """Yield the ids of all rows, in batches."""
    return ids_of(pool, functools.partial(_read_all, load(pool.address, pool.detail["split"])))
