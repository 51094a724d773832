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


def listed(source: Path, rows: int, target: Path, tail: float = 1.0) -> str:
    """Write the first rows as files, and a list of them, `path label` a line, as ImageNet-LT has it; return the list.

    At most rows / 10 of the first class, and of each other class `tail` times as many as of the one before it.
    """
    lines, kept = list[str](), np.zeros(10, dtype=int)
    folder = target.parent / target.stem
    folder.mkdir()
    for row in next(pq.ParquetFile(source).iter_batches(rows)).to_pylist():
        label = row["label"]
        if kept[label] < rows / 10 * tail**label:
            kept[label] += 1
            (folder / row["image"]["path"]).write_bytes(row["image"]["bytes"])
            lines.append(f"{folder.name}/{row['image']['path']} {label}\n")
    target.write_text("".join(lines))
    return str(target)
