"""Every column of a pool, and what is known of each image, stands beside its vector."""

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine import chunks as chunks_module
from engine import embed as embed_module
from engine.embed import embed, embed_all
from engine.info import describe
from engine.phash import phash
from engine.schema import InputError
from engine.select import read_labeled
from engine.store import TAKEN, FeatureStore
from engine.verbs import EmbedOptions

BOX = {"label": pa.int64(), "x": pa.float32(), "y": pa.float32(), "width": pa.float32(), "height": pa.float32()}
BOXES = pa.list_(pa.struct([*BOX.items(), ("crowd", pa.bool_())]))
EXTRA = pa.schema([("camera", pa.string()), ("seen", pa.bool_()), ("boxes", BOXES)])
TINY = {"backbone": "vit_tiny_patch16_224", "weights": "random", "image_size": 32, "model_option": ("depth=2",)}


def pixels(row):
    return np.random.default_rng(row).integers(0, 256, (5 + row % 2, 7, 3), dtype=np.uint8)


def extra(row):
    box = {"label": 1, "x": 0.5, "y": 1.0, "width": 3.0, "height": 2.0, "crowd": row == 1}
    return {"camera": None if row == 2 else f"cam{row % 3}", "seen": row < 40, "boxes": [box] * (row % 2)}


