"""Walks a folder, directory by directory, in the order of its files' paths."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from engine.places import Place
from engine.schema import InputError

FILES = pa.schema([("path", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64())])
CHUNK = 16_384
"""Entries of a directory that are Python objects at a time."""


def _local_chunks(path: str) -> Iterator[list[tuple[str, int, int, bool]]]:
    """Yield (name, size, mtime, is a folder) of a local directory's entries; links are what they lead to."""
    chunk = []
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                stat = entry.stat()
            except FileNotFoundError:  # a link to nothing
                continue
            chunk.append((entry.name, stat.st_size, stat.st_mtime_ns, entry.is_dir()))
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    yield chunk


def _remote_chunks(place: Place, path: str) -> Iterator[list[tuple[str, int, int, bool]]]:
    infos = place.fs.get_file_info(pafs.FileSelector(path))
    for start in range(0, len(infos), CHUNK):
        yield [
            (info.base_name, info.size or 0, info.mtime_ns or 0, info.type == pafs.FileType.Directory)
            for info in infos[start : start + CHUNK]
            if info.base_name
        ]


def entries_of(place: Place, below: str) -> pa.Table:
    """Return the visible entries of one directory: name (folders end in /), size, mtime_ns; sorted as their paths are.

    Raises InputError where a name cannot be read as text.
    """
    path = f"{place.path.rstrip('/')}/{below}".rstrip("/")
    local = isinstance(place.fs, pafs.LocalFileSystem)
    tables = []
    for chunk in _local_chunks(path) if local else _remote_chunks(place, path):
        visible = [(name + "/" if is_folder else name, size, mtime) for name, size, mtime, is_folder in chunk if name[0] != "."]
        columns = list(zip(*visible, strict=True)) or [(), (), ()]
        try:
            tables.append(pa.table([pa.array(column, f.type) for column, f in zip(columns, FILES, strict=True)], schema=FILES))
        except UnicodeEncodeError as error:
            name = os.fsencode(str(error.object)).decode("utf-8", "backslashreplace")
            raise InputError(f"pool {place.uri!r} holds a file whose name is not UTF-8, {name!r}: rename it") from error
    return pa.concat_tables(tables).sort_by("path") if tables else FILES.empty_table()


def walk(place: Place, below: str = "", above: tuple[str, ...] = ()) -> Iterator[pa.Table]:
    """Yield the visible files below a folder as tables of FILES, paths relative to it, in the order of their paths.

    A table holds files of one directory, so memory is bounded by the largest one. Hidden files and folders are left
    out. Links are followed; raises InputError where one leads to a folder above itself.
    """
    entries = entries_of(place, below)
    if isinstance(place.fs, pafs.LocalFileSystem):
        real = os.path.realpath(os.path.join(place.path, below))
        if real in above:
            raise InputError(f"pool {place.uri!r} holds a link to a folder above it, {below.rstrip('/')!r}: remove it")
        above = (*above, real)
    paths = pc.binary_join_element_wise(below, entries["path"], "")
    entries = entries.set_column(0, "path", paths.cast(pa.string()))
    folders = pc.indices_nonzero(pc.ends_with(entries["path"], "/")).to_pylist()
    last = 0
    for at in folders:
        if at > last:
            yield entries.slice(last, at - last)
        yield from walk(place, entries["path"][at].as_py(), above)
        last = at + 1
    if last < len(entries):
        yield entries.slice(last)


def files_ending(place: Place, suffixes: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """Return (path below the folder, size, mtime) of the files that end so, sorted by path; one file is ('', size, mtime)."""
    if place.kind() == pafs.FileType.File:
        info = place.fs.get_file_info(place.path)
        return [("", info.size or 0, info.mtime_ns or 0)]
    found = []
    for files in walk(place):
        keep = pc.match_substring_regex(files["path"], ending(suffixes))
        found += [tuple(record.values()) for record in files.filter(keep).to_pylist()]
    return found


def ending(suffixes: tuple[str, ...] | frozenset[str]) -> str:
    """Return a regular expression for paths whose file has a name before one of these endings, in any case."""
    return r"(?i)[^/](?:" + "|".join(sorted(suffix.replace(".", r"\.") for suffix in suffixes)) + ")$"
