"""Places on any filesystem that pyarrow or fsspec opens: a folder or a file, and how it is read and written whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from engine.masks import MAY_HAVE_KEYS, masked
from engine.retry import WEB, patiently
from engine.schema import InputError

PYARROW_SCHEMES = frozenset(("file", "s3", "gs", "gcs", "hdfs", "viewfs"))
"""What pyarrow opens by itself; its errors are about the address, not about what it knows."""


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


def masked_column(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return a column of URIs or paths without the keys in them: itself where it has none."""
    texts = column.cast(pa.string())
    if not pc.any(pc.match_substring_regex(texts, MAY_HAVE_KEYS)).as_py():
        return column
    return pa.array([None if text is None else masked(text) for text in texts.to_pylist()], pa.string())


@dataclass(frozen=True)
class Place:
    """A folder or file on some filesystem; `address` is how the user named it, with any keys: for opening it alone."""

    address: str

    @cached_property
    def uri(self) -> str:
        """Its name for people and files, without keys."""
        return masked(self.address)

    def __repr__(self) -> str:
        return f"Place({self.uri!r})"

    @cached_property
    def opened(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem, and the path on it."""
        return open_filesystem(self.address)

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
        """The address under which a worker with another working directory finds this place."""
        return self.path if isinstance(self.fs, pafs.LocalFileSystem) else self.address

    @property
    def remote(self) -> bool:
        """Whether this is on an object store, which may be away for a while."""
        return not isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def _split(self) -> tuple[str, str]:
        """The address before the `?`, and from there on; a web address's query, and a local path's `?`, belong to the name."""
        scheme, mark, _ = self.address.partition("://")
        if not mark or scheme in WEB:
            return self.address, ""
        head, mark, query = self.address.partition("?")
        return head, mark + query

    def address_of(self, *names: str) -> str:
        """Return the address below this one, without opening anything; names are names of files.

        What follows the `?` of a URI (endpoint_override, scheme, region) stays at its end.
        """
        if "://" not in self.address:
            return "/".join([self.address.rstrip("/"), *names])
        head, rest = self._split
        return "/".join([head.rstrip("/"), *(quote(name) for name in names)]) + rest

    def at(self, *names: str) -> Place:
        """Return the place below this one; names are names of files, whatever characters they hold.

        Below a URI it shares this one's filesystem: an object store's client is slow to make.
        """
        below = Place(self.address_of(*names))
        if "://" in self.address:
            on_web = self.address.split("://")[0] in WEB
            parts = [quote(name) if on_web else name for name in names]
            below.__dict__["opened"] = self.fs, "/".join([self.path.rstrip("/"), *parts])
        return below

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

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
