"""Write a feature store of made-up vectors, as large as you like: clustered, not white noise.

    python benchmarks/make_store.py OUT [--rows 10000000] [--dim 384] [--dtype float16] [--processes 2]

Each vector is normalised: one of 5,000 centres of unequal weight, which stand around 200 others, and noise whose scale
falls with the dimension, as that of real features does along their principal axes. A part is a function of its first
row alone, so a smaller store is the beginning of a larger one. 10,000,000 x 384 in float16 take 7.9 GB.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from engine.folders import begin, digest_of
from engine.places import Place
from engine.schema import BLOCK_ROWS
from engine.store import part_bytes, part_name, publish_features, vectors_array

TOP, CENTRES = 200, 5000


@cache
def landscape(d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return centres (5000, d), the cumulative weights (5000,) they are drawn with, and the scale of each dimension (d,)."""
    rng = np.random.default_rng(0)
    scale = (1.0 / np.sqrt(1.0 + np.arange(d) / 8)).astype(np.float32)
    top = rng.standard_normal((TOP, d), dtype=np.float32) * scale
    centres = top[rng.integers(0, TOP, CENTRES)] + 0.6 * scale * rng.standard_normal((CENTRES, d), dtype=np.float32)
    return centres, np.cumsum(rng.dirichlet(np.full(CENTRES, 0.7))), scale


def vectors(start: int, stop: int, d: int) -> np.ndarray:
    """Return the vectors of rows start..stop, (r, d) float32."""
    centres, ends, scale = landscape(d)
    rng = np.random.default_rng([1, start])
    owner = np.minimum(np.searchsorted(ends, rng.random(stop - start)), CENTRES - 1)
    x = centres[owner] + 0.6 * scale * rng.standard_normal((stop - start, d), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def write_part(out: str, rows: int, d: int, dtype: str, start: int) -> dict[str, Any]:
    """Write one part; return its entry in the manifest."""
    stop = min(start + BLOCK_ROWS, rows)
    numbers = pa.array(np.arange(start, stop, dtype=np.int64))
    columns = {
        "row": numbers,
        "id": numbers.cast(pa.string()),
        "label": pa.nulls(stop - start, pa.int64()),
        "embedding": vectors_array(vectors(start, stop, d).astype(dtype)),
    }
    data = part_bytes(pa.table(columns))
    Place(out).at("parts", part_name(start)).write(data)
    counts = {"num_vectors": stop - start, "num_labeled": 0, "num_rejected": 0, "bytes": data.size}
    return {"name": part_name(start), "start": start, "stop": stop, "sha256": digest_of(data.to_pybytes()), **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    made_of = {"rows": options.rows, "dim": options.dim, "dtype": options.dtype}
    if begin(Place(options.out), "features", {}, made_of, overwrite=False) is not None:
        print(f"{options.out} is there already")
        return
    write = partial(write_part, options.out, options.rows, options.dim, options.dtype)
    with ProcessPoolExecutor(options.processes) as pool:
        parts = list(pool.map(write, range(0, options.rows, BLOCK_ROWS), chunksize=4))
    facts = {"num_rows": options.rows, "num_rejected": 0, "dim": options.dim, "dtype": options.dtype, "class_names": None}
    made = {"column": "embedding", "pool": {"uri": "made up", "kind": "made up"}, "encoder": {"name": "made up"}}
    publish_features(Place(options.out), parts, {**facts, **made})
    print(f"{options.out}: {options.rows:,} x {options.dim} {options.dtype}, {sum(p['bytes'] for p in parts) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
