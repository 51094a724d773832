"""A selection as it is published."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from engine.arrays import Ints
from engine.folders import digest_of, publish
from engine.former import LABELED_IDS
from engine.places import Place
from engine.shards import Step
from engine.store import FeatureStore, table_bytes


def write_selection(place: Place, store: FeatureStore, step: Step, labeled: Ints, facts: dict[str, Any]) -> dict[str, Any]:
    """Publish a selection folder: picks.parquet, ids.txt, indices.json, labeled.json, labeled_ids.txt, manifest.json."""
    ids = store.ids(step.picks)
    table = pa.table(
        {
            "rank": pa.array(range(len(ids)), pa.int64()),
            "id": pa.array(ids, pa.string()),
            "row": pa.array(step.picks, pa.int64()),
            "gain": pa.array(step.gains, pa.float64(), from_pandas=True),
            **{name: pa.array(values) for name, values in step.columns.items()},
        }
    )
    data = table_bytes(table)
    place.at("picks.parquet").write(data)
    place.at("ids.txt").write("".join(f"{name}\n" for name in ids).encode())
    place.at("indices.json").write(json.dumps(step.picks.tolist()).encode())
    place.at("labeled.json").write(json.dumps(labeled.tolist()).encode())
    place.at(LABELED_IDS).write("".join(f"{name}\n" for name in store.ids(labeled)).encode())
    return publish(
        place,
        {
            "features": store.place.uri,
            "num_rows": store.num_rows,
            "num_picks": len(ids),
            "num_labeled": len(labeled),
            "objective": step.objective,
            "digest": digest_of(data.to_pybytes()),
            **facts,
        },
    )


def prefix(step: Step, count: int) -> Step:
    """Return the first `count` picks of a nested method's last step."""
    columns = {name: values[:count] for name, values in step.columns.items()}
    objective = step.objective if count == len(step.picks) else None
    return Step(step.number, step.total, step.picks[:count], step.gains[:count], step.note, objective, columns)
