"""Feature stores with columns of any kind beside the vectors, as a pool's metadata comes into them."""

import numpy as np
import pyarrow as pa

from engine.folders import begin
from engine.places import Place
from engine.store import part_bytes, part_name, publish_features, vectors_array


def write_store(folder, x, columns, block_rows=64, class_names=None, rows=None):
    """Publish vectors (n, d) with columns, a part a block; pool rows are 0..n-1 unless said; return the folder."""
    place, parts = Place(str(folder)), []
    begin(place, "features", {}, {}, overwrite=False)
    rows = np.arange(len(x)) if rows is None else rows
    label = columns.get("label", pa.nulls(len(x), pa.int64()))
    names = columns.get("id", [f"i{row}" for row in rows])
    rest = {name: values for name, values in columns.items() if name not in ("label", "id")}
    table = pa.table({"row": rows, "id": names, "label": label, **rest, "embedding": vectors_array(x)})
    for start in range(0, int(rows[-1]) + 1, block_rows):
        mine = table.slice(*(np.searchsorted(rows, start), np.diff(np.searchsorted(rows, [start, start + block_rows]))[0]))
        data = part_bytes(mine)
        place.at("parts", part_name(start)).write(data)
        facts = {"start": start, "stop": start + block_rows, "num_vectors": len(mine), "num_rejected": 0}
        known = len(mine) - mine["label"].null_count
        parts.append({"name": part_name(start), **facts, "num_labeled": known, "sha256": str(start), "bytes": data.size})
    facts = {"num_rows": int(rows[-1]) + 1, "dim": x.shape[1], "column": "embedding", "class_names": class_names}
    publish_features(place, parts, {**facts, "block_rows": block_rows, "encoder": {"name": "embedding"}})
    return place.uri
