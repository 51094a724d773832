"""SVHN's cropped digits as their authors ship them: MATLAB files of 32 x 32 px images."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from engine.arrays import Ints
from engine.folders import digest_of
from engine.places import Place
from engine.schema import InputError
from engine.sources.listing import EXTENT, ListingWriter
from engine.sources.pool import Columns, Pool, Sample, stamp

USES: frozenset[str] = frozenset()
DIGITS = tuple("0123456789")


@functools.lru_cache(maxsize=1)
def _load(uri: str, stamped: tuple[int, int]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return (images (n, 32, 32, 3) uint8, labels (n,)); the digit 0, which is class 10 in the file, is 0 here."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(io.BytesIO(Place(uri).read()), variable_names=["X", "y"])
        pixels, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    except (MatReadError, NotImplementedError, ValueError, TypeError, KeyError, EOFError, OSError) as error:
        raise InputError(f"{uri} cannot be read as SVHN's cropped digits: {type(error).__name__}: {error}") from error
    if pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, len(labels)):
        raise InputError(f"{uri} holds X of shape {pixels.shape} and {len(labels)} labels y: not SVHN's cropped digits")
    if len(labels) and not 1 <= labels.min() <= labels.max() <= 10:
        raise InputError(f"{uri} holds labels from {labels.min()} to {labels.max()}; SVHN's are 1 to 10")
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), labels % 10


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the images of one file."""
    count = len(_load(place.address, stamp(place))[1])
    writer = ListingWriter(EXTENT)
    writer.add(pa.table([[0], [count]], schema=EXTENT))
    name = place.name
    return Pool(place.address, "svhn", count, digest_of([name, *stamp(place)]), DIGITS, {"name": name}, writer.finish())


def read(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of ascending pool rows."""
    images, labels = _load(pool.address, stamp(Place(pool.address)))
    for row in rows.tolist():
        yield Sample(row, f"{pool.detail['name']}/{row}", f"{pool.uri}#{row}", int(labels[row]), Image.fromarray(images[row]))


def ids(pool: Pool) -> Iterator[pa.Array]:
    """Yield the ids of all rows, in batches."""
    yield pa.array([f"{pool.detail['name']}/{row}" for row in range(pool.num_rows)], pa.string())