@pytest.fixture
def pool(tmp_path):
    """A hundred PNGs, 7 px wide; image 10 is broken."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for row in range(100):
        Image.fromarray(pixels(row)).save(folder / f"{row:03d}.png")
    (folder / "010.png").write_bytes(b"words")
    return folder


def further_columns(monkeypatch, schema):
    """Let pools have the columns of a schema, and samples the values of `extra`."""
    opened, loaded, read = embed_module.open_pool, chunks_module.load_pool, chunks_module.read_rows
    monkeypatch.setattr(embed_module, "open_pool", lambda *given: replace(opened(*given), schema=schema))
    monkeypatch.setattr(chunks_module, "load_pool", lambda place: replace(loaded(place), schema=schema))
    monkeypatch.setattr(chunks_module, "read_rows", lambda *given: (replace(s, extra=extra(s.row)) for s in read(*given)))


def options(pool, out, **given):
    return EmbedOptions(pool=str(pool), out=str(out), **{"encoder": "pixels", "workers": 0, "max_rejected": "1", **given})


# --- of each image


def test_size_hash_and_bytes_are_kept(tmp_path, pool):
    embed(options(pool, tmp_path / "out"))
    table = FeatureStore(str(tmp_path / "out")).read_block(0)
    rows = [row for row in range(100) if row != 10]
    assert table["row"].to_pylist() == rows
    assert table["height"].to_pylist() == [5 + row % 2 for row in rows]
    assert table["phash"].type == pa.uint64()
    assert table["phash"].to_pylist() == [phash(Image.fromarray(pixels(row))) for row in rows]
    assert table["bytes"].to_pylist() == [(pool / f"{row:03d}.png").stat().st_size for row in rows]


def test_raw_pixels_have_no_file_size(tmp_path):
    rows = [bytes([row % 10]) + np.full(3072, row, np.uint8).tobytes() for row in range(20)]
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar" / "data_batch_1.bin").write_bytes(b"".join(rows))
    embed(options(tmp_path / "cifar", tmp_path / "out"))
    table = FeatureStore(str(tmp_path / "out")).read_block(0)
    assert table["bytes"].type == pa.int64()
    assert table["bytes"].to_pylist() == [None] * 20
    assert table["width"].to_pylist() == [32] * 20


# --- of the pool


def test_further_columns_pass_through_with_their_types(tmp_path, pool, monkeypatch):
    further_columns(monkeypatch, EXTRA)
    embed(options(pool, tmp_path / "out"))
    store = FeatureStore(str(tmp_path / "out"))
    own = ["row", "id", "label", "width", "height", "phash", "bytes", "content_hash"]
    assert store.columns == [*own, "camera", "seen", "boxes"]
    table = store.read_block(0)
    assert [table.schema.field(name).type for name in EXTRA.names] == EXTRA.types
    for name in EXTRA.names:
        assert table[name].to_pylist() == [extra(row)[name] for row in table["row"].to_pylist()]
    facts = describe(str(tmp_path / "out"))
    assert facts["columns"]["boxes"] == str(BOXES)
    assert facts["columns"]["phash"] == "uint64"


@pytest.mark.parametrize(
    ("column", "labelled"),
    [
        ("seen", [row for row in range(40) if row != 10]),
        ("camera", [row for row in range(100) if row not in (2, 10)]),
        ("boxes", [row for row in range(100) if row != 10]),
    ],
)
def test_a_further_column_says_what_is_labelled(tmp_path, pool, monkeypatch, column, labelled):
    further_columns(monkeypatch, EXTRA)
    embed(options(pool, tmp_path / "out"))
    assert read_labeled(f"column:{column}", FeatureStore(str(tmp_path / "out"))).tolist() == labelled


def test_columns_of_our_own_names_are_left_out_and_said(tmp_path):
    """Every name that a store has itself, and one more: that one passes through."""
    image = io.BytesIO()
    Image.new("RGB", (9, 9)).save(image, "PNG")
    clash = {name: [1] for name in TAKEN - {"id", "label"}}
    table = pa.table({"image": [image.getvalue()], "id": ["a"], "label": [0], "fine": [7], **clash})
    pq.write_table(table, tmp_path / "pool.parquet")
    manifest = embed(options(tmp_path / "pool.parquet", tmp_path / "out"))
    assert set(manifest["pool"]["columns_left_out"]) == set(clash)
    store = FeatureStore(str(tmp_path / "out"))
    assert store.read_column("fine").to_pylist() == [7]
    assert store.read_column("width").to_pylist() == [9]
    assert describe(str(tmp_path / "pool.parquet"))["columns_left_out"].keys() == clash.keys()
    with pytest.raises(InputError, match="--metadata-column 'phash' cannot pass through: the features have a column"):
        embed(options(tmp_path / "pool.parquet", tmp_path / "other", metadata_column=("phash",)))


# --- several encoders


def parts_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "parts").iterdir())}


def test_several_encoders_read_and_decode_each_image_once(tmp_path, pool, monkeypatch):
    """Each store is what its encoder alone would have written."""
    decoded, decode = [], chunks_module.decode
    monkeypatch.setattr(chunks_module, "decode", lambda *given: decoded.append(1) or decode(*given))
    manifests = embed_all(options(pool, tmp_path / "all", encoder="patterns,pixels,embedding", **TINY))
    assert len(decoded) == 100
    assert [manifest["encoder"]["name"] for manifest in manifests] == ["patterns", "pixels", "embedding"]
    for name, manifest in zip(("patterns", "pixels", "embedding"), manifests, strict=True):
        alone = embed(options(pool, tmp_path / name, encoder=name, **TINY))
        assert parts_of(tmp_path / "all" / name) == parts_of(tmp_path / name)
        for key in ("digest", "parts", "inputs", "options", "dim", "column", "encoder", "num_rejected", "files"):
            assert manifest[key] == alone[key], key
        assert embed(options(pool, tmp_path / "all" / name, encoder=name, **TINY)) == manifest
    assert describe(str(tmp_path / "all"))["stores"] == {
        "embedding": {"state": "published", "num_rows": 100, "num_vectors": 99, "dim": 192},
        "patterns": {"state": "published", "num_rows": 100, "num_vectors": 99, "dim": 192},
        "pixels": {"state": "published", "num_rows": 100, "num_vectors": 99, "dim": 192},
    }


def test_encoders_of_one_command_share_one_network():
    from engine.encoders import build_encoders

    made = build_encoders(EmbedOptions(pool="", out="", encoder="embedding,patterns", **TINY), "cpu")
    assert made["embedding"].network is made["patterns"].network
    assert made["embedding"].input == made["patterns"].input


def test_a_part_is_encoded_for_the_stores_that_lack_it(tmp_path, pool):
    both = options(pool, tmp_path / "out", encoder="pixels,embedding", **TINY)
    first = embed_all(both)
    for name in ("pixels", "embedding"):
        (tmp_path / "out" / name / "manifest.json").unlink()
    (tmp_path / "out" / "embedding" / "parts" / "part-000000000064.arrow").unlink()
    before = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*/parts/*")}
    seen = []
    again = embed_all(both, lambda stage, done, total, note: seen.append(done))
    assert seen == [64, 100]
    assert [m["parts"] for m in again] == [m["parts"] for m in first]
    assert {path: path.stat().st_ino for path in before} == before


def test_a_published_store_is_left_alone_beside_one_that_is_not(tmp_path, pool):
    first = embed(options(pool, tmp_path / "out" / "pixels", **TINY))
    stamp = (tmp_path / "out" / "pixels" / "manifest.json").stat().st_mtime_ns
    manifests = embed_all(options(pool, tmp_path / "out", encoder="pixels,embedding", **TINY))
    assert (tmp_path / "out" / "pixels" / "manifest.json").stat().st_mtime_ns == stamp
    assert manifests[0]["digest"] == first["digest"]


def test_names_of_encoders_that_are_none(tmp_path, pool):
    with pytest.raises(InputError, match="unknown encoder 'pattern', did you mean 'patterns'"):
        embed_all(options(pool, tmp_path / "out", encoder="pixels,pattern"))
    with pytest.raises(InputError, match="'pixels,pixels' names an encoder twice"):
        embed_all(options(pool, tmp_path / "out", encoder="pixels,pixels"))
    assert not (tmp_path / "out").exists()


def test_several_stores_do_not_go_into_a_store(tmp_path, pool):
    embed(options(pool, tmp_path / "out"))
    with pytest.raises(InputError, match="is a features folder itself: several encoders write folders below"):
        embed_all(options(pool, tmp_path / "out", encoder="pixels,embedding", **TINY))
