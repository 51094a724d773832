"""Labels as they are written -> classes: codes (n,) int64, -1 for none, and the names that they mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from engine.arrays import Ints
from engine.schema import InputError, nearest
from engine.sources.roles import is_text, plain


def _not_among(uri: str, name: str, known: Sequence[str]) -> InputError:
    shown = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
    return InputError(f"{uri} has class {name!r}{nearest(name, known)}; it is not among those known: {shown}")


def check_range(uri: str, codes: Ints, class_names: Sequence[str] | None) -> None:
    """Raise InputError for a code that is no class's."""
    most = len(class_names) if class_names else np.iinfo(np.int64).max
    bad = codes[(codes < -1) | (codes >= most)]
    if len(bad):
        allowed = f"0 to {most - 1}" if class_names else "0 on"
        raise InputError(f"{uri} has label {bad[0]}; classes are numbered from {allowed} (-1 for none)")


def _of_text(text: pa.Array, class_names: Sequence[str] | None, uri: str) -> tuple[Ints, Sequence[str] | None]:
    """Return codes and what they mean: names of classes, or numbers written out where these are no names."""
    values = text.to_pylist()
    given = sorted({value for value in values if value})
    if all(value.removeprefix("-").isdecimal() for value in given) and not (class_names and set(given) <= set(class_names)):
        return np.array([int(value) if value else -1 for value in values], dtype=np.int64), class_names
    names = tuple(class_names) if class_names else tuple(given)
    strange = next((value for value in given if value not in names), None)
    if strange is not None:
        raise _not_among(uri, strange, names)
    code = {name: at for at, name in enumerate(names)}
    return np.array([code[value] if value else -1 for value in values], dtype=np.int64), names


def codes_of(
    uri: str, column: pa.Array, named: Sequence[str] | None, class_names: Sequence[str] | None
) -> tuple[Ints, Sequence[str] | None]:
    """Return a label column as codes, -1 for none, and what they mean; `named` are the names that the column has itself."""
    kind = plain(column.type)
    column = column.cast(kind) if pa.types.is_dictionary(column.type) else column
    if is_text(kind):
        codes, names = _of_text(column.cast(pa.string()), class_names, uri)
    elif pa.types.is_integer(kind):
        codes, names = np.asarray(column.fill_null(-1).cast(pa.int64()).to_numpy(), dtype=np.int64), named or class_names
        check_range(uri, codes, names)
        if named and class_names and tuple(class_names) != tuple(named):
            texts = [named[code] if code >= 0 else None for code in codes.tolist()]
            codes, names = _of_text(pa.array(texts, pa.string()), class_names, uri)
    else:
        raise InputError(f"{uri}: labels are {kind}; they must be whole numbers or text")
    check_range(uri, codes, names)
    return codes, names


def renamed(boxes: pa.ListArray, names: Sequence[str], wanted: Sequence[str], uri: str) -> pa.ListArray:
    """Return boxes with labels that are indices into `wanted`; raises InputError for a box of a class not among them."""
    values = boxes.values
    theirs = values.field("label").to_numpy()
    codes = np.array([list(wanted).index(name) if name in wanted else -1 for name in names], dtype=np.int64)
    strange = np.flatnonzero(codes[theirs] < 0)
    if len(strange):
        raise _not_among(uri, names[theirs[strange[0]]], wanted)
    fields = [pa.array(codes[theirs], pa.int64()), *(values.field(i) for i in range(1, values.type.num_fields))]
    inside = pa.StructArray.from_arrays(fields, fields=list(values.type))
    return pa.ListArray.from_arrays(boxes.offsets, inside, type=boxes.type, mask=boxes.is_null())
