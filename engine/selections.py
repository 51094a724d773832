"""What was selected, as it lies on disk: selection folders, lists of ids, lists of pool rows."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.arrays import Ints
from engine.folders import read_manifest
from engine.places import Place
from engine.schema import InputError, first_line


@dataclass(frozen=True)
class Selection:
    """A published selection: its manifest, its picks in pick order, and the rows that were labelled before it."""

    manifest: dict[str, Any]
    picks: Ints
    labeled: Ints


def open_selection(uri: str) -> Selection:
    """Open a selection folder; raises InputError if it is not one, and lists those below it if it holds some."""
    place = Place(uri)
    manifest = read_manifest(place)
    if manifest is None or manifest["kind"] != "selection":
        below = [name for name in place.names() if read_manifest(place.at(name))] if manifest is None else []
        hint = (
            f"it holds one for each budget: {', '.join(place.at(name).uri for name in below[:4])}"
            if below
            else ("make one with `coresift select`")
        )
        raise InputError(f"{uri} is not a finished selection folder: {hint}")
    picks, labeled = (json.loads(place.at(name).read()) for name in ("indices.json", "labeled.json"))
    return Selection(manifest, np.array(picks, dtype=np.int64), np.array(labeled, dtype=np.int64))


def ids_in(file: Place) -> list[str]:
    """Return the ids of a .txt file, one a line; empty lines are none."""
    return [line for line in file.read().decode().splitlines() if line]


def rows_in(file: Place, what: str) -> Ints:
    """Return the pool rows of a .json or .npy file, in its order; raises InputError where `what` holds none."""
    data = file.read()
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False) if file.path.endswith(".npy") else np.array(json.loads(data))
    except (ValueError, EOFError) as error:
        raise InputError(f"{what} cannot be read: {first_line(error)}") from error
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise InputError(f"{what} must hold a flat list of pool rows")
    return np.asarray(values, dtype=np.int64)
