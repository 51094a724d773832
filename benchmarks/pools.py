"""Small pools cut out of the shared data (data/README.md there), for what runs whole jobs on real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def cut(source: Path, rows: int, target: Path) -> str:
    """Write the first rows of a Parquet file of images, whose order is a random one; return the new file."""
    table = next(pq.ParquetFile(source).iter_batches(rows))
    pq.write_table(pa.Table.from_batches([table]), target)
    return str(target)


def long_tailed(source: Path, rows: int, target: Path) -> str:
    """Write the first rows as files, each class 0.7 times as often as the one before it, and a list of them.

    Returns the list, `path label` a line, as ImageNet-LT has it; the files lie beside it.
    """
    lines, kept = list[str](), np.zeros(10, dtype=int)
    folder = target.parent / target.stem
    folder.mkdir()
    for row in next(pq.ParquetFile(source).iter_batches(rows)).to_pylist():
        label = row["label"]
        if kept[label] < rows / 20 * 0.7**label:
            kept[label] += 1
            (folder / row["image"]["path"]).write_bytes(row["image"]["bytes"])
            lines.append(f"{folder.name}/{row['image']['path']} {label}\n")
    target.write_text("".join(lines))
    return str(target)
