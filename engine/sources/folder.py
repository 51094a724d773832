"""An image folder: flat, or a folder a class."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from engine.arrays import Ints
from engine.folders import digest_of
from engine.places import Place
from engine.sources.listing import ListingWriter, pieces
from engine.sources.pool import IMAGE_SUFFIXES, Columns, Images, Pool, Sample, sample_from_file
from engine.sources.walk import FILES, ending, walk

USES: frozenset[str] = frozenset()


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the images below a folder, sorted by path; the first folder of a path is its label."""
    writer = ListingWriter(FILES)
    classes: set[str] = set()
    for files in walk(place):
        images = files.filter(pc.match_substring_regex(files["path"], ending(IMAGE_SUFFIXES)))
        if len(images) and "/" in (first := images["path"][0].as_py()):
            classes.add(first.split("/")[0])
        writer.add(images)
    listing = writer.finish()
    names = tuple(sorted(classes)) or None
    return Pool(place.address, "folder", listing.num_rows, digest_of(["folder", listing.digest]), names, {}, listing)


def unread(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of ascending pool rows without their files' bytes."""
    images = Images(Place(pool.address))
    code = {name: index for index, name in enumerate(pool.class_names or ())}
    for some, table in pieces(pool.listing, rows):
        for row, path in zip(some.tolist(), table["path"].to_pylist(), strict=True):
            folder, slash, _ = path.partition("/")
            yield Sample(row, path, images.place(path).uri, code[folder] if slash else None, b"")


def read(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of ascending pool rows."""
    images = Images(Place(pool.address))
    for sample in unread(pool, rows):
        yield sample_from_file(sample.row, sample.id, images.place(sample.id), sample.label)


def ids(pool: Pool) -> Iterator[pa.Array]:
    """Yield the ids of all rows, in batches."""
    return (table["path"].combine_chunks() for table in pool.listing.tables())
