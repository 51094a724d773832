"""Pools in containers: tar shards, data sets of `datasets`, SVHN's MATLAB files; and where they may lie."""

import contextlib
import http.server
import io
import json
import os
import tarfile
import threading

import numpy as np
import pytest
from pools import everything, make_folder, png, refused, value_of, write
from scipy.io import savemat

from engine.places import Place
from engine.sources import Columns, hub, load_pool, open_pool, read, save_pool

# --- tar


def shard(file, *members, kind=tarfile.REGTYPE, form=tarfile.PAX_FORMAT):
    """Write a tar of (name, content); content is bytes, text, or a value to be JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as archive:
        for name, content in members:
            data = (
                content
                if isinstance(content, bytes)
                else (content if isinstance(content, str) else json.dumps(content)).encode()
            )
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            if kind != tarfile.REGTYPE:
                info.size, info.linkname = 0, "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))
    return file


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_folder_of_shards(tmp_path, form):
    long = "a/very/" + "long/" * 40 + "name"
    first = [("./000.jpg", png(0)), ("./000.cls", "3\n"), ("001.cls", "5"), ("001.PNG", png(1)), ("README.md", "words")]
    shard(tmp_path / "x-1.tar", ("000.png", png(2)), (f"{long}.jpg", png(3)), (f"{long}.cls", "-1"), form=form)
    shard(tmp_path / "x-0.tar", *first, form=form)
    (tmp_path / "notes.txt").write_text("left alone")
    pool = open_pool(str(tmp_path))
    assert (pool.kind, pool.num_rows, pool.class_names, pool.schema.names) == ("tar", 4, None, [])
    assert pool.detail["without_image"] == 1
    samples = everything(pool)
    assert [s.id for s in samples] == ["x-0.tar/000", "x-0.tar/001", "x-1.tar/000", f"x-1.tar/{long}"]
    assert [value_of(s) for s in samples] == [0, 1, 2, 3]
    assert [s.label for s in samples] == [3, 5, None, None]
    assert [(s.row, value_of(s)) for s in read(pool, 1, 3)] == [(1, 1), (2, 2)]


def test_metadata_beside_images(tmp_path):
    file = shard(
        tmp_path / "x.tar",
        ("a.jpg", png(0)),
        ("a.json", {"n": 1, "f": 1, "s": "x", "mixed": 1, "label": "owl", "deep": {"a": 1}, "width": 7, "nothing": None}),
        ("a.txt", "a caption"),
        ("b.jpg", png(1)),
        ("b.json", {"n": 2, "f": 0.5, "mixed": "y", "label": "ant", "big": 1 << 70}),
        ("c.jpg", png(2)),
    )
    pool = open_pool(str(file))
    assert pool.class_names == ("ant", "owl")
    kinds = {f.name: str(f.type) for f in pool.schema}
    assert kinds == {
        "big": "string",
        "f": "double",
        "mixed": "string",
        "n": "int64",
        "nothing": "string",
        "s": "string",
        "txt": "string",
    }
    assert set(pool.detail["columns_left_out"]) == {"deep", "width"}
    a, b, c = everything(pool)
    assert [s.label for s in (a, b, c)] == [1, 0, None]
    none = dict.fromkeys(kinds)
    assert a.extra == {**none, "n": 1, "f": 1, "s": "x", "mixed": "1", "txt": "a caption"}
    assert b.extra == {**none, "n": 2, "f": 0.5, "mixed": "y", "big": str(1 << 70)}
    assert c.extra == none
    assert open_pool(str(file), Columns(metadata=("s",), label="n")).schema.names == ["s"]
    assert [s.label for s in everything(open_pool(str(file), Columns(label="n")))] == [1, 2, None]
    refused(file, "no metadata 'z'", "mixed", columns=Columns(metadata=("z",)))
    refused(file, "'deep' cannot pass", columns=Columns(metadata=("deep",)))


def test_a_pattern_of_shards(tmp_path):
    for number in range(9, 12):
        shard(tmp_path / f"train-{number:03d}.tar", ("a.png", png(number)), ("a.cls", "cat" if number == 9 else "ape"))
    pool = open_pool(f"{tmp_path}/train-{{009..010}}.tar")
    assert [(s.id, value_of(s), s.label) for s in everything(pool)] == [("train-009.tar/a", 9, 1), ("train-010.tar/a", 10, 0)]
    assert pool.class_names == ("ape", "cat")
    refused(f"{tmp_path}/train-{{009..012}}.tar", "train-012.tar")


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "x/../../a.jpg"])
def test_members_that_climb_out_are_refused(tmp_path, name):
    refused(shard(tmp_path / "x.tar", (name, png(0))), "x.tar", name)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_shard_are_refused(tmp_path, kind):
    refused(shard(tmp_path / "x.tar", ("a.jpg", b""), kind=kind), "x.tar", "'a.jpg'", "link")


def test_shards_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "text.tar").write_text("words " * 1000)
    refused(tmp_path / "text.tar", "text.tar", "uncompressed tar")
    whole = shard(tmp_path / "cut.tar", ("a.jpg", png(0)), ("b.jpg", bytes(100_000))).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:50_000])
    refused(tmp_path / "cut.tar", "cut.tar", "uncompressed tar")
    refused(shard(tmp_path / "none.tar", ("a.txt", "words")), "none.tar", "is empty")
    refused(shard(tmp_path / "two.tar", ("a.jpg", png(0)), ("a.png", png(0))), "two.tar", "two images named 'a'")
    refused(shard(tmp_path / "bad.tar", ("a.jpg", png(0)), ("a.json", "{")), "bad.tar", "JSON of 'a'")
    apart = shard(tmp_path / "apart.tar", ("a.jpg", png(0)), ("b.jpg", png(0)), ("a.png", png(0)))
    refused(apart, "'apart.tar/a' is the id of rows 0 and 2")


def test_a_shard_that_was_cut_after_listing_gives_errors(tmp_path):
    file = shard(tmp_path / "x.tar", ("a.jpg", png(0)), ("b.jpg", bytes(100_000)))
    pool = open_pool(str(file))
    with open(file, "r+b") as stream:
        stream.truncate(3000)
    first, second = everything(pool)
    assert (value_of(first), first.error) == (0, None)
    assert "ends before it" in second.error
    file.unlink()
    assert all(s.error.startswith("cannot be read") for s in everything(pool))


def test_listing_a_shard_keeps_no_headers(tmp_path, monkeypatch):
    kept = []
    real = tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda self: kept.append(len(self.members)) or real(self))
    open_pool(str(shard(tmp_path / "x.tar", *((f"{i}.jpg", png(0)) for i in range(50)))))
    assert max(kept) <= 1


# --- datasets


@pytest.fixture
def data_set():
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "owl"]), "note": datasets.Value("string")}
    )
    rows = {
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(600)],
        "label": [i % 2 for i in range(599)] + [None],
        "note": [f"note {i}" for i in range(600)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_saved_data_set(tmp_path, data_set):
    data_set.save_to_disk(str(tmp_path / "data"), num_shards=2)
    pool = open_pool(str(tmp_path / "data"))
    assert (pool.kind, pool.num_rows, pool.class_names, pool.schema.names) == ("datasets", 600, ("ant", "owl"), ["note"])
    samples = list(read(pool, 250, 600))
    assert [s.row for s in samples] == list(range(250, 600))
    assert [value_of(s) for s in samples] == [min(row, 255) for row in range(250, 600)]
    assert [s.label for s in samples] == [row % 2 for row in range(250, 599)] + [None]
    assert (samples[0].id, samples[0].extra) == ("250.png", {"note": "note 250"})
    assert open_pool(str(tmp_path / "data")).digest == pool.digest
    refused(tmp_path / "data", "--split 'train'", "single data set", columns=Columns(split="train"))


def test_splits_of_a_saved_data_set(tmp_path, data_set):
    import datasets

    both = datasets.DatasetDict(train=data_set.select(range(10, 13)), test=data_set.select([5]))
    both.save_to_disk(str(tmp_path / "data"))
    pool = open_pool(str(tmp_path / "data"))
    assert [s.id for s in everything(pool)] == ["10.png", "11.png", "12.png"]
    test = open_pool(str(tmp_path / "data"), Columns(split="test"))
    assert [s.id for s in everything(test)] == ["5.png"]
    save_pool(test, Place(str(tmp_path / "pool.arrow")))
    assert [s.id for s in everything(load_pool(Place(str(tmp_path / "pool.arrow"))))] == ["5.png"]
    refused(tmp_path / "data", "no split 'val'", "test, train", columns=Columns(split="val"))


def test_boxes_of_a_data_set(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": datasets.Sequence(
                {
                    "bbox": datasets.Sequence(datasets.Value("float32"), length=4),
                    "category": datasets.ClassLabel(names=["a", "b"]),
                }
            ),
        }
    )
    objects = [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [1]}, {"bbox": [], "category": []}]
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(2)], "objects": objects}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "data"))
    pool = open_pool(str(tmp_path / "data"))
    assert (pool.class_names, pool.schema.names) == (("a", "b"), ["boxes"])
    first, second = everything(pool)
    assert [list(box.values()) for box in first.extra["boxes"]] == [[1, 1, 2, 3, 4, False]]
    assert (second.id, second.extra["boxes"]) == ("1", [])


def test_a_damaged_data_set_is_named(tmp_path, data_set):
    data_set.select(range(3)).save_to_disk(str(tmp_path / "data"))
    next((tmp_path / "data").glob("*.arrow")).write_bytes(b"nope")
    hub.load.cache_clear()
    refused(tmp_path / "data", "saved data set")


def test_names_on_the_hub():
    assert [hub.is_hub_name(f"hf://{name}") for name in ("cifar10", "uoft-cs/cifar10", "uoft-cs/cifar10/")] == [True] * 3
    others = ["hf://datasets/uoft-cs/cifar10/data/x.parquet", "hf://datasets/a", "hf://a/b/c", "s3://a/b", "a/b"]
    assert not any(hub.is_hub_name(name) for name in others)


def test_a_data_set_on_the_hub_is_asked_for_by_name_and_split(monkeypatch, data_set):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: asked.append((name, split)) or data_set)
    hub.load.cache_clear()
    pool = open_pool("hf://owner/name")
    assert (pool.kind, pool.num_rows, pool.uri) == ("datasets", 600, "hf://owner/name")
    open_pool("hf://owner/name", Columns(split="test"))
    assert asked == [("owner/name", "train"), ("owner/name", "test")]
    hub.load.cache_clear()


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.load.cache_clear()
    refused("hf://owner/never-there", "hf://owner/never-there", "hub")


# --- SVHN


def test_svhn(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    savemat(tmp_path / "train_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [9], [10]], np.uint8)})
    pool = open_pool(str(tmp_path / "train_32x32.mat"))
    assert (pool.kind, pool.num_rows, pool.class_names) == ("svhn", 4, tuple("0123456789"))
    samples = list(read(pool, 1, 4))
    assert [(s.row, s.id, s.label) for s in samples] == [(i, f"train_32x32.mat/{i}", y) for i, y in ((1, 0), (2, 9), (3, 0))]
    assert all(np.array_equal(np.asarray(s.data), pixels[..., s.row]) for s in samples)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "y"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([1])}, "(32, 32, 3, 2)"),
        ({"X": np.zeros((32, 32, 3, 1)), "y": np.array([1])}, "not SVHN"),
        ({"X": np.zeros((32, 32, 3, 1), np.uint8), "y": np.array([11])}, "11"),
        (b"nope", "x.mat"),
        (b"", "x.mat"),
    ],
)
def test_matlab_files_that_are_not_svhn_are_named(tmp_path, content, words):
    if isinstance(content, bytes):
        (tmp_path / "x.mat").write_bytes(content)
    else:
        savemat(tmp_path / "x.mat", content)
    refused(tmp_path / "x.mat", "x.mat", words)


# --- where pools lie


def test_a_folder_on_a_filesystem_that_only_fsspec_knows():
    import fsspec

    memory = fsspec.filesystem("memory")
    for value, name in enumerate(["dog/a b.png", "cat/100%.png", "cat/1.png"]):
        memory.pipe(f"/images/{name}", png(value))
    pool = open_pool("memory://images")
    assert pool.class_names == ("cat", "dog")
    assert [(s.id, value_of(s)) for s in everything(pool)] == [("cat/1.png", 2), ("cat/100%.png", 1), ("dog/a b.png", 0)]
    place = Place("memory://out/pool.arrow")
    save_pool(pool, place)
    assert [s.id for s in read(load_pool(place), 1, 3)] == ["cat/100%.png", "dog/a b.png"]
    memory.rm("/images/cat/1.png")
    assert everything(pool)[0].error.startswith("cannot be read")


def test_a_protocol_without_its_driver_names_the_package(monkeypatch):
    import fsspec

    def missing(protocol):
        raise ImportError("Install adlfs to access Azure Datalake Gen2 and Azure Blob Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    refused("az://container/images", "az://container/images", "driver for az://", "adlfs")


def test_a_protocol_that_nobody_knows_is_named():
    refused("zz://a/b", "zz://a/b", "none of the known", "s3", "http")


@contextlib.contextmanager
def web_server(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_list_of_web_addresses(tmp_path):
    make_folder(tmp_path / "web", ["0.png", "a b.png"])
    with web_server(tmp_path / "web") as host:
        urls = [f"{host}/0.png", f"{host}/a%20b.png", f"{host}/gone.png"]
        pool = open_pool(str(write(tmp_path / "list.parquet", {"url": urls})))
        first, second, gone = everything(pool)
    assert [(s.id, value_of(s)) for s in (first, second)] == [(urls[0], 0), (urls[1], 1)]
    assert gone.error.startswith("cannot be read")
    assert all(s.error.startswith("cannot be read") for s in everything(pool))


def test_a_list_on_the_web_names_images_beside_it(tmp_path):
    make_folder(tmp_path / "web", ["p/0.png", "p/a b.png"])
    (tmp_path / "web" / "list.csv").write_text("path\np/a b.png\np/0.png\n")
    with web_server(tmp_path / "web") as host:
        assert [value_of(s) for s in everything(open_pool(f"{host}/list.csv"))] == [1, 0]


# --- walking a folder


def test_rows_are_in_the_order_of_paths_whatever_the_directories(tmp_path):
    names = ["a/1.png", "a-b/1.png", "a.png", "a/b/c.png", "a/b.png", "a0.png", "Z.png", "é/x.png", "b/z/1.png", "b/z.png"]
    pool = open_pool(str(make_folder(tmp_path, names)))
    assert [s.id for s in everything(pool)] == sorted(names)
    assert pool.class_names == ("a", "a-b", "b", "é")
    assert [s.label for s in everything(pool)] == [
        pool.class_names.index(name.split("/")[0]) if "/" in name else None for name in sorted(names)
    ]


def test_the_order_in_which_a_directory_is_read_does_not_matter(tmp_path, monkeypatch):
    make_folder(tmp_path, [f"{i % 3}/{i}.png" for i in range(50)])
    first = open_pool(str(tmp_path))
    scan = os.scandir

    @contextlib.contextmanager
    def backwards(path):
        with scan(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr("engine.sources.walk.os.scandir", backwards)
    monkeypatch.setattr("engine.sources.walk.CHUNK", 3)
    again = open_pool(str(tmp_path))
    assert again.digest == first.digest
    assert again.listing.read(0, 50).equals(first.listing.read(0, 50))


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    make_folder(tmp_path / "elsewhere", ["1.png"])
    make_folder(tmp_path / "pool", ["cat/0.png"])
    (tmp_path / "pool" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pool" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert [s.id for s in everything(open_pool(str(tmp_path / "pool")))] == ["cat/0.png", "dog/1.png"]
    (tmp_path / "pool" / "cat" / "up").symlink_to(tmp_path / "pool")
    refused(tmp_path / "pool", "link to a folder above it", "cat/up")
