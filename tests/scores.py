"""Feature stores of one number for each image, as the scoring encoders write them."""

import numpy as np
import pyarrow as pa

from engine.folders import begin
from engine.places import Place
from engine.store import part_bytes, part_name, publish_features, vectors_array


def write_scores(folder, encoder, values, column="influence", block_rows=64):
    """Publish scores (n,), a part a block, as an encoder of that name would; return the folder."""
    place, parts = Place(str(folder)), []
    begin(place, "features", {}, {}, overwrite=False)
    for start in range(0, len(values), block_rows):
        mine = np.asarray(values[start : start + block_rows], dtype=np.float32)[:, None]
        rows = np.arange(start, start + len(mine))
        label = pa.nulls(len(rows), pa.int64())
        table = pa.table({"row": rows, "id": rows.astype(str), "label": label, column: vectors_array(mine)})
        data = part_bytes(table)
        place.at("parts", part_name(start)).write(data)
        facts = {"start": start, "stop": start + len(mine), "num_vectors": len(mine), "num_labeled": 0, "num_rejected": 0}
        parts.append({"name": part_name(start), **facts, "sha256": str(start), "bytes": data.size})
    facts = {"num_rows": len(values), "dim": 1, "column": column, "class_names": None, "block_rows": block_rows}
    publish_features(place, parts, {**facts, "encoder": {"name": encoder}})
    return place.uri
