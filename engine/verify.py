"""Is what a folder holds still what was published there? Sizes and sha256 of every file, against the manifests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from engine.folders import LET_GO, read_manifest, read_run, sha256_of
from engine.places import Place
from engine.schema import InputError, Progress, no_progress

THREADS = 8


@dataclass(frozen=True)
class Wanted:
    """One file that a manifest names, as it was written."""

    name: str
    place: Place
    sha256: str
    size: int

    def problem(self) -> str | None:
        """Return what is wrong with the file, or None."""
        info = self.place.fs.get_file_info(self.place.path)
        if info.type != pafs.FileType.File:
            return "is missing"
        if info.size != self.size:
            return f"has {info.size:,} bytes, {self.size:,} were written"
        found = sha256_of(self.place)
        return None if found == self.sha256 else f"has sha256 {found[:12]}..., {self.sha256[:12]}... was written"


def _wanted(place: Place, manifest: dict[str, Any], below: str) -> Iterator[Wanted]:
    """Yield the files that a manifest names, but for those that it says were let go; `below` is the path of its folder
    below the one asked for.
    """
    for name, entry in manifest.get("files", {}).items():
        if name in manifest.get(LET_GO, ()):
            continue
        yield Wanted(below + name, place.at(name), entry["sha256"], entry["bytes"])
    for part in manifest.get("parts", ()):
        yield Wanted(f"{below}parts/{part['name']}", place.at("parts", part["name"]), part["sha256"], part["bytes"])


def _folders(place: Place) -> Iterator[tuple[str, Place]]:
    """Yield (path below, place) of every published folder at or below a place."""
    base = place.path.rstrip("/") + "/"
    infos = place.fs.get_file_info(pafs.FileSelector(place.path, recursive=True))
    for path in sorted(info.path[len(base) :] for info in infos):
        *folders, name = path.split("/")
        if name == "manifest.json":
            yield "".join(f"{folder}/" for folder in folders), place.at(*folders) if folders else place


def verify(path: str, progress: Progress = no_progress) -> dict[str, Any]:
    """Check every file of the published folders at and below `path`; return counts and what is `bad`, ready for JSON.

    Each bad file is a dict of `file`, its path below `path`, and `problem`. Raises InputError where nothing is published.
    """
    top = Place(path)
    if not top.exists():
        raise InputError(f"{path} does not exist")
    manifests = []
    if top.kind() == pafs.FileType.Directory:
        manifests = [(below, place, read_manifest(place)) for below, place in _folders(top)]
    files = [file for below, place, manifest in manifests if manifest for file in _wanted(place, manifest, below)]
    if not any(manifest for _, _, manifest in manifests):
        unfinished = top.kind() == pafs.FileType.Directory and read_run(top) is not None
        why = "is unfinished: run the command that began it again" if unfinished else "holds no folder that coresift published"
        raise InputError(f"{path} {why}; there is nothing to verify")
    bad = []
    with ThreadPoolExecutor(THREADS) as pool:
        for done, (file, problem) in enumerate(zip(files, pool.map(Wanted.problem, files), strict=True), start=1):
            progress("verify", done, len(files), "")
            if problem:
                bad.append({"file": file.name, "problem": problem})
    folders = sum(manifest is not None for _, _, manifest in manifests)
    return {"path": path, "num_folders": folders, "num_files": len(files), "bytes": sum(f.size for f in files), "bad": bad}
