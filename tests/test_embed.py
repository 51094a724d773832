"""Pool -> features/: parts, rejected images, going on, and the same bytes wherever it runs."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from engine import embed as embed_module
from engine.decode import NO_IMAGE
from engine.embed import embed
from engine.encoders import PixelsEncoder
from engine.pipeline import PartEncoder, Stores, Todo
from engine.schema import InputError, RunError
from engine.store import FeatureStore, part_rows
from engine.verbs import EmbedOptions


def run(pool, out, progress=None, **given):
    given = {"encoder": "pixels", "pixels_size": 2, "workers": 0, **given}
    options = EmbedOptions(pool=str(pool), out=str(out), **given)
    return embed(options, progress) if progress else embed(options)


def stamps(folder):
    """What tells whether a file was written again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def encoded(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def grey_pool(tmp_path_factory):
    """150 grey PNGs of 3 x 2 px, the n-th of value n, in class folders a (100) and b (50): parts of 64, 64 and 22."""
    folder = tmp_path_factory.mktemp("grey")
    for name in "ab":
        (folder / name).mkdir()
    for value in range(150):
        (folder / ("a" if value < 100 else "b") / f"{value:03d}.png").write_bytes(encoded(Image.new("L", (3, 2), value), "PNG"))
    return folder


@pytest.fixture
def odd_pool(tmp_path):
    """Three good images and four bad ones; sorted by name: g0 b1 g2 b3 b4 b5 g6, first letters aside."""
    folder = tmp_path / "odd"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    frames = [Image.new("RGB", (5, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    files = {
        '0 it\'s "quoted" & ümläut.jpg': encoded(Image.new("CMYK", (16, 8), (0, 255, 255, 0)), "JPEG"),
        "1.jpg": encoded(noise, "JPEG")[:700],
        "2.png": encoded(Image.fromarray(np.full((2, 2), 32768, np.uint16)), "PNG"),
        "3.jpg": b"words, not pixels",
        "4.png": b"",
        "5.png": encoded(Image.new("RGB", (100, 21)), "PNG"),
        "6.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# --- parts


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(1, 64), (64, 64), (8191, 64), (8192, 128), (50_000, 512), (524_287, 4096), (524_288, 8192), (10**9, 8192)],
)
def test_rows_of_a_part(num_rows, expected):
    assert part_rows(num_rows) == expected


def test_a_store_has_the_parts_and_counts_of_its_pool(tmp_path, grey_pool):
    manifest = run(grey_pool, tmp_path / "out")
    assert [(p["name"], p["start"], p["stop"], p["num_vectors"]) for p in manifest["parts"]] == [
        ("part-000000000000.arrow", 0, 64, 64),
        ("part-000000000064.arrow", 64, 128, 64),
        ("part-000000000128.arrow", 128, 150, 22),
    ]
    assert (manifest["num_rows"], manifest["num_vectors"], manifest["num_rejected"], manifest["num_labeled"]) == (
        150,
        150,
        0,
        150,
    )
    assert (manifest["dim"], manifest["dtype"], manifest["class_names"]) == (12, "float32", ["a", "b"])
    assert manifest["pool"] == {"uri": str(grey_pool), "kind": "folder"}
    assert manifest["encoder"] == {"name": "pixels", "weights": "hub", "pixels_size": 2}
    store = FeatureStore(str(tmp_path / "out"))
    assert store.rows.tolist() == list(range(150))
    assert store.labels.tolist() == [0] * 100 + [1] * 50
    assert store.ids(np.array([149, 0])) == ["b/149.png", "a/000.png"]
    assert np.array_equal(store.vectors(), np.repeat(np.arange(150, dtype=np.float32)[:, None] / np.float32(255), 12, axis=1))
    part = store.read_part("part-000000000128.arrow")
    assert part.column_names == ["row", "id", "label", "width", "height", "phash", "bytes", "content_hash", "embedding"]
    assert (part["width"].to_pylist(), part["height"].to_pylist()) == ([3] * 22, [2] * 22)
    assert part["embedding"].type == pa.list_(pa.float32(), 12)
    assert pq.read_table(tmp_path / "out" / "rejected.parquet").num_rows == 0


def test_nothing_but_the_store_is_left(tmp_path, grey_pool):
    run(grey_pool, tmp_path / "out")
    assert list(stamps(tmp_path / "out")) == [
        "manifest.json",
        "parts/part-000000000000.arrow",
        "parts/part-000000000064.arrow",
        "parts/part-000000000128.arrow",
        "pool.arrow",
        "pool.json",
        "rejected.parquet",
        "run.json",
    ]


def test_a_flat_pool_has_no_labels(tmp_path, grey_pool):
    manifest = run(grey_pool / "b", tmp_path / "out")
    assert (manifest["num_labeled"], manifest["class_names"]) == (0, None)
    assert FeatureStore(str(tmp_path / "out")).labels.tolist() == [-1] * 50


def test_progress_counts_rows_up_to_all_of_them(tmp_path, grey_pool):
    seen = []
    run(grey_pool, tmp_path / "out", progress=lambda stage, done, total, note: seen.append((stage, done, total)))
    assert seen == [("embed", 0, 150), ("embed", 64, 150), ("embed", 128, 150), ("embed", 150, 150)]


def test_float16_is_stored_as_asked(tmp_path, grey_pool):
    wide, narrow = run(grey_pool, tmp_path / "wide"), run(grey_pool, tmp_path / "narrow", dtype="float16")
    assert (narrow["dtype"], narrow["digest"] == wide["digest"]) == ("float16", False)
    store = FeatureStore(str(tmp_path / "narrow"))
    assert store.read_part("part-000000000000.arrow")["embedding"].type == pa.list_(pa.float16(), 12)
    exact = FeatureStore(str(tmp_path / "wide")).vectors()
    assert store.vectors().dtype == np.float32
    assert np.array_equal(store.vectors(), exact.astype(np.float16).astype(np.float32))


# --- bad images


def test_bad_images_are_listed_with_their_reasons_and_keep_their_rows(tmp_path, odd_pool):
    manifest = run(odd_pool, tmp_path / "out", max_rejected="4", max_pixels=2099)
    assert (manifest["num_rows"], manifest["num_vectors"], manifest["num_rejected"]) == (7, 3, 4)
    store = FeatureStore(str(tmp_path / "out"))
    assert store.rows.tolist() == [0, 2, 6]
    assert store.ids(store.rows) == ['0 it\'s "quoted" & ümläut.jpg', "2.png", "6.gif"]
    table = store.read_block(0)
    assert list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)) == [(16, 8), (2, 2), (5, 4)]
    red, grey, first_frame = (255 * store.vectors()).round().astype(int).tolist()
    assert np.abs(np.array(red) - [255, 0, 0] * 4).max() <= 4
    assert grey == [128] * 12
    assert first_frame == [255, 0, 0] * 4
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert [(r["row"], r["id"], r["uri"]) for r in rejected] == [
        (1, "1.jpg", f"{odd_pool}/1.jpg"),
        (3, "3.jpg", f"{odd_pool}/3.jpg"),
        (4, "4.png", f"{odd_pool}/4.png"),
        (5, "5.png", f"{odd_pool}/5.png"),
    ]
    assert "truncated" in rejected[0]["reason"]
    assert [r["reason"] for r in rejected[1:]] == [
        NO_IMAGE,
        "empty file",
        "100 x 21 = 2,100 pixels is above --max-pixels 2,099",
    ]
    with pytest.raises(InputError, match=r"no vector for some of rows \[2, 3\]"):
        store.vectors(np.array([2, 3]))


def test_too_many_bad_images_fail_with_a_summary_and_a_higher_limit_goes_on(tmp_path, odd_pool):
    out = tmp_path / "out"
    with pytest.raises(RunError) as caught:
        run(odd_pool, out, max_pixels=2099)
    message = str(caught.value)
    assert "4 of 7 images are bad, above --max-rejected 1%" in message
    assert "1 x empty file" in message
    assert "1 x not an image file" in message
    assert f"{out}/rejected.parquet" in message
    assert pq.read_table(out / "rejected.parquet")["row"].to_pylist() == [1, 3, 4, 5]
    assert not (out / "manifest.json").exists()
    before = stamps(out / "parts")
    assert len(before) == 1
    with pytest.raises(RunError, match="above --max-rejected 57%"):
        run(odd_pool, out, max_pixels=2099, max_rejected="57%")
    with pytest.raises(RunError, match="above --max-rejected 3 "):
        run(odd_pool, out, max_pixels=2099, max_rejected="3")
    manifest = run(odd_pool, out, max_pixels=2099, max_rejected="57.2%")
    assert manifest["num_rejected"] == 4
    assert stamps(out / "parts") == before
    straight = run(odd_pool, tmp_path / "straight", max_pixels=2099, max_rejected="4")
    assert straight["digest"] == manifest["digest"]
    assert straight["parts"] == manifest["parts"]


def test_reasons_are_counted(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir()
    for index in range(7):
        (folder / f"{index}.png").write_bytes(
            b"" if index < 2 else b"words" if index < 5 else encoded(Image.new("L", (2, 2)), "PNG")
        )
    with pytest.raises(RunError, match=r"\(3 x not an image file; 2 x empty file\)"):
        run(folder, tmp_path / "out", max_rejected="10%")


def test_a_pool_of_bad_images_only_fails_whatever_the_limit(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "a.png").write_bytes(b"")
    with pytest.raises(RunError, match="all 1 images are bad"):
        run(tmp_path / "pool", tmp_path / "out", max_rejected="100%")


@pytest.mark.parametrize("limit", ["many", "-1", "-1%", "nan", "inf", "%", ""])
def test_limits_that_are_none(tmp_path, grey_pool, limit):
    with pytest.raises(InputError) as caught:
        run(grey_pool, tmp_path / "out", max_rejected=limit)
    assert f"--max-rejected {limit!r}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_vector_that_does_not_fit_names_its_image(tmp_path, grey_pool, monkeypatch):
    monkeypatch.setattr(
        PixelsEncoder, "encode", lambda self, batch, rows, sizes: np.where(batch == 70, np.float32(1e5), np.float32(1))
    )
    with pytest.raises(RunError, match=r"not finite as float16 for image 'a/070\.png' \(row 70\)"):
        run(grey_pool, tmp_path / "out", dtype="float16")
    assert run(grey_pool, tmp_path / "wide")["num_vectors"] == 150


# --- going on


def test_a_missing_part_is_the_only_one_that_is_made_again(tmp_path, grey_pool):
    out = tmp_path / "out"
    first = run(grey_pool, out)
    kept = out / "parts" / "part-000000000000.arrow", out / "parts" / "part-000000000128.arrow"
    before = {path: stamps(out)[f"parts/{path.name}"] for path in kept}
    (out / "manifest.json").unlink()
    (out / "parts" / "part-000000000064.arrow").unlink()
    seen = []
    again = run(grey_pool, out, progress=lambda stage, done, total, note: seen.append((done, total)))
    assert seen == [(86, 150), (150, 150)]
    assert {path: stamps(out)[f"parts/{path.name}"] for path in kept} == before
    assert again["digest"] == first["digest"]
    assert again["parts"] == first["parts"]


def test_when_it_is_published_nothing_is_done(tmp_path, grey_pool, monkeypatch):
    out = tmp_path / "out"
    first = run(grey_pool, out)
    before = stamps(out)
    monkeypatch.setattr(embed_module, "build_encoders", None)
    monkeypatch.setattr(embed_module, "in_process", None)
    monkeypatch.setattr(embed_module, "on_ray", None)
    assert run(grey_pool, out, max_rejected="50%", workers=3) == first
    assert stamps(out) == before


@pytest.mark.parametrize("published", [True, False])
def test_other_options_are_refused_by_name(tmp_path, grey_pool, published):
    out = tmp_path / "out"
    run(grey_pool, out)
    if not published:
        (out / "manifest.json").unlink()
    before = stamps(out)
    with pytest.raises(InputError) as caught:
        run(grey_pool, out, pixels_size=3, dtype="float16")
    state = "is published" if published else "was begun"
    assert f'{out} {state} with other inputs (options.dtype "float32" -> "float16"; options.pixels_size 2 -> 3)' in str(
        caught.value
    )
    assert "--overwrite" in str(caught.value)
    assert stamps(out) == before


def test_another_pool_is_refused_by_its_digest(tmp_path, grey_pool):
    run(grey_pool / "a", tmp_path / "out")
    with pytest.raises(InputError, match=r"inputs\.pool\.digest .* inputs\.pool\.num_rows 100 -> 50"):
        run(grey_pool / "b", tmp_path / "out")


def test_overwrite_begins_anew(tmp_path, grey_pool):
    out = tmp_path / "out"
    run(grey_pool, out)
    manifest = run(grey_pool / "b", out, pixels_size=3, overwrite=True)
    assert (manifest["num_rows"], manifest["dim"]) == (50, 27)
    assert [path.name for path in (out / "parts").iterdir()] == ["part-000000000000.arrow"]
    assert manifest["digest"] == run(grey_pool / "b", tmp_path / "fresh", pixels_size=3)["digest"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_left_alone(tmp_path, grey_pool, overwrite):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("precious")
    before = stamps(out)
    with pytest.raises(InputError, match=r"holds files that are not coresift's \('chapter1\.tex'\)"):
        run(grey_pool, out, overwrite=overwrite)
    assert stamps(out) == before


@pytest.mark.parametrize(
    "wrong",
    [{"encoder": "embedding", "backbone": "test_rasnet"}, {"encoder": "pixles"}, {"encoder": "embedding", "weights": "no.pth"}],
)
def test_what_cannot_begin_claims_no_folder(tmp_path, grey_pool, wrong):
    with pytest.raises(InputError):
        run(grey_pool, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
    assert run(grey_pool, tmp_path / "out")["num_vectors"] == 150


# --- the same bytes


def test_decoding_on_threads_gives_the_same_part(tmp_path, odd_pool):
    manifest = run(odd_pool, tmp_path / "out", max_rejected="4", max_pixels=2099, batch_size=1)
    given = {"encoder": "pixels", "pixels_size": 2, "max_pixels": 2099, "batch_size": 1, "cpus_per_worker": 2}
    options = EmbedOptions(pool=str(odd_pool), out="", **given)
    stores = Stores(str(tmp_path / "out" / "pool.arrow"), "", {"pixels": str(tmp_path / "again")})
    threads = torch.get_num_threads()
    try:
        entry = PartEncoder(options, stores, "cpu").encode_part(Todo(0, 7, ("pixels",)))
    finally:
        torch.set_num_threads(threads)
    assert entry["stores"]["pixels"] == manifest["parts"][0]
    assert set(entry["spent"]) == {"model_s", "read_s", "decode_s", "wait_s", "encode_s", "write_s"}
    json.dumps(entry)


def test_weights_are_known_by_their_content_not_their_name(tmp_path, grey_pool):
    from engine.backbones import build_backbone

    model = {"encoder": "embedding", "backbone": "test_resnet", "image_size": 32}
    state = build_backbone(EmbedOptions(pool="", out="", backbone="test_resnet", weights="random")).state_dict()
    torch.save(state, tmp_path / "a.pth")
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")
    first = run(grey_pool / "b", tmp_path / "out", weights=str(tmp_path / "a.pth"), **model)
    assert run(grey_pool / "b", tmp_path / "out", weights=str(tmp_path / "b.pth"), **model) == first
    torch.save({key: value + 1 for key, value in state.items()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"inputs\.weights"):
        run(grey_pool / "b", tmp_path / "out", weights=str(tmp_path / "a.pth"), **model)


def test_ray_gives_the_same_store(tmp_path, grey_pool, ray_session):
    here, there = run(grey_pool, tmp_path / "here"), run(grey_pool, tmp_path / "there", workers=2)
    assert there["digest"] == here["digest"]
    assert there["parts"] == here["parts"]
    assert (tmp_path / "there" / "rejected.parquet").read_bytes() == (tmp_path / "here" / "rejected.parquet").read_bytes()


def test_ray_gives_the_same_store_of_a_real_network(tmp_path, shared, ray_session):
    pool = tmp_path / "cifar.parquet"
    pq.write_table(pq.read_table(shared / "cifar10" / "test.parquet").slice(0, 100), pool)
    network = {
        "encoder": "embedding",
        "backbone": "mobilenetv2_100",
        "weights": str(shared / "weights" / "mobilenetv2_100.safetensors"),
        "model_option": ("pad_type=same",),
        "mean": (0.5,),
        "std": (0.5,),
        "image_size": 64,
    }
    here, there = run(pool, tmp_path / "here", **network), run(pool, tmp_path / "there", workers=2, **network)
    assert (here["num_vectors"], here["num_labeled"], here["dim"], len(here["parts"])) == (100, 100, 1280, 2)
    assert there["digest"] == here["digest"]
    assert there["parts"] == here["parts"]
