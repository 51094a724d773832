"""Reduce feature stores by PCA to fewer dimensions, the widths that papers use, and normalise them again.

    python benchmarks/reduce_features.py TRAIN TEST --out DIR [--dim 384]

Fitted on the first store, applied to all; writes DIR/<name of the store> for each. Vectors are L2-normalised before and
after. Prints the share of the variance that is kept.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from data import load
from sklearn.decomposition import PCA

from engine.ingest import import_features
from engine.store import FeatureStore
from engine.verbs import ImportOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dim", type=int, default=384)
    options = parser.parse_args()
    pca: PCA | None = None
    for uri in options.features:
        x, _ = load(uri)
        if pca is None:
            pca = PCA(options.dim, svd_solver="covariance_eigh").fit(x.astype(np.float64))
            print(f"{options.dim} of {x.shape[1]} dimensions keep {pca.explained_variance_ratio_.sum():.4f} of the variance")
        z = pca.transform(x.astype(np.float64))
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        store = FeatureStore(uri)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "reduced.npz"
            ids = np.array(store.ids(store.rows), dtype=np.str_)
            np.savez(file, features=z.astype(np.float32), ids=ids, labels=store.labels)
            import_features(ImportOptions(file=str(file), out=str(Path(options.out) / Path(uri).name)))


if __name__ == "__main__":
    main()
