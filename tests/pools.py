"""Small pools on disk, and what is read back from them."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine.schema import InputError
from engine.sources import ids_of, open_pool, read, read_rows

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value):
    """A 2 x 2 grey PNG of one value: enough to tell which image it is."""
    buffer = io.BytesIO()
    Image.new("L", (2, 2), value).save(buffer, format="PNG")
    return buffer.getvalue()


def value_of(sample):
    return Image.open(io.BytesIO(sample.data)).getpixel((0, 0))


def everything(pool):
    """Every sample of a pool; some of its rows, and its ids alone, must be the same."""
    samples = list(read(pool, 0, pool.num_rows))
    for rows in (np.arange(0, pool.num_rows, 2), np.array([0, pool.num_rows - 1])[: pool.num_rows]):
        assert list(read_rows(pool, rows)) == [samples[row] for row in rows]
    ids = [name for batch in ids_of(pool) for name in batch.to_pylist()]
    assert ids == [sample.id for sample in samples]
    return samples


def make_folder(folder, names):
    """Write PNGs under these names; the n-th has grey value n."""
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(value))
    return folder


def refused(uri, *words, columns=None):
    with pytest.raises(InputError) as caught:
        open_pool(str(uri), columns)
    for word in words:
        assert str(word) in str(caught.value)


def images_column(values, paths=None):
    paths = paths or [f"img_{value}.png" for value in values]
    return pa.array([{"bytes": png(v), "path": path} for v, path in zip(values, paths, strict=True)], IMAGE)


def write(file, columns, group=100, metadata=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, file, row_group_size=group)
    return file
