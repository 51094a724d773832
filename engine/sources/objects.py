"""The `objects` column of the Hugging Face convention, as boxes.

`bbox` is x, y, width, height in px, as in COCO; a set whose boxes are corners must be converted first.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from engine.schema import InputError
from engine.sources.boxes import Drawn, boxes_array
from engine.sources.roles import box_fields, is_text

CROWD_FIELDS = ("iscrowd", "is_crowd", "crowd")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _flat(column: pa.Array, name: str | None) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Return (values an image (n,), all values) of a field of the objects, whichever way they are nested."""
    if _is_list(column.type):
        counts, values = pc.list_value_length(column), pc.struct_field(column.flatten(), name)
    else:
        field = pc.struct_field(column, name)
        counts, values = pc.list_value_length(field), field.flatten()
    return counts.fill_null(0).to_numpy().astype(np.int64), values


def category_names(column: pa.Array) -> pa.Array | None:
    """Return the categories of a batch of objects if they are strings."""
    values = _flat(column, (box_fields(column.type) or ("", ""))[1])[1]
    return values if is_text(values.type) else None


def boxes_of(
    column: pa.Array, sizes: npt.NDArray[np.float64], class_names: tuple[str, ...] | None, where: str
) -> tuple[pa.ListArray, Counter[str]]:
    """Return the boxes of n images' objects, and how many were left out; `sizes` as in `boxes_array`.

    Raises InputError where an object has no category or its bbox is not four numbers.
    """
    box, category = box_fields(column.type) or ("", "")
    counts, corners = _flat(column, box)
    same, labels = _flat(column, category)
    flat = corners.flatten()
    if not np.array_equal(counts, same) or labels.null_count or flat.null_count or len(flat) != 4 * len(corners):
        raise InputError(f"{where}: `objects` must give each bbox four numbers and one {category!r}, and some have not")
    if is_text(labels.type):
        labels = pc.index_in(labels.cast(pa.string()), value_set=pa.array(class_names or (), pa.string()))
    inside = column.type.value_type if _is_list(column.type) else column.type
    crowd = np.zeros(len(labels), dtype=bool)
    flag = next((name for name in CROWD_FIELDS if inside.get_field_index(name) >= 0), None)
    if flag is not None:
        crowd = _flat(column, flag)[1].fill_null(0).to_numpy(zero_copy_only=False).astype(bool)
    drawn = Drawn(
        np.repeat(np.arange(len(column)), counts),
        labels.to_numpy(zero_copy_only=False).astype(np.int64),
        flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, 4),
        crowd,
    )
    return boxes_array(drawn, sizes, column.is_valid().to_numpy(zero_copy_only=False))
