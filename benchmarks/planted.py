"""CIFAR-10's training images with near copies of 2,000 of them behind, and where each was taken from.

    python benchmarks/planted.py ../shared/data/cifar10/train.parquet planted.parquet

A third each: saved again as JPEG of quality 30 to 90; cropped to 29 x 29 px (90 %) at a random place; 20 % brighter or darker.
The crops and the brighter or darker ones are PNG. `source` is the row that an image was made from, -1 for the pool's own.
"""

from __future__ import annotations

import io
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

COPIES = 2000
KINDS = ("jpeg", "crop", "brightness")
SIDE_PX, CROP_PX = 32, 29


def copy_of(image: Image.Image, kind: str, rng: np.random.Generator) -> bytes:
    """Return the file of a near copy."""
    sink = io.BytesIO()
    if kind == "jpeg":
        image.save(sink, "JPEG", quality=int(rng.integers(30, 91)))
    elif kind == "crop":
        left, top = rng.integers(0, SIDE_PX - CROP_PX + 1, 2)
        image.crop((left, top, left + CROP_PX, top + CROP_PX)).save(sink, "PNG")
    else:
        ImageEnhance.Brightness(image).enhance(float(rng.choice([0.8, 1.2]))).save(sink, "PNG")
    return sink.getvalue()


def main(train: str, out: str, seed: int = 0, copies: int = COPIES) -> None:
    """Write the pool."""
    table, rng = pq.read_table(train), np.random.default_rng(seed)
    rows = rng.choice(len(table), copies, replace=False)
    made = []
    for number, row in enumerate(rows.tolist()):
        image = Image.open(io.BytesIO(table["image"][row]["bytes"].as_py())).convert("RGB")
        made.append({"bytes": copy_of(image, KINDS[number % 3], rng), "path": f"copy_{number:05d}.{KINDS[number % 3]}"})
    images = table["image"].combine_chunks()
    images = pa.concat_arrays([images, pa.array(made, images.type)])
    source = np.concatenate([np.full(len(table), -1), rows])
    kind = [None] * len(table) + [KINDS[number % 3] for number in range(copies)]
    pq.write_table(pa.table({"image": images, "source": source, "kind": kind}), out, row_group_size=2000)


if __name__ == "__main__":
    main(*sys.argv[1:3])
