"""Copies by hashes: the look-up against brute force, chains by hand, flat images, labelled ones, and two pools."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cli.main import run
from engine import copies as module
from engine import hamming
from engine.copies import Prints, first_near, phash_copies
from engine.embed import embed
from engine.hamming import MOST_BITS, HashTable, bits_apart
from engine.verbs import EmbedOptions


def crowded(seed: int, n: int) -> np.ndarray:
    """Hashes in crowds and chains: each is an earlier one with a few bits flipped."""
    rng = np.random.default_rng(seed)
    hashes = [int(rng.integers(0, 2**63))]
    for _ in range(n - 1):
        flips = sum(1 << int(bit) for bit in set(rng.integers(0, 64, rng.integers(0, 9)).tolist()))
        hashes.append(hashes[int(rng.integers(0, len(hashes)))] ^ flips)
    return np.array(hashes, dtype=np.uint64)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), radius=st.integers(0, MOST_BITS), candidates=st.sampled_from([1, 50, 10**6]))
def test_the_look_up_equals_brute_force(seed: int, radius: int, candidates: int) -> None:
    a, b = crowded(seed, 90), crowded(seed, 120)[::-1].copy()
    patch = pytest.MonkeyPatch()
    patch.setattr(hamming, "CANDIDATES", candidates)
    patch.setattr(hamming, "QUERIES", 37)
    found = [np.stack(piece, axis=1) for piece in HashTable(b, radius).near(a)]
    patch.undo()
    i, j = np.nonzero(bits_apart(a[:, None], b[None, :]) <= radius)
    assert np.concatenate(found).tolist() == np.stack([i, j, bits_apart(a[i], b[j])], axis=1).tolist()


def everything(i: np.ndarray, j: np.ndarray, bits: np.ndarray) -> np.ndarray:
    return np.ones(len(i), dtype=bool)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), radius=st.integers(0, 12), chunk=st.sampled_from([1, 7, 1000]))
def test_leaders_equal_brute_force(seed: int, radius: int, chunk: int) -> None:
    """The first kept image within the radius, however the pool is cut; some are always kept."""
    hashes, always = crowded(seed, 80), np.arange(80) % 9 == 0
    expected = np.full(80, -1)
    for row in range(80):
        near = np.flatnonzero((bits_apart(hashes[:row], hashes[row]) <= radius) & (expected[:row] < 0))
        if len(near) and not always[row]:
            expected[row] = near[0]
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "CHUNK", chunk)
    found = first_near(hashes, always, radius, everything)
    patch.undo()
    assert found.tolist() == expected.tolist()


HALF = 0x00000000FFFFFFFF
"""32 bits set, as an image's hash has."""


def chain(*steps: int) -> np.ndarray:
    """Hashes of 32 set bits; two of neighbouring steps differ in two bits."""
    return np.array([HALF ^ sum((1 << k) | (1 << (32 + k)) for k in range(step)) for step in steps], dtype=np.uint64)


def prints(hashes: np.ndarray, pixels: list[int] | None = None, content: list[int] | None = None) -> Prints:
    n = len(hashes)
    return Prints(np.arange(n), hashes, np.array(pixels or [100] * n), np.array(content or range(n)))


def told(found: module.Copies) -> list[tuple[int, int, int]]:
    return list(zip(found.rows.tolist(), found.kept.tolist(), found.bits.tolist(), strict=True))


def test_a_chain_does_not_merge() -> None:
    """A ~ B ~ C ~ D, two bits each: B is a copy of A; C is one of B alone, which is dropped, so C stays, and drops D."""
    none = np.array([], dtype=np.int64)
    assert told(phash_copies(prints(chain(0, 1, 2, 3)), none, 2)) == [(1, 0, 2), (3, 2, 2)]
    assert told(phash_copies(prints(chain(0, 1, 2, 3)), none, 4)) == [(1, 0, 2), (2, 0, 4)]


def test_the_larger_image_and_the_labelled_one_stay() -> None:
    none = np.array([], dtype=np.int64)
    assert told(phash_copies(prints(chain(0, 1, 2), [100, 400, 100]), none, 2)) == [(0, 1, 2), (2, 1, 2)]
    assert told(phash_copies(prints(chain(0, 1, 2), [100, 400, 100]), np.array([2]), 2)) == [(1, 2, 2)]
    assert told(phash_copies(prints(chain(0, 0, 0)), np.array([1, 2]), 0)) == [(0, 1, 0)]


