"""An image folder: flat, or a folder a class."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from engine.folders import Place, digest_of
from engine.sources.pool import Columns, Pool, Sample, list_files, sample_from_file

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the images below a folder, sorted by path; the first folder of a path is its label."""
    base = place.path.rstrip("/") + "/"
    infos = list_files(place)
    files = [(info.path[len(base) :], info.size, info.mtime_ns) for info in infos if is_image(info.path[len(base) :])]
    files.sort()
    folders = sorted({name.split("/")[0] for name, _, _ in files if "/" in name})
    code = {name: index for index, name in enumerate(folders)}
    labels = [code.get(name.split("/")[0]) if "/" in name else None for name, _, _ in files]
    listing = pa.table({"id": pa.array([name for name, _, _ in files], pa.string()), "label": pa.array(labels, pa.int64())})
    digest = digest_of([list(file) for file in files])
    return Pool(place.uri, "folder", len(files), digest, tuple(folders) or None, listing, {})


def is_image(path: str) -> bool:
    """Return whether a path below a pool is an image by its name, and neither hidden nor in a hidden folder."""
    stem, dot, suffix = path.rpartition(".")
    hidden = any(part.startswith(".") for part in path.split("/"))
    return bool(stem) and not hidden and (dot + suffix).lower() in IMAGE_SUFFIXES


def read(pool: Pool, start: int, stop: int) -> Iterator[Sample]:
    """Yield the samples of pool rows [start, stop)."""
    place = Place(pool.uri)
    for offset, entry in enumerate(pool.listing.slice(start, stop - start).to_pylist()):
        file = place.at(entry["id"])
        yield sample_from_file(start + offset, entry["id"], file, entry["label"])
