"""Published folders.

A folder is published by its `manifest.json`, written last; before that only the command named in its `run.json`
may go on in it. Published folders are immutable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import pyarrow.fs as pafs

from engine import __version__
from engine.masks import masked
from engine.places import Place
from engine.retry import patiently
from engine.schema import InputError

FORMAT = 1
"""Version of the folder layout; a store of another version is refused by name."""
BOOKKEEPING = ("run.json", "manifest.json", "journal.npz")
"""Files of a folder that are about the run, not what it gave."""
LET_GO = "let_go"
"""What a manifest calls the files that were deleted since: the weights of models that nobody needs any more."""
CHUNK_BYTES = 1 << 22


def to_json(value: Any) -> bytes:
    """Return canonical JSON: sorted keys, tuples as lists, two-space indent, a final newline; no keys of URIs."""
    return (masked(json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False)) + "\n").encode()


def digest_of(value: Any) -> str:
    """Return the sha256 of a JSON-ready value or of bytes, as hex."""
    data = value if isinstance(value, bytes) else to_json(value)
    return hashlib.sha256(data).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that a manifest records."""
    found = {"coresift": __version__}
    for name in ("numpy", "pyarrow", "ray", "torch", "timm"):
        found[name] = metadata.version(name)
    return found


def now() -> str:
    """Return the time in UTC, ISO 8601, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _read_ours(file: Place) -> dict[str, Any] | None:
    """Return a run.json or manifest.json as coresift writes them, or None where there is none or it is another's.

    Raises InputError for one of another format.
    """
    if file.kind() != pafs.FileType.File:
        return None
    try:
        value = json.loads(file.read())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(value, dict) or "kind" not in value:
        return None
    if isinstance(value.get("format", FORMAT), int) and value.get("format", FORMAT) != FORMAT:
        raise InputError(f"{file.uri} has format {value['format']}; this version reads format {FORMAT}")
    return value if {"inputs", "options"} <= value.keys() else None


def read_manifest(place: Place) -> dict[str, Any] | None:
    """Return the manifest of a published folder, or None where there is none."""
    return _read_ours(place.at("manifest.json"))


def read_run(place: Place) -> dict[str, Any] | None:
    """Return whose an unfinished folder is: the identity in its run.json, or None where there is none."""
    return _read_ours(place.at("run.json"))


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """Yield 'name: old -> new' for every leaf in which two identities differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}, key=lambda key: (key != "kind", key)):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield f"{prefix} {json.dumps(old)} -> {json.dumps(new)}"


def _refuse(place: Place, old: dict[str, Any], new: dict[str, Any], state: str) -> InputError:
    changed = list(_differences(old, new))
    shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
    return InputError(f"{place.uri} {state} with other inputs ({shown}): choose another --out, or pass --overwrite")


def check_apart(place: Place, reads: Iterable[str]) -> None:
    """Raise InputError where a place to write is, or holds, something that the command reads."""
    for uri in reads:
        other = Place(uri)
        if other.remote == place.remote and f"{other.path.rstrip('/')}/".startswith(f"{place.path.rstrip('/')}/"):
            raise InputError(f"--out {place.uri} is or holds what this command reads, {uri}: choose another --out")


@dataclass(frozen=True)
class Claim:
    """A folder that one run wants: its identity, and the places that the run reads."""

    place: Place
    identity: dict[str, Any]
    overwrite: bool

    @classmethod
    def of(
        cls,
        place: Place,
        kind: str,
        inputs: dict[str, Any],
        options: dict[str, Any],
        overwrite: bool,
        reads: Iterable[str] = (),
    ) -> Claim:
        """Return a claim on `place`; raises InputError where that is, or holds, something that the run `reads`."""
        check_apart(place, reads)
        return cls(place, json.loads(to_json({"kind": kind, "inputs": inputs, "options": options})), overwrite)

    def published(self) -> dict[str, Any] | None:
        """Return the manifest when exactly this run is published there already; change nothing.

        Raises InputError when the folder holds anything else that may not be overwritten.
        """
        place = self.place
        if place.kind() == pafs.FileType.File:
            raise InputError(f"{place.uri} is a file: choose another --out")
        manifest, begun, names = read_manifest(place), read_run(place), place.names()
        if names and manifest is None and begun is None:
            raise InputError(f"{place.uri} holds files that are not coresift's ({names[0]!r}): choose an empty or new --out")
        if self.overwrite:
            return None
        if manifest is not None:
            found = {key: manifest.get(key) for key in self.identity}
            if found != self.identity:
                raise _refuse(place, found, self.identity, "is published")
            return manifest
        if begun is not None and begun != self.identity:
            raise _refuse(place, begun, self.identity, "was begun")
        return None

    def take(self) -> None:
        """Begin the run: write run.json, emptying the folder first if it is to be overwritten. Call `published` before."""
        if self.overwrite and self.place.names():
            self.place.remove()
        if read_run(self.place) is not None:
            return
        if isinstance(self.place.fs, pafs.LocalFileSystem):
            try:
                os.makedirs(self.place.path, exist_ok=True)
            except (NotADirectoryError, FileExistsError) as error:
                raise InputError(f"{self.place.uri} lies below a file: choose another --out") from error
        self.place.at("run.json").write(to_json(self.identity))


def begin(
    place: Place, kind: str, inputs: dict[str, Any], options: dict[str, Any], overwrite: bool, reads: Iterable[str] = ()
) -> dict[str, Any] | None:
    """Claim a folder and begin, in one: for runs that have nothing to check between."""
    claim = Claim.of(place, kind, inputs, options, overwrite, reads)
    published = claim.published()
    if published is None:
        claim.take()
    return published


def sha256_of(file: Place) -> str:
    """Return the sha256 of a file, as hex; it is never in memory as a whole."""

    def whole() -> str:
        found = hashlib.sha256()
        with file.fs.open_input_stream(file.path) as stream:
            while data := stream.read(CHUNK_BYTES):
                found.update(data)
        return found.hexdigest()

    return patiently(whole, file.uri, file.remote)


def _files_of(place: Place) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of the files that stand in a folder beside its bookkeeping."""
    infos = {name: place.fs.get_file_info(place.at(name).path) for name in place.names() if name not in BOOKKEEPING}
    files = {name: info for name, info in infos.items() if info.type == pafs.FileType.File and ".tmp-" not in name}
    return {name: {"sha256": sha256_of(place.at(name)), "bytes": info.size} for name, info in files.items()}


def publish(place: Place, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder that was begun: its identity, `facts`, its files, versions and the time. Returns it."""
    identity = json.loads(place.at("run.json").read())
    manifest = {"format": FORMAT, **identity, **facts, "files": _files_of(place), "versions": versions(), "published": now()}
    place.at("manifest.json").write(to_json(manifest))
    result: dict[str, Any] = json.loads(to_json(manifest))
    return result


def let_go(place: Place, name: str) -> None:
    """Delete a large file of a published folder, once its manifest says that it was: `let_go` names it, `files` still does."""
    manifest = read_manifest(place)
    assert manifest is not None
    gone = sorted({*manifest.get(LET_GO, ()), name})
    place.at("manifest.json").write(to_json({**manifest, LET_GO: gone}))
    place.fs.delete_file(place.at(name).path)
