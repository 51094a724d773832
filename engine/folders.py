"""Places on any pyarrow filesystem, and folders that are published there.

A folder is published by its `manifest.json`, written last; before that only the command named in its `run.json`
may go on in it. Published folders are immutable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs as pafs

from engine import __version__
from engine.retry import patiently
from engine.schema import InputError

FORMAT = 1


"""Version of the folder layout; a store of another version is refused by name."""
BOOKKEEPING = ("run.json", "manifest.json", "journal.npz")
"""Files of a folder that are about the run, not what it gave."""
CHUNK_BYTES = 1 << 22
PYARROW_SCHEMES = frozenset(("file", "s3", "gs", "gcs", "hdfs", "viewfs"))
"""What pyarrow opens by itself; its errors are about the address, not about what it knows."""
WEB = ("http", "https")


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return (filesystem, path) for a local path, any URI that pyarrow knows (s3://, gs://), or one that fsspec does.

    Raises InputError where neither knows it, or its driver is not installed.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        if uri.split("://")[0] in PYARROW_SCHEMES:
            raise InputError(f"cannot open {uri!r}: {error}") from error
        return _open_fsspec(uri)
    return filesystem, path


def _open_fsspec(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return (filesystem, path) of a URI by fsspec's driver for its protocol (az://, abfs://, http://, hf://, ...).

    Names are percent-encoded in a URI, as pyarrow has it; a web address is passed on as it stands.
    """
    import fsspec

    protocol = uri.split("://")[0]
    try:
        driver = fsspec.filesystem(protocol)
    except ImportError as error:
        raise InputError(f"cannot open {uri!r}: the driver for {protocol}:// is missing ({error})") from error
    except ValueError as error:
        known = ", ".join(sorted({*PYARROW_SCHEMES, *fsspec.available_protocols()}))
        raise InputError(f"cannot open {uri!r}: {protocol}:// is none of the known filesystems ({known})") from error
    path = uri if protocol in WEB else driver._strip_protocol(unquote(uri))
    return pafs.PyFileSystem(pafs.FSSpecHandler(driver)), path


def _read_fsspec(fs: pafs.PyFileSystem, path: str) -> bytes:
    """Return a file in one request; drivers raise errors of their own libraries, which become OSError here."""
    try:
        return bytes(fs.handler.fs.cat_file(path))
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Place:
    """A folder or file on some filesystem; `uri` is how the user named it."""

    uri: str

    @cached_property
    def opened(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem, and the path on it."""
        return open_filesystem(self.uri)

    @property
    def fs(self) -> pafs.FileSystem:
        """The filesystem this place is on."""
        return self.opened[0]

    @property
    def path(self) -> str:
        """The path on that filesystem."""
        return self.opened[1]

    @property
    def absolute(self) -> str:
        """The name under which a worker with another working directory finds this place."""
        return self.path if isinstance(self.fs, pafs.LocalFileSystem) else self.uri

    @property
    def remote(self) -> bool:
        """Whether this is on an object store, which may be away for a while."""
        return not isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def _split(self) -> tuple[str, str]:
        """The URI before the `?`, and from there on; a web address's query, and a local path's `?`, belong to the name."""
        scheme, mark, _ = self.uri.partition("://")
        if not mark or scheme in WEB:
            return self.uri, ""
        head, mark, query = self.uri.partition("?")
        return head, mark + query

    def at(self, *names: str) -> Place:
        """Return the place below this one; names are names of files, whatever characters they hold.

        Below a URI it shares this one's filesystem: an object store's client is slow to make. What follows the `?` of a
        URI (endpoint_override, scheme, region) stays at its end.
        """
        if "://" not in self.uri:
            return Place("/".join([self.uri.rstrip("/"), *names]))
        on_web = self.uri.split("://")[0] in WEB
        quoted = [quote(name) for name in names]
        head, rest = self._split
        below = Place("/".join([head.rstrip("/"), *quoted]) + rest)
        below.__dict__["opened"] = self.fs, "/".join([self.path.rstrip("/"), *(quoted if on_web else names)])
        return below

    @property
    def folder(self) -> Place:
        """The folder that this is in."""
        head, rest = self._split
        return Place(head.rstrip("/").rpartition("/")[0] + rest)

    def kind(self) -> pafs.FileType:
        """Return whether this is a file, a folder or nothing."""
        return patiently(lambda: self.fs.get_file_info(self.path).type, self.uri, self.remote)

    def exists(self) -> bool:
        """Return whether there is a file or folder here."""
        return bool(self.kind() != pafs.FileType.NotFound)

    def names(self) -> list[str]:
        """Return the names directly inside this folder, sorted; empty where there is no folder."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        if self.kind() == pafs.FileType.File:
            return []
        if isinstance(self.fs, pafs.LocalFileSystem):
            return sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []
        return sorted(info.base_name for info in patiently(lambda: self.fs.get_file_info(selector), self.uri, True))

    def read(self) -> bytes:
        """Return the whole file; an object store that is away for a while is tried again. Raises OSError where it fails."""

        def whole() -> bytes:
            if isinstance(self.fs, pafs.PyFileSystem):
                return _read_fsspec(self.fs, self.path)
            with self.fs.open_input_stream(self.path) as stream:
                return bytes(stream.read())

        return patiently(whole, self.uri, self.remote)

    def write(self, data: bytes | pa.Buffer) -> None:
        """Write a whole file so that it appears complete or not at all.

        On a local disk a temporary name is renamed; an object store publishes a single put when it is closed, and is tried
        again where it is away for a while.
        """
        if self.remote:
            patiently(lambda: self._put(data), self.uri, True)
            return
        with self._whole() as temporary, open(temporary, "wb") as file:
            file.write(data)

    def write_from(self, file: str) -> None:
        """Write a copy of a local file, in a stream, so that on a local disk it appears complete or not at all."""
        local = pafs.LocalFileSystem()
        if self.remote:
            given = {"source_filesystem": local, "destination_filesystem": self.fs}
            patiently(lambda: pafs.copy_files(file, self.path, **given), self.uri, True)
            return
        with self._whole() as temporary:
            shutil.copyfile(file, temporary)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[str]:
        """Give a temporary name beside this local file, and this one's once the block has written it whole."""
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        temporary = f"{self.path}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            yield temporary
            os.replace(temporary, self.path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def _put(self, data: bytes | pa.Buffer) -> None:
        with self.fs.open_output_stream(self.path) as stream:
            stream.write(data)

    def remove(self) -> None:
        """Delete this folder and everything in it."""
        self.fs.delete_dir(self.path)


def to_json(value: Any) -> bytes:
    """Return canonical JSON: sorted keys, tuples as lists, two-space indent, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


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
        for uri in reads:
            other = Place(uri)
            if other.remote == place.remote and f"{other.path.rstrip('/')}/".startswith(f"{place.path.rstrip('/')}/"):
                raise InputError(f"--out {place.uri} is or holds what this command reads, {uri}: choose another --out")
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
    found = hashlib.sha256()
    with file.fs.open_input_stream(file.path) as stream:
        while data := stream.read(CHUNK_BYTES):
            found.update(data)
    return found.hexdigest()


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
