"""CIFAR-10 and CIFAR-100 as their authors ship them: binary batches and Python pickles."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
from PIL import Image

from engine.arrays import Ints
from engine.folders import digest_of
from engine.places import Place
from engine.schema import InputError
from engine.sources.listing import ListingWriter, extents
from engine.sources.pool import Columns, Pool, Sample, stamp

CIFAR_SIDE_PX = 32
USES: frozenset[str] = frozenset()
BATCHES = pa.schema([("file", pa.string()), ("start", pa.int64()), ("count", pa.int64())])


class _ArraysOnly(pickle.Unpickler):
    """Unpickles CIFAR's Python batches: dicts, lists, bytes and numpy arrays, and refuses everything else."""

    ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise InputError(f"a CIFAR batch may not contain {module}.{name}")
        return super().find_class(module, name)


CIFAR_TRAIN = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "train")


def files_of(place: Place) -> list[str]:
    """Return the names of the batches a CIFAR pool consists of: those of a folder's training set, or the one file ('')."""
    if place.kind() == pafs.FileType.File:
        return [""] if _is_cifar_name(place.name) else []
    names = sorted(name + ending for name in CIFAR_TRAIN for ending in ("", ".bin"))
    return [name for name in names if place.at(name).kind() == pafs.FileType.File]


def _is_cifar_name(name: str) -> bool:
    return name.removesuffix(".bin") in (*CIFAR_TRAIN, "test_batch", "test")


@functools.lru_cache(maxsize=1)
def _cifar_batch(uri: str, stamped: tuple[int, int]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return (images (n, 32, 32, 3) uint8, labels (n,)) of one batch; CIFAR-100's labels are the fine ones."""
    file = Place(uri)
    data = file.read()
    if file.path.endswith(".bin"):
        label_bytes = 2 if file.name in ("train.bin", "test.bin") else 1
        width = label_bytes + 3 * CIFAR_SIDE_PX**2
        if not data or len(data) % width:
            raise InputError(f"{uri} has {len(data)} bytes, not a multiple of {width}: not a CIFAR binary batch")
        records = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
        pixels, labels = records[:, label_bytes:], records[:, label_bytes - 1]
    else:
        try:
            batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
            pixels = np.asarray(batch[b"data"], dtype=np.uint8)
            labels = np.asarray(batch[b"labels"] if b"labels" in batch else batch[b"fine_labels"])
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{uri} is not a CIFAR Python batch: {error}") from error
    if pixels.ndim != 2 or pixels.shape != (len(labels), 3 * CIFAR_SIDE_PX**2):
        raise InputError(f"{uri} holds pixels of shape {pixels.shape} and {len(labels)} labels: not a CIFAR batch")
    images = pixels.reshape(-1, 3, CIFAR_SIDE_PX, CIFAR_SIDE_PX).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.astype(np.int64)


def _cifar_names(place: Place) -> tuple[str, ...] | None:
    folder = place if place.kind() == pafs.FileType.Directory else place.folder
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        if folder.at(name).exists():
            return tuple(line.strip() for line in folder.at(name).read().decode().splitlines() if line.strip())
    return None


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the batches of a CIFAR pool."""
    writer = ListingWriter(BATCHES)
    facts, start = [], 0
    for name in files_of(place):
        file = place.at(name) if name else place
        count = len(_cifar_batch(file.address, stamp(file))[1])
        writer.add(pa.table([[name], [start], [count]], schema=BATCHES))
        facts.append([name, *stamp(file)])
        start += count
    return Pool(place.address, "cifar", start, digest_of(facts), _cifar_names(place), {}, writer.finish())


def read(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of ascending pool rows."""
    place = Place(pool.address)
    for extent, places in extents(pool.listing, rows):
        file = place.at(extent["file"]) if extent["file"] else place
        images, labels = _cifar_batch(file.address, stamp(file))
        name = file.name
        for at in places.tolist():
            row = extent["start"] + at
            yield Sample(row, f"{name}/{at}", f"{file.uri}#{at}", int(labels[at]), Image.fromarray(images[at]))


def ids(pool: Pool) -> Iterator[pa.Array]:
    """Yield the ids of all rows, a batch of the pool's at a time."""
    for table in pool.listing.tables():
        for extent in table.to_pylist():
            name = extent["file"] or Place(pool.address).name
            yield pa.array([f"{name}/{at}" for at in range(extent["count"])], pa.string())
