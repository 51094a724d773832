"""A pool that has grown: `embed --reuse` does only what is new, and former picks are found again by their ids."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine import encoders
from engine.embed import embed
from engine.ingest import import_features
from engine.schema import InputError
from engine.select import read_labeled, select
from engine.store import FeatureStore
from engine.verbs import EmbedOptions, ImportOptions, SelectOptions

NETWORK = {"backbone": "test_resnet", "weights": "random", "image_size": 32, "workers": 0}


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(path)


def folder_of(place: Path, numbers: range) -> Path:
    for number in numbers:
        draw(place / ("cat" if number % 2 else "dog") / f"{number:04d}.png", number)
    return place


def parts_of(store: str) -> dict[str, bytes]:
    return {name: Path(store, "parts", name).read_bytes() for name in sorted(os.listdir(Path(store, "parts")))}


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each batch of the encoder held."""
    seen: list[int] = []
    build = encoders.EmbeddingEncoder.encode

    def encode(self, batch, rows, sizes):
        seen.append(len(set(rows.tolist())))
        return build(self, batch, rows, sizes)

    monkeypatch.setattr(encoders.EmbeddingEncoder, "encode", encode)
    return seen


def made(pool: Path, out: Path, **given: object) -> dict:
    return embed(EmbedOptions(pool=str(pool), out=str(out), **{**NETWORK, **given}))


