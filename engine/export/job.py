"""What every format gets: the images, in pick order, and what is known of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.export.entries import Entry
from engine.export.guesses import Guesses
from engine.export.wanted import Wanted
from engine.schema import InputError

Files = dict[str, bytes | Path]
"""What a format writes: names below the export's folder, or '' for the one file that it is; bytes, or a temporary file."""


@dataclass(frozen=True)
class Job:
    """One export: `entries` can be gone through once; `copies` says that images are copied; `scratch` is for files in work."""

    wanted: Wanted
    entries: Iterable[Entry]
    guesses: Guesses | None
    copies: bool
    scratch: Path

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The pool's classes, where they have names."""
        return self.wanted.pool.class_names if self.wanted.pool is not None else None

    def class_name(self, label: int) -> str:
        """Return what a label of the pool means; its number where nothing names it."""
        names = self.class_names
        return names[label] if names and 0 <= label < len(names) else str(label)


def as_json(value: Any, indent: int | None = None) -> bytes:
    """Return JSON as other tools read it."""
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()


def relative(entry: Entry, tool: str) -> str:
    """Return where an image is below the folder or bucket that a tool knows; raises InputError where it is elsewhere."""
    if "://" in entry.uri or entry.uri.startswith("/"):
        raise InputError(
            f"{tool} finds images by their names below one folder or bucket, and {entry.id!r} is at {entry.uri}: say what "
            "comes before those names with --uri-prefix, as in s3://bucket/= or /data/images/="
        )
    return entry.uri
