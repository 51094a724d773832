"""What a folder of ours, or a pool, holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.folders import read_manifest, read_run
from engine.places import Place
from engine.schema import InputError
from engine.sources import open_pool
from engine.store import FeatureStore, part_rows

SHOWN = {
    "features": (
        "num_rows",
        "num_vectors",
        "num_detections",
        "num_rejected",
        "num_labeled",
        "dim",
        "dtype",
        "block_rows",
        "encoder",
        "pool",
    ),
    "selection": ("features", "num_rows", "num_picks", "num_labeled", "num_excluded", "objective", "options"),
    "dedup": ("features", "by", "against", "num_rows", "num_vectors", "num_clusters", "num_excluded", "num_kept", "options"),
    "metrics": ("metrics",),
    "assessment": ("num_picks", "num_labeled", "figures", "knee", "warnings", "sample", "options"),
    "comparison": ("num_cells", "options"),
    "curves": ("metric", "baseline", "saved", "num_runs"),
    "images": ("num_images", "class_names"),
    "checkpoint": ("model", "metrics", "steps", "epochs", "num_images", "num_held_out", "let_go"),
    "head": ("metrics", "num_images", "num_classes", "let_go"),
    "round": ("round", "labeled", "trained", "metrics", "seconds", "num_labels_unused", "let_go"),
    "rounds": ("strategy", "seed", "start", "add", "rounds", "criterion", "table"),
}
"""What is told of each kind of folder, beside its state, digest, versions and times."""


def _label_balance(store: FeatureStore) -> dict[str, int]:
    """Return the number of images of each class, by name where the store has names."""
    labels, counts = np.unique(store.labels[store.labels >= 0], return_counts=True)
    names = store.class_names or []
    return {names[i] if i < len(names) else str(i): int(n) for i, n in zip(labels.tolist(), counts, strict=True)}


def _unfinished(place: Place, begun: dict[str, Any]) -> dict[str, Any]:
    parts = [name for name in place.at("parts").names() if name.endswith(".arrow")]
    facts: dict[str, Any] = {"kind": begun["kind"], "state": "unfinished", "options": begun["options"]}
    if begun["kind"] == "features":
        facts["parts_done"] = len(parts)
        num_rows = begun["inputs"].get("pool", {}).get("num_rows")
        if num_rows is not None:
            facts["num_rows"], facts["parts_missing"] = num_rows, -(-num_rows // part_rows(num_rows)) - len(parts)
    if begun["kind"] == "rounds":
        facts["rounds_done"] = sum(
            read_manifest(place.at(name)) is not None for name in place.names() if name.startswith("round-")
        )
    return facts


def _stores(place: Place) -> dict[str, dict[str, Any]]:
    """Return what is known of the feature stores right below a folder, by name: several encoders write one each."""
    found: dict[str, dict[str, Any]] = {}
    for name in place.names():
        manifest, begun = read_manifest(place.at(name)), read_run(place.at(name))
        if manifest is not None and manifest["kind"] == "features":
            found[name] = {"state": "published", **{key: manifest[key] for key in ("num_rows", "num_vectors", "dim")}}
        elif manifest is None and begun is not None and begun["kind"] == "features":
            unfinished = _unfinished(place.at(name), begun)
            found[name] = {key: value for key, value in unfinished.items() if key not in ("kind", "options")}
    return found


def _pool(uri: str) -> dict[str, Any]:
    pool = open_pool(uri)
    classes = list(pool.class_names) if pool.class_names else None
    columns = {field.name: str(field.type) for field in pool.schema}
    facts = {"kind": "pool", "source": pool.kind, "num_rows": pool.num_rows, "class_names": classes, "columns": columns}
    return {**facts, **pool.left_out, "digest": pool.digest}


def describe(path: str) -> dict[str, Any]:
    """Return facts about a folder that coresift wrote (finished or not) or a pool of images, ready for JSON.

    Raises InputError when it is neither.
    """
    place = Place(path)
    manifest = read_manifest(place)
    if manifest is None:
        begun = read_run(place)
        if begun is not None:
            return {"path": path, **_unfinished(place, begun)}
        if not place.exists():
            raise InputError(f"{path} does not exist")
        stores = _stores(place)
        if stores:
            return {"path": path, "kind": "feature stores", "stores": stores}
        return {"path": path, **_pool(path)}
    shown = {key: manifest[key] for key in SHOWN[manifest["kind"]] if key in manifest}
    facts = {"path": path, "kind": manifest["kind"], "state": "published", **shown}
    if manifest["kind"] == "features":
        store = FeatureStore(path)
        facts["num_parts"] = len(manifest["parts"])
        facts["columns"] = {field.name: str(field.type) for field in store.schema}
        facts["label_balance"] = _label_balance(store)
    kept: dict[str, Any] = {key: manifest[key] for key in ("digest", "published", "time", "versions") if key in manifest}
    return {**facts, **kept}
