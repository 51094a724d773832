"""Boxes of objects in an image: one column, whatever annotated them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

BOX = pa.struct(
    [
        ("label", pa.int64()),
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("width", pa.float32()),
        ("height", pa.float32()),
        ("crowd", pa.bool_()),
    ]
)
BOXES = pa.field("boxes", pa.list_(BOX))
"""x, y: px from the image's top left corner as stored; labels are indices into the pool's class names.

An image without boxes has an empty list, an image that was not annotated null."""

LEFT_OUT = ("outside", "no area")


@dataclass(frozen=True)
class Drawn:
    """m boxes as they were drawn: owner (m,) the image of each, label (m,), xywh (m, 4) in px, crowd (m,)."""

    owner: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    xywh: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]


def boxes_array(
    drawn: Drawn, sizes: npt.NDArray[np.float64], annotated: npt.NDArray[np.bool_] | None = None
) -> tuple[pa.ListArray, Counter[str]]:
    """Return n images' boxes as one column, and how many were left out, by reason.

    `sizes` (n, 2) are the images' width and height in px, NaN where unknown: there nothing is clipped. Elsewhere boxes
    are clipped to their image, and left out where they don't overlap it; boxes without area are left out everywhere.
    Images that are not `annotated` (n,) have null.
    """
    n = len(sizes)
    x, y, width, height = drawn.xywh.T
    empty = ~((width > 0) & (height > 0))  # so that NaN is no area, too
    limit_x, limit_y = np.where(np.isnan(sizes), np.inf, sizes)[drawn.owner].T
    unclipped = np.isinf(limit_x) | np.isinf(limit_y)
    low_x, low_y = (np.where(unclipped, corner, np.maximum(corner, 0)) for corner in (x, y))
    wide = np.where(unclipped, width, np.minimum(x + width, limit_x) - low_x)
    high = np.where(unclipped, height, np.minimum(y + height, limit_y) - low_y)
    outside = ~empty & ~((wide > 0) & (high > 0))
    at = np.flatnonzero(~empty & ~outside)
    at = at[np.argsort(drawn.owner[at], kind="stable")]
    # a side that is not clipped stays what it was to the last bit
    wide = np.where((low_x == x) & (wide <= width) & (x + width <= limit_x), width, wide)
    high = np.where((low_y == y) & (high <= height) & (y + height <= limit_y), height, high)
    fields = [pa.array(drawn.label[at], pa.int64())]
    fields += [pa.array(side[at].astype(np.float32)) for side in (low_x, low_y, wide, high)]
    fields.append(pa.array(drawn.crowd[at]))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(drawn.owner[at], minlength=n))]).astype(np.int32)
    mask = None if annotated is None or annotated.all() else pa.array(~annotated)
    values = pa.StructArray.from_arrays(fields, fields=list(BOX))
    column = pa.ListArray.from_arrays(pa.array(offsets), values, type=BOXES.type, mask=mask)
    return column, Counter({"outside": int(outside.sum()), "no area": int(empty.sum())})
