"""Where an export goes: one file, or a folder that appears under its name when all is in it."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

from engine.folders import check_apart
from engine.places import Place
from engine.schema import InputError

IDS = "ids.csv"
"""What a folder's files are called in the pool; written last where a folder can't be renamed."""
HEADER = ("file_name", "id", "row", "rank")
UNSAFE = re.compile(r"[^\w.+@-]+")
LONGEST = 120
"""Characters of a file's name."""


def safe_name(text: str) -> str:
    """Return a name for a file that is one everywhere: no folders, no dots in front, nothing that a shell or Windows minds."""
    return UNSAFE.sub("_", text).strip("._ ")[-LONGEST:] or "image"


@dataclass
class Names:
    """Gives each image a file's name of its own, by what its id ends in; also where big and small letters are the same.

    `stems`: names differ without their endings.
    """

    stems: bool = False
    taken: set[str] = field(default_factory=set)

    def add(self, name: str, row: int, suffix: str, folder: str = "") -> str:
        """Return FOLDER/NAME.SUFFIX; one that is taken gets the pool's row."""
        stem = safe_name(name.replace("\\", "/").rsplit("/", 1)[-1])
        if suffix and stem.lower().endswith(suffix.lower()):
            stem = stem[: -len(suffix)] or "image"
        start, number = f"{folder}/" if folder else "", 0
        ending, found = "" if self.stems else suffix, f"{start}{stem}"
        while f"{found}{ending}".lower() in self.taken:
            found = f"{start}{stem}-{row}{f'-{number}' if number else ''}"
            number += 1
        self.taken.add(f"{found}{ending}".lower())
        return f"{found}{suffix}"


def _is_ours(place: Place) -> bool:
    return place.at(IDS).exists() and place.at(IDS).read().startswith(",".join(HEADER).encode())


def check_out(place: Place, folder: bool, endings: Sequence[str], overwrite: bool, reads: Sequence[str]) -> None:
    """Raise InputError for a name that the format has not, or where something is that may not be replaced."""
    check_apart(place, reads)
    kind = place.kind()
    if not folder and not place.path.endswith(tuple(endings)):
        raise InputError(f"--out {place.uri} must end in {' or '.join(endings)}: this export is one file")
    if kind == pafs.FileType.NotFound:
        return
    if (kind == pafs.FileType.Directory) != folder:
        raise InputError(
            f"--out {place.uri} is a {'file' if folder else 'folder'}, and this export is not: choose another --out"
        )
    if folder and place.names() and not _is_ours(place):
        raise InputError(
            f"--out {place.uri} holds files that no export wrote ({place.names()[0]!r}): choose an empty or new --out"
        )
    if (not folder or place.names()) and not overwrite:
        raise InputError(f"--out {place.uri} is there already: choose another --out, or pass --overwrite")


@contextlib.contextmanager
def new_folder(place: Place) -> Iterator[Place]:
    """Give a folder to write to; on a local disk it gets its name once the block has written all of it."""
    if place.remote:
        if place.names():
            place.remove()
        try:
            yield place
        except BaseException:
            if place.names():
                place.remove()
            raise
        return
    final = place.path.rstrip("/")
    temporary, old = (f"{final}.tmp-{uuid.uuid4().hex[:8]}" for _ in range(2))
    os.makedirs(temporary)
    try:
        yield Place(temporary)
        if os.path.exists(final):
            os.rename(final, old)
        os.rename(temporary, final)
    finally:
        for left in (temporary, old):
            if os.path.exists(left):
                shutil.rmtree(left)


def write_ids(place: Place, entries: Sequence[tuple[str, str, int]]) -> None:
    """Write which (file name, id, row) a folder holds, in pick order."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows((*entry, rank) for rank, entry in enumerate(entries))
    place.at(IDS).write(sink.getvalue().encode())


def write_file(place: Place, data: bytes | Path) -> None:
    """Write a file whole, of bytes or of a temporary file."""
    place.write_from(str(data)) if isinstance(data, Path) else place.write(data)
