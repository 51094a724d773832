"""Tar shards in the WebDataset convention: members of one name beside one another are one sample.

0001.jpg is an image, 0001.cls its label, 0001.txt its text, 0001.json its metadata. The listing holds where in which
shard an image is, so that a sample is one ranged read; nothing is unpacked. Ids are SHARD/NAME, as names may start anew
in each shard.
"""

from __future__ import annotations

import functools
import io
import re
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from engine.arrays import Ints
from engine.folders import CHUNK_BYTES, digest_of
from engine.places import Place
from engine.retry import patiently
from engine.schema import InputError, first_line
from engine.sources.ids import check_unique
from engine.sources.listing import LISTING_ROWS, ListingWriter, pieces
from engine.sources.pool import IMAGE_SUFFIXES, Columns, Pool, Sample, check_inside, sample_of, stamp
from engine.sources.tags import Tags, values_of
from engine.sources.texts import TextTypes
from engine.sources.values import ClassNames, labels_of

USES = frozenset(("label", "metadata"))
MEMBERS = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.string()),
        ("json", pa.string()),
        ("txt", pa.string()),
    ]
)
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shards_of(place: Place) -> tuple[Place, list[str]]:
    """Return the folder of a pool's shards and their names: those that a pattern NAME-{000..012}.tar or a folder says."""
    folder, name = place.folder, place.name
    found = RANGE.search(name)
    if found:
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        return folder, [f"{name[: found.start()]}{number:0{len(first)}d}{name[found.end() :]}" for number in numbers]
    if place.kind() == pafs.FileType.File:
        return folder, [name]
    return place, [name for name in place.names() if name.endswith(".tar") and not name.startswith(".")]


def _members(shard: Place) -> Iterator[tuple[tarfile.TarInfo, io.BufferedReader]]:
    """Yield a shard's files, in order, with the open shard; raises InputError for what is none or lies elsewhere."""
    try:
        with shard.fs.open_input_file(shard.path) as raw:
            buffered = io.BufferedReader(raw, CHUNK_BYTES if not isinstance(shard.fs, pafs.LocalFileSystem) else 512)
            with tarfile.open(fileobj=buffered, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # it keeps every header it has read
                    if info.isdir():
                        continue
                    check_inside(info.name, shard.uri)
                    if not info.isreg() or info.issparse():
                        raise InputError(f"{shard.uri} holds {info.name!r}, which is a link or no plain file: pack it again")
                    yield info, buffered
    except (tarfile.TarError, OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{shard.uri} cannot be read as an uncompressed tar: {first_line(error)}") from error


def _text(shard: Place, info: tarfile.TarInfo, file: io.BufferedReader) -> str:
    file.seek(info.offset_data)
    try:
        return file.read(info.size).decode().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{shard.uri}: {info.name!r} is not UTF-8 text: {error}") from error


def _samples(shard: Place, name: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of one shard as rows of the listing; those without an image have no size."""
    sample: dict[str, Any] = {}
    for info, file in _members(shard):
        path = info.name.removeprefix("./")
        base = path.rsplit("/", 1)[-1]
        if base.startswith("."):
            continue
        stem, _, suffix = base.partition(".")
        key = path[: len(path) - len(base)] + stem
        if sample.get("key") != key:
            if sample:
                yield sample
            sample = {"key": key, "id": f"{name}/{key}", "shard": name}
        if f".{suffix.lower()}" in IMAGE_SUFFIXES:
            if "size" in sample:
                raise InputError(f"{shard.uri} holds two images named {key!r}: which is meant?")
            sample["offset"], sample["size"] = info.offset_data, info.size
        elif suffix in ("cls", "json", "txt"):
            sample[{"cls": "label"}.get(suffix, suffix)] = _text(shard, info, file)
    if sample:
        yield sample


class _Lister:
    """Writes a listing of samples, and takes note of what they say."""

    def __init__(self, columns: Columns, uri: str) -> None:
        self.writer = ListingWriter(MEMBERS)
        self.tags = Tags(columns.metadata, uri)
        self.types = TextTypes(["label"])
        self.classes = ClassNames("label", uri)
        self.label = columns.label or "label"
        self.left_out = 0
        self._rows: list[dict[str, Any]] = []

    def add(self, sample: dict[str, Any], shard: Place) -> None:
        """Take one sample; those without an image are only counted."""
        if "size" not in sample:
            self.left_out += 1
            return
        said = self.tags.add(sample, shard)
        label = said.get(self.label)
        if "label" not in sample and isinstance(label, int | str):
            sample["label"] = str(label)
        self._rows.append(sample)
        if len(self._rows) == LISTING_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        rows = pa.RecordBatch.from_pylist(self._rows, schema=MEMBERS)
        self._rows = []
        self.types.add("label", rows["label"])
        self.classes.add(rows["label"])
        self.writer.add(rows)


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the images of the shards, in the shards' order."""
    folder, names = shards_of(place)
    lister = _Lister(columns, place.uri)
    facts = []
    for name in names:
        shard = folder.at(name)
        if not shard.exists():
            raise InputError(f"{place.uri}: there is no {shard.uri}")
        facts.append([name, *stamp(shard)])
        for sample in _samples(shard, name):
            lister.add(sample, shard)
    lister.flush()
    listing = lister.writer.finish()
    check_unique(lambda: (table["id"] for table in listing.tables()), listing.num_rows, place.uri)
    codes = lister.types.type_of("label") == pa.int64()
    class_names = None if codes else lister.classes.names() or None
    schema, left_out = lister.tags.schema(lister.label)
    detail = {"columns_left_out": left_out, "without_image": lister.left_out}
    digest = digest_of(["tar", facts, listing.digest, class_names, str(schema)])
    return Pool(place.address, "tar", listing.num_rows, digest, class_names, detail, listing, schema, folder.absolute)


class _Shards:
    """The shards that a worker reads from: each is opened once, and asked for no more than the images in it."""

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self._open: dict[str, pa.NativeFile] = {}

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return a range of a shard, patiently as whole files are read; raises OSError where it isn't there."""
        place = self.folder.at(name)

        def ranged() -> bytes:
            if name not in self._open:
                self._open.clear()  # shards are read one after the other
                self._open[name] = place.fs.open_input_file(place.path)
            return bytes(self._open[name].read_at(size, offset))

        data = patiently(ranged, place.uri, place.remote)
        if len(data) != size:
            raise OSError(f"{name} ends before it")
        return data


def read(pool: Pool, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of ascending pool rows, each by one ranged read."""
    shards = _Shards(Place(pool.base))
    for some, table in pieces(pool.listing, rows):
        labels = labels_of(table["label"], pool.class_names)
        for row, entry, label in zip(some.tolist(), table.to_pylist(), labels, strict=True):
            where = (entry["shard"], entry["offset"], entry["size"])
            uri = f"{shards.folder.at(entry['shard']).uri}#{entry['offset']}"
            given = functools.partial(shards.read, *where)
            yield sample_of(row, entry["id"], uri, label, given, values_of(entry, pool.schema))


def ids(pool: Pool) -> Iterator[pa.Array]:
    """Yield the ids of all rows, in batches."""
    return (table["id"].combine_chunks() for table in pool.listing.tables())
