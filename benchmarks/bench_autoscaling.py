"""Does a step bring nodes up, work on all of them and let them go? Embeds and selects on a cluster that begins with none.

    python benchmarks/bench_autoscaling.py [--nodes 3] [--images 640] [--unlabelled]

The cluster is Ray's autoscaler on its fake provider: a head that does no work, and nodes of one CPU that are processes on this
machine, so nodes come in seconds. Times say when nodes came and went, and nothing of how fast the steps are. Prints a row
whenever the number of nodes, or of nodes with work, changes, what the steps said that they wait for, and a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from autoscaling import Counts, autoscaling_cluster  # noqa: E402

from engine import session  # noqa: E402
from engine.embed import embed  # noqa: E402
from engine.ingest import import_features  # noqa: E402
from engine.select import select  # noqa: E402
from engine.verbs import EmbedOptions, ImportOptions, SelectOptions  # noqa: E402


def pool(folder: Path, num_images: int) -> str:
    """Write images of noise, 64 x 64 px; return their folder."""
    (folder / "pool").mkdir()
    rng = np.random.default_rng(0)
    for row in range(num_images):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "pool" / f"{row:05d}.png")
    return str(folder / "pool")


def vectors(folder: Path) -> str:
    """Import 40,000 vectors, five blocks; return their feature store."""
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(40000, 32)).astype(np.float32))
    import_features(ImportOptions(file=str(folder / "vectors.npy"), out=str(folder / "vectors")))
    return str(folder / "vectors")


def embed_pool(folder: Path, images: int, address: str) -> None:
    options = EmbedOptions(
        pool=pool(folder, images),
        out=str(folder / "features"),
        backbone="resnet18",
        weights="random",
        image_size=64,
        address=address,
    )
    assert embed(options)["num_vectors"] == images


def select_kmeans(folder: Path, nodes: int, address: str) -> None:
    given = {"features": vectors(folder), "strategy": "kmeans", "budget": "100", "option": ("restarts=1",)}
    select(SelectOptions(**given, out=str(folder / "there"), address=address, workers=nodes))
    select(SelectOptions(**given, out=str(folder / "here"), workers=0))
    assert (folder / "there" / "indices.json").read_bytes() == (folder / "here" / "indices.json").read_bytes()


def run(folder: Path, nodes: int, images: int, labelled: bool) -> dict[str, object]:
    """Embed, wait until all nodes are gone, select, wait again; return what was seen."""
    found: dict[str, object] = {"nodes": nodes, "images": images, "labelled": labelled}
    with autoscaling_cluster(nodes, labelled=labelled) as address:
        session.connect(address)
        import ray

        for name in ("embed", "select"):
            with Counts() as counts:
                began, said = time.monotonic(), []
                session.say = lambda text, began=began, said=said: said.append([round(time.monotonic() - began, 1), text])
                embed_pool(folder, images, address) if name == "embed" else select_kmeans(folder, nodes, address)
                done_s = round(time.monotonic() - began, 1)
                counts.wait_for(0)
            print(f"{name}: done after {done_s} s\n{'seconds':>9} {'nodes':>6} {'with work':>10}")
            for seconds, up, busy in counts.rows:
                print(f"{seconds:9.1f} {up:6d} {busy:10d}")
            for seconds, text in said:
                print(f"{seconds:9.1f} said: {text}")
            found[name] = {"done_s": done_s, "counts": counts.rows, "worked": len(counts.worked), "said": said}
        ray.shutdown()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--unlabelled", action="store_true", help="the head does not say how far the cluster grows")
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(run(Path(temporary), known.nodes, known.images, not known.unlabelled), sort_keys=True))