def test_new_files_among_old_ones(tmp_path: Path, count: list[int]) -> None:
    """90 files, then 40 more that sort among them, one changed, one gone, one broken, and a class before the others."""
    pool = folder_of(tmp_path / "pool", range(0, 180, 2))
    (pool / "dog" / "broken.png").write_bytes(b"no image")
    made(pool, tmp_path / "old", max_rejected="5")
    folder_of(pool, range(1, 80, 2))
    draw(pool / "bird" / "0000.png", 1000)
    draw(pool / "dog" / "0010.png", 2000)
    os.unlink(pool / "dog" / "0020.png")
    unread = pool / "dog" / "0030.png"
    stat = unread.stat()
    unread.write_bytes(bytes(stat.st_size))  # as it was, for all that the listing says
    os.utime(unread, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    count.clear()
    manifest = made(pool, tmp_path / "new", max_rejected="5", reuse=(str(tmp_path / "old"),))
    assert manifest["time"]["num_reused"] == 88
    assert sum(count) == 42
    draw(unread, 30)
    os.utime(unread, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fresh = made(pool, tmp_path / "fresh", max_rejected="5")
    assert parts_of(f"{tmp_path}/new") == parts_of(f"{tmp_path}/fresh")
    assert manifest["digest"] == fresh["digest"]
    assert manifest["class_names"] == ["bird", "cat", "dog"]
    assert "num_reused" not in fresh["time"]


def parquet_of(path: Path, numbers: list[int]) -> Path:
    rows = []
    for number in numbers:
        draw(path.parent / "one.png", number)
        rows.append({"image": {"bytes": (path.parent / "one.png").read_bytes(), "path": f"{number}.png"}})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_images_are_known_by_their_bytes(tmp_path: Path, count: list[int], ray_session: None) -> None:
    """A table written anew in another order, from two earlier stores, and by Ray with tasks that decode ahead."""
    made(parquet_of(tmp_path / "a.parquet", list(range(70))), tmp_path / "a")
    made(parquet_of(tmp_path / "b.parquet", list(range(60, 90))), tmp_path / "b")
    pool = parquet_of(tmp_path / "c.parquet", list(range(100))[::-1])
    fresh = made(pool, tmp_path / "fresh")
    count.clear()
    reuse = (f"{tmp_path}/a", f"{tmp_path}/b")
    here = made(pool, tmp_path / "here", reuse=reuse)
    assert (sum(count), here["time"]["num_reused"]) == (10, 90)
    on_ray = made(pool, tmp_path / "ray", reuse=reuse, workers=1, decode_workers=1)
    assert on_ray["time"]["num_reused"] == 90
    assert here["digest"] == fresh["digest"] == on_ray["digest"]


def test_half_precision_and_no_network(tmp_path: Path) -> None:
    pool = folder_of(tmp_path / "pool", range(20))
    for given in ({"dtype": "float16"}, {"encoder": "pixels"}):
        for name in ("old", "fresh", "new"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        made(pool, tmp_path / "old", **given)
        folder_of(pool, range(20, 24))
        new = made(pool, tmp_path / "new", reuse=(f"{tmp_path}/old",), **given)
        assert new["digest"] == made(pool, tmp_path / "fresh", **given)["digest"]


def test_a_killed_run_goes_on(tmp_path: Path, count: list[int]) -> None:
    """Finished parts stay, with or without --reuse: it is no part of what a run is."""
    pool = folder_of(tmp_path / "pool", range(0, 200, 2))
    made(pool, tmp_path / "old")
    folder_of(pool, range(1, 60, 2))
    new = made(pool, tmp_path / "new", reuse=(f"{tmp_path}/old",))
    (tmp_path / "new" / "manifest.json").unlink()
    os.unlink(sorted((tmp_path / "new" / "parts").iterdir())[1])
    count.clear()
    again = made(pool, tmp_path / "new")
    assert again["digest"] == new["digest"]
    assert sum(count) == 64


def test_stores_of_another_make_are_refused(tmp_path: Path) -> None:
    pool = folder_of(tmp_path / "pool", range(6))
    made(pool, tmp_path / "old")
    np.savez(tmp_path / "x.npz", features=np.eye(4, dtype=np.float32))
    import_features(ImportOptions(file=str(tmp_path / "x.npz"), out=str(tmp_path / "imported")))

    def refused(told: str, name: str = "old", **given: object) -> None:
        with pytest.raises(InputError, match=told):
            made(pool, tmp_path / "out", reuse=(f"{tmp_path}/{name}",), **given)
        assert not (tmp_path / "out").exists()

    refused("image_size is 32 there and 64 here", image_size=64)
    refused("dtype is 'float32' there and 'float16' here", dtype="float16")
    refused("encoder is 'embedding' there and 'pixels' here", encoder="pixels")
    refused("no content hashes", "imported")
    refused("--reuse takes one encoder of", encoder="patterns")
    refused("does not exist", "nowhere")


# --- selections of an earlier state


def imported(out: Path, x: np.ndarray, ids: list[str] | None = None) -> str:
    named = {} if ids is None else {"ids": np.array(ids)}
    np.savez(f"{out}.npz", features=x.astype(np.float32), **named)
    import_features(ImportOptions(file=f"{out}.npz", out=str(out), overwrite=True))
    return str(out)


X = np.random.default_rng(0).standard_normal((60, 8))
IDS = [f"image-{row}" for row in range(60)]


@pytest.fixture
def former(tmp_path: Path) -> tuple[Path, list[str]]:
    """Features of 40 images, five picks, and five more after those; returns the folder and the ten ids."""
    store = imported(tmp_path / "old", X[:40], IDS[:40])
    select(SelectOptions(features=store, out=f"{tmp_path}/one", strategy="coreset", budget="5", workers=0))
    more = {"strategy": "coreset", "budget": "5", "labeled": f"{tmp_path}/one", "workers": 0}
    select(SelectOptions(features=store, out=f"{tmp_path}/two", **more))
    picks = [(tmp_path / name / "ids.txt").read_text().split() for name in ("one", "two")]
    return tmp_path, picks[0] + picks[1]


def test_former_picks_are_found_by_id(former: tuple[Path, list[str]]) -> None:
    """20 images more, and the old ones stand elsewhere."""
    folder, ids = former
    order = np.random.default_rng(1).permutation(60)
    grown = imported(folder / "grown", X[order], [IDS[row] for row in order])
    found = read_labeled(f"{folder}/two", FeatureStore(grown))
    assert sorted(IDS[order[row]] for row in found) == sorted(ids)
    (manifest,) = select(
        SelectOptions(features=grown, out=f"{folder}/three", strategy="coreset", budget="5", labeled=f"{folder}/two", workers=0)
    )
    assert manifest["num_labeled"] == 10
    assert not set((folder / "three" / "ids.txt").read_text().split()) & set(ids)
    shutil.rmtree(folder / "old")
    assert read_labeled(f"{folder}/two", FeatureStore(grown)).tolist() == found.tolist()


def test_former_picks_that_are_gone_are_named(former: tuple[Path, list[str]]) -> None:
    folder, ids = former
    left = [row for row in range(60) if IDS[row] not in ids[:2]]
    grown = imported(folder / "grown", X[left], [IDS[row] for row in left])
    with pytest.raises(InputError, match="2 of its 10 images have no vector") as caught:
        read_labeled(f"{folder}/two", FeatureStore(grown))
    assert all(repr(name) in str(caught.value) for name in ids[:2])


def test_other_images_of_the_same_names_are_refused(former: tuple[Path, list[str]]) -> None:
    folder, ids = former
    other = X.copy()
    other[IDS.index(ids[7])] += 1
    with pytest.raises(InputError, match=rf"1 of its images are other images there \('{ids[7]}'\)"):
        read_labeled(f"{folder}/two", FeatureStore(imported(folder / "grown", other, IDS)))


def test_row_numbers_are_believed_only_with_the_old_features(tmp_path: Path) -> None:
    store = imported(tmp_path / "old", X[:40])
    select(SelectOptions(features=store, out=f"{tmp_path}/one", strategy="coreset", budget="5", workers=0))
    grown = FeatureStore(imported(tmp_path / "grown", X))
    picks = sorted(json.loads((tmp_path / "one" / "indices.json").read_text()))
    assert read_labeled(f"{tmp_path}/one", grown).tolist() == picks
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(InputError, match="only row numbers"):
        read_labeled(f"{tmp_path}/one", grown)