def test_images_of_one_colour_are_copies_only_by_their_bytes() -> None:
    """Frames of different colours have one hash, 1 << 63, and that says nothing."""
    flat = np.array([1 << 63] * 4, dtype=np.uint64)
    found = phash_copies(prints(flat, content=[5, 6, 5, -1]), np.array([], dtype=np.int64), 10)
    assert told(found) == [(2, 0, 0)]


# --- stores and the command


def picture(seed: int, side: int = 64) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def png(image: Image.Image, **given: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, **{"format": "PNG", **given})
    return sink.getvalue()


def store_of(folder: Path, name: str, images: list[bytes]) -> str:
    table = pa.table({"image": pa.array([{"bytes": data, "path": f"{name}-{k}"} for k, data in enumerate(images)])})
    pq.write_table(table, folder / f"{name}.parquet")
    embed(EmbedOptions(pool=f"{folder}/{name}.parquet", out=f"{folder}/{name}", encoder="pixels", workers=0))
    return f"{folder}/{name}"


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Train: 40 images, JPEG copies of the first five, a larger one of the sixth, the same file as the seventh.

    Test: two flat frames, the JPEG copy of an eighth, the same file as the ninth, and ten others.
    """
    folder = tmp_path_factory.mktemp("pools")
    jpeg = {"format": "JPEG", "quality": 60}
    train = [png(picture(k)) for k in range(40)]
    train += [png(picture(k), **jpeg) for k in range(5)] + [png(picture(5, 96)), png(picture(6))]
    flat = [png(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue")]
    train.append(png(Image.new("RGB", (64, 64), "green")))
    test = [*flat, png(picture(7), **jpeg), png(picture(8)), *(png(picture(100 + k)) for k in range(10))]
    return store_of(folder, "train", train), store_of(folder, "test", test)


def excluded(capsys: pytest.CaptureFixture[str], out: Path, *line: str) -> list[dict]:
    assert run(["dedup", *line, "--out", str(out), "--workers", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    table = pq.read_table(out / "excluded.parquet").to_pylist()
    assert said["num_excluded"] == len(table)
    return table


@pytest.mark.parametrize(
    ("by", "rows"), [("exact", {46: 6}), ("phash", {40: 0, 41: 1, 42: 2, 43: 3, 44: 4, 5: 45, 46: 6}), ("both", None)]
)
def test_each_way(pools: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str, rows: dict) -> None:
    found = excluded(capsys, tmp_path / "out", pools[0], "--by", by)
    expected = rows or {40: 0, 41: 1, 42: 2, 43: 3, 44: 4, 5: 45, 46: 6}
    assert {row["row"]: row["kept_row"] for row in found} == expected
    assert {row["kept_id"] for row in found} == {f"train-{row}" for row in expected.values()}


@pytest.mark.parametrize("by", ["exact", "phash", "both", "embedding"])
def test_leaks(pools: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str) -> None:
    """Nothing is dropped within a pool; and the folder is one to exclude."""
    train, test = pools
    found = excluded(capsys, tmp_path / "out", test, "--against", train, "--by", by, "--eps", "0.001")
    expected = {3: 8} if by == "exact" else {2: 7, 3: 8}
    assert {row["row"]: row["kept_row"] for row in found} == expected
    line = ["select", test, "--strategy", "random", "--budget", str(14 - len(expected)), "--exclude", f"{tmp_path}/out"]
    assert run([*line, "--out", f"{tmp_path}/picks", "--workers", "0"]) == 0


def test_labelled_images_stay(pools: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text("[40, 46, 6]")
    for by in ("phash", "both", "embedding"):
        line = (pools[0], "--by", by, "--labeled", f"{tmp_path}/rows.json", "--eps", "0.001", "--overwrite")
        found = {row["row"]: row["kept_row"] for row in excluded(capsys, tmp_path / "out", *line)}
        assert found[0] == 40, by
        assert not {6, 40, 46} & set(found), by


def test_wrong_uses(pools: tuple[str, str], feature_store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = feature_store.place.uri
    for line, message in (
        ([digits, "--by", "phash"], "has no perceptual hashes"),
        ([pools[0], "--against", digits], "vectors of 192 floats"),
        ([pools[0], "--by", "phash", "--clusters", "3"], "--clusters means nothing here"),
        ([pools[0], "--against", pools[1], "--labeled", "column:label"], "give one of them"),
        ([pools[0], "--by", "phsh"], "phsh"),
        ([pools[0], "--by", "phash", "--max-bits", "16"], "max_bits is 16"),
    ):
        assert run(["dedup", *line, "--out", f"{tmp_path}/out", "--workers", "0"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()
