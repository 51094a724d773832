"""Pools of images: folders, Parquet, CIFAR's own files."""

import io
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pools import IMAGE, everything, images_column, make_folder, png, refused, value_of, write

from engine.places import Place
from engine.schema import InputError
from engine.sources import Columns, load_pool, open_pool, read, save_pool

# --- image folder


def test_a_folder_a_class_gives_labels_in_name_order(tmp_path):
    pool = open_pool(str(make_folder(tmp_path, ["dog/1.png", "cat/2.png", "cat/1.jpg", "ape/9.jpeg"])))
    assert (pool.kind, pool.num_rows, pool.class_names) == ("folder", 4, ("ape", "cat", "dog"))
    samples = everything(pool)
    assert [s.row for s in samples] == [0, 1, 2, 3]
    assert [s.id for s in samples] == ["ape/9.jpeg", "cat/1.jpg", "cat/2.png", "dog/1.png"]
    assert [s.label for s in samples] == [0, 1, 1, 2]
    assert [value_of(s) for s in samples] == [3, 2, 1, 0]
    assert [s.uri for s in samples] == [f"{tmp_path}/{s.id}" for s in samples]
    assert all(s.error is None for s in samples)


def test_a_flat_folder_has_no_labels(tmp_path):
    pool = open_pool(str(make_folder(tmp_path, ["b.png", "a.png"])))
    assert pool.class_names is None
    assert [(s.id, s.label) for s in everything(pool)] == [("a.png", None), ("b.png", None)]


def test_nested_folders_are_labelled_by_the_first(tmp_path):
    pool = open_pool(str(make_folder(tmp_path, ["b/x/y/1.png", "a/z/1.png", "a/1.png", "loose.png"])))
    assert [(s.id, s.label) for s in everything(pool)] == [
        ("a/1.png", 0),
        ("a/z/1.png", 0),
        ("b/x/y/1.png", 1),
        ("loose.png", None),
    ]


def test_odd_names_are_kept_and_files_that_are_no_images_left_out(tmp_path):
    odd = ["Ärger/Größe 1.PNG", 'with space/it\'s "quoted".jpg', "with space/100% #1 ?.png", "z.TiFf"]
    make_folder(tmp_path, [*odd, ".hidden.png", "cat/.DS_Store", "cat/notes.txt", "cat/noending", "cat/.png"])
    pool = open_pool(str(tmp_path))
    assert [s.id for s in everything(pool)] == sorted(odd)
    assert [value_of(s) for s in everything(pool)] == [odd.index(name) for name in sorted(odd)]
    assert pool.class_names == ("with space", "Ärger")


def test_hidden_folders_are_left_out(tmp_path):
    pool = open_pool(str(make_folder(tmp_path, [".ipynb_checkpoints/1.png", "cat/1.png", "cat/.thumbnails/1.png"])))
    assert [s.id for s in everything(pool)] == ["cat/1.png"]
    assert pool.class_names == ("cat",)


@pytest.mark.parametrize("name", ["train", "test_batch", "data_batch_1"])
def test_a_class_folder_named_like_a_cifar_batch_is_a_class_folder(tmp_path, name):
    pool = open_pool(str(make_folder(tmp_path, [f"{name}/1.png", "apple/1.png"])))
    assert (pool.kind, pool.num_rows) == ("folder", 2)
    assert pool.class_names == ("apple", name)


def test_a_name_that_is_not_utf8_is_no_crash(tmp_path):
    make_folder(tmp_path, ["a.png"])
    with open(os.fsencode(str(tmp_path)) + b"/caf\xe9.png", "wb") as file:
        file.write(png(9))
    try:
        outcome = open_pool(str(tmp_path)).num_rows
    except InputError as error:
        outcome = str(error)
    assert outcome == 2 or "caf" in outcome


def test_any_range_of_a_folder_gives_those_rows(tmp_path):
    pool = open_pool(str(make_folder(tmp_path, [f"{i}.png" for i in range(5)])))
    assert [(s.row, value_of(s)) for s in read(pool, 2, 4)] == [(2, 2), (3, 3)]
    assert list(read(pool, 5, 5)) == []


def test_a_file_that_is_gone_is_a_sample_with_an_error(tmp_path):
    pool = open_pool(str(make_folder(tmp_path, ["a.png", "b.png"])))
    (tmp_path / "a.png").unlink()
    gone, there = everything(pool)
    assert gone.error.startswith("cannot be read")
    assert (there.error, value_of(there)) == (None, 1)


def test_a_pool_may_be_a_uri(tmp_path):
    make_folder(tmp_path, ["a/1.png"])
    assert open_pool(f"file://{tmp_path}").digest == open_pool(str(tmp_path)).digest


# --- Parquet

HUGGINGFACE = {
    "info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["plane", "car", "bird"], "_type": "ClassLabel"}}}
}


def test_hugging_face_convention(tmp_path):
    metadata = {"huggingface": json.dumps(HUGGINGFACE)}
    columns = {"image": images_column([5, 6, 7, 8]), "label": pa.array([2, None, 0, -1])}
    file = write(tmp_path / "x.parquet", columns, metadata=metadata)
    pool = open_pool(str(file))
    assert (pool.kind, pool.num_rows, pool.class_names) == ("parquet", 4, ("plane", "car", "bird"))
    samples = everything(pool)
    assert [s.id for s in samples] == ["img_5.png", "img_6.png", "img_7.png", "img_8.png"]
    assert [s.label for s in samples] == [2, None, 0, None]
    assert [value_of(s) for s in samples] == [5, 6, 7, 8]
    assert samples[3].uri == f"{file}#3"


@pytest.mark.parametrize("paths", [["a", "b", "a"], ["a", None, "c"]], ids=["twice", "missing"])
def test_paths_that_do_not_name_the_rows_are_not_their_ids(tmp_path, paths):
    pool = open_pool(str(write(tmp_path / "x.parquet", {"image": images_column([1, 2, 3], paths)})))
    assert [s.id for s in everything(pool)] == ["0", "1", "2"]


def test_an_id_column_goes_before_paths(tmp_path):
    pool = open_pool(str(write(tmp_path / "x.parquet", {"image": images_column([1, 2]), "id": pa.array([70, 50])})))
    assert [s.id for s in everything(pool)] == ["70", "50"]


@pytest.mark.parametrize(
    ("ids", "words"),
    [(["a", "b", "b"], ["ids must differ", "'b'", "rows 1 and 2"]), (["a", None, "c"], ["row 1 has no id"])],
    ids=["twice", "missing"],
)
def test_ids_that_are_not_ids_are_named(tmp_path, ids, words):
    refused(write(tmp_path / "x.parquet", {"image": images_column([1, 2, 3]), "id": pa.array(ids)}), *words)


def test_ids_are_compared_over_all_files(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", {"image": images_column([1]), "id": pa.array(["same"])})
    refused(tmp_path, "'same'", "rows 0 and 1")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_string_labels_are_numbered_in_name_order_over_all_files(tmp_path, kind):
    write(tmp_path / "a.parquet", {"image": images_column([1, 2]), "label": pa.array(["dog", None], kind)})
    write(tmp_path / "b.parquet", {"image": images_column([3, 4]), "label": pa.array(["cat", ""], kind)})
    pool = open_pool(str(tmp_path))
    assert pool.class_names == ("cat", "dog")
    assert [s.label for s in everything(pool)] == [1, None, 0, None]


@pytest.fixture
def many_groups(tmp_path):
    """Seven rows in three files of 3, 3 and 1 rows, in groups of two: (0 1)(2) (3 4)(5) (6)."""
    write(tmp_path / "b" / "0.parquet", {"image": images_column([3, 4, 5]), "label": pa.array([3, 4, 5])}, group=2)
    write(tmp_path / "a.parquet", {"image": images_column([0, 1, 2]), "label": pa.array([0, 1, 2])}, group=2)
    write(tmp_path / "c.parquet", {"image": images_column([6]), "label": pa.array([6])}, group=2)
    return open_pool(str(tmp_path))


def test_row_groups_are_listed_in_order(many_groups):
    assert many_groups.listing.read(0, 5).to_pydict() == {
        "file": ["a.parquet", "a.parquet", "b/0.parquet", "b/0.parquet", "c.parquet"],
        "group": [0, 1, 0, 1, 0],
        "start": [0, 2, 3, 5, 6],
        "count": [2, 1, 2, 1, 1],
    }


@pytest.mark.parametrize(("start", "stop"), [(a, b) for a in range(8) for b in range(a, 8)])
def test_ranges_cross_row_groups_and_files(many_groups, start, stop):
    found = [(s.row, value_of(s), s.label, s.id) for s in read(many_groups, start, stop)]
    assert found == [(row, row, row, f"img_{row}.png") for row in range(start, stop)]


@pytest.mark.parametrize(("start", "stop"), [(0, 150), (0, 1), (63, 66), (64, 128), (100, 149), (149, 150)])
def test_a_large_row_group_is_read_in_pieces(tmp_path, monkeypatch, start, stop):
    monkeypatch.setattr("engine.sources.parquet.HELD_BYTES", 1000)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.read_row_group", None)
    columns = {"image": images_column(range(150)), "n": pa.array(range(150))}
    pool = open_pool(str(write(tmp_path / "x.parquet", columns, group=150)))
    found = [(s.row, value_of(s), s.id, s.extra) for s in read(pool, start, stop)]
    assert found == [(row, row, f"img_{row}.png", {"n": row}) for row in range(start, stop)]


def test_other_files_in_a_parquet_folder_are_left_alone(tmp_path):
    write(tmp_path / "x.parquet", {"image": images_column([1])})
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "cover.png").write_bytes(png(1))
    assert open_pool(str(tmp_path)).num_rows == 1


def test_a_folder_named_like_a_parquet_file_is_a_folder(tmp_path):
    write(tmp_path / "train.parquet" / "part-0.parquet", {"image": images_column([1, 2])})
    assert open_pool(str(tmp_path)).num_rows == 2
    assert open_pool(str(tmp_path / "train.parquet")).num_rows == 2


def test_a_column_of_paths_is_read_beside_the_file(tmp_path):
    make_folder(tmp_path / "pictures", ["0.png", "1.png"])
    elsewhere = make_folder(tmp_path / "elsewhere", ["2.png", "other.png"])
    paths = ["pictures/1.png", str(elsewhere / "other.png"), "pictures/none.png"]
    samples = everything(open_pool(str(write(tmp_path / "x.parquet", {"image": pa.array(paths)}))))
    assert [value_of(s) for s in samples[:2]] == [1, 1]
    assert samples[2].error.startswith("cannot be read")
    assert [s.id for s in samples] == paths


def test_an_image_without_bytes_is_read_from_its_path(tmp_path):
    make_folder(tmp_path, ["0.png", "1.png"])
    values = [{"bytes": None, "path": "1.png"}, {"bytes": None, "path": None}]
    there, nothing = everything(open_pool(str(write(tmp_path / "x.parquet", {"image": pa.array(values, IMAGE)}))))
    assert value_of(there) == 1
    assert nothing.error == "no image in this row"


def test_bytes_may_stand_alone_and_under_another_name(tmp_path):
    raw = write(tmp_path / "a.parquet", {"photo": pa.array([png(4)]), "kind": pa.array([9])})
    pool = open_pool(str(raw), Columns(image="photo", label="kind"))
    assert [(value_of(s), s.label) for s in everything(pool)] == [(4, 9)]
    only_struct = open_pool(str(write(tmp_path / "b.parquet", {"photo": images_column([3])})))
    assert value_of(everything(only_struct)[0]) == 3


def test_columns_that_are_not_there_are_named(tmp_path):
    file = write(tmp_path / "x.parquet", {"picture": pa.array([png(1)]), "n": pa.array([0.5])})
    refused(file, "no image column", "picture, n", "--image-column")
    refused(file, "no column 'img'", "picture, n", columns=Columns(image="img"))
    refused(file, "no column 'label'", "picture, n", columns=Columns(image="picture", label="label"))
    refused(file, "'n' is double", columns=Columns(image="picture", label="n"))


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_text("nope")
    refused(tmp_path / "bad.parquet", "bad.parquet")


def test_files_of_other_columns_are_named(tmp_path):
    write(tmp_path / "a.parquet", {"image": images_column([1]), "label": pa.array([1])})
    write(tmp_path / "b.parquet", {"picture": images_column([1])})
    refused(tmp_path, "b.parquet")


def test_a_parquet_file_that_was_rewritten_is_read_again(tmp_path):
    file = write(tmp_path / "x.parquet", {"image": images_column([1])})
    assert value_of(everything(open_pool(str(file)))[0]) == 1
    write(file, {"image": images_column([200])})
    assert value_of(everything(open_pool(str(file)))[0]) == 200


def test_real_parquet(shared):
    pool = open_pool(str(shared / "cifar10" / "train.parquet"))
    assert pool.num_rows == 50_000
    assert pool.class_names[:3] == ("airplane", "automobile", "bird")
    samples = list(read(pool, 1998, 2003))  # row groups have 2,000 rows
    assert [s.id for s in samples] == [f"train_{row:05d}.jpg" for row in range(1998, 2003)]
    assert {Image.open(io.BytesIO(s.data)).size for s in samples} == {(32, 32)}


# --- CIFAR


def cifar_pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def write_binary(file, pixels, *labels):
    columns = [np.asarray(column, np.uint8)[:, None] for column in labels]
    np.concatenate([*columns, pixels.reshape(len(pixels), -1)], axis=1).tofile(file)


def same_pixels(samples, pixels):
    return all(np.array_equal(np.asarray(s.data), p.transpose(1, 2, 0)) for s, p in zip(samples, pixels, strict=True))


def test_cifar10_binary(tmp_path):
    pixels = cifar_pixels(5)
    write_binary(tmp_path / "data_batch_1.bin", pixels[:3], [9, 0, 4])
    write_binary(tmp_path / "data_batch_2.bin", pixels[3:], [7, 7])
    write_binary(tmp_path / "test_batch.bin", cifar_pixels(2, seed=1), [1, 2])
    (tmp_path / "batches.meta.txt").write_text("airplane\nautomobile\n\n")
    pool = open_pool(str(tmp_path))
    assert (pool.kind, pool.num_rows, pool.class_names) == ("cifar", 5, ("airplane", "automobile"))
    samples = list(read(pool, 1, 5))
    assert [(s.row, s.label) for s in samples] == [(1, 0), (2, 4), (3, 7), (4, 7)]
    assert [s.id for s in samples] == ["data_batch_1.bin/1", "data_batch_1.bin/2", "data_batch_2.bin/0", "data_batch_2.bin/1"]
    assert same_pixels(samples, pixels[1:])
    test = open_pool(str(tmp_path / "test_batch.bin"))
    assert [s.label for s in everything(test)] == [1, 2]
    assert test.class_names == ("airplane", "automobile")


def test_cifar100_binary_has_fine_labels(tmp_path):
    pixels = cifar_pixels(2)
    write_binary(tmp_path / "train.bin", pixels, [1, 2], [50, 99])
    (tmp_path / "fine_label_names.txt").write_text("apple\nfish\n")
    (tmp_path / "coarse_label_names.txt").write_text("fruit\nanimal\n")
    pool = open_pool(str(tmp_path))
    samples = everything(pool)
    assert [s.label for s in samples] == [50, 99]
    assert pool.class_names == ("apple", "fish")
    assert same_pixels(samples, pixels)


@pytest.mark.parametrize("key", [b"labels", b"fine_labels"])
def test_cifar_pickles(tmp_path, key):
    pixels = cifar_pixels(3)
    batch = {b"data": pixels.reshape(3, -1), key: [4, 0, 2], b"filenames": [b"x.png"] * 3, b"batch_label": b"1 of 5"}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=2))
    pool = open_pool(str(tmp_path))
    samples = everything(pool)
    assert [(s.id, s.label) for s in samples] == [("data_batch_1/0", 4), ("data_batch_1/1", 0), ("data_batch_1/2", 2)]
    assert same_pixels(samples, pixels)


def test_cifar_pickles_as_published(tmp_path):
    """The original files were pickled by Python 2 and an old numpy, which called its module numpy.core."""
    pixels = cifar_pixels(2)
    data = pickle.dumps({b"data": pixels.reshape(2, -1), b"fine_labels": [3, 1], b"coarse_labels": [0, 0]}, protocol=2)
    old = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert old != data
    (tmp_path / "train").write_bytes(old)
    samples = everything(open_pool(str(tmp_path / "train")))
    assert [s.label for s in samples] == [3, 1]
    assert same_pixels(samples, pixels)


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    victim = tmp_path / "victim"
    evil = {b"data": Malicious(f"touch {victim}"), b"labels": [1]}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(evil, protocol=2))
    refused(tmp_path, "may not contain", "system")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("data_batch_1.bin", bytes(3074)),
        ("data_batch_1.bin", b""),
        ("data_batch_1", b"no pickle"),
        ("data_batch_1", b""),
        ("data_batch_1", pickle.dumps([1, 2], protocol=2)),
        ("data_batch_1", pickle.dumps({b"labels": [1]}, protocol=2)),
        ("data_batch_1", pickle.dumps({b"data": np.zeros((1, 7), np.uint8), b"labels": [1]}, protocol=2)),
    ],
    ids=["odd-size", "empty-bin", "text", "empty", "list", "no-data", "narrow"],
)
def test_damaged_cifar_files_are_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    refused(tmp_path, name)


def test_a_cifar_file_that_was_rewritten_is_read_again(tmp_path):
    write_binary(tmp_path / "data_batch_1.bin", cifar_pixels(1), [1])
    assert open_pool(str(tmp_path)).num_rows == 1
    write_binary(tmp_path / "data_batch_1.bin", cifar_pixels(2), [1, 2])
    assert open_pool(str(tmp_path)).num_rows == 2


# --- any pool


def test_pools_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("a")
    (tmp_path / "single.png").write_bytes(png(1))
    write(tmp_path / "none.parquet", {"image": images_column([])})
    refused(tmp_path / "nowhere", "nowhere", "does not exist")
    refused(tmp_path / "empty", "empty'", "is empty", ".png")
    refused(tmp_path / "words", "words", "is empty")
    refused(tmp_path / "none.parquet", "none.parquet", "is empty")
    refused(tmp_path / "single.png", "single.png", "neither a CIFAR batch nor one of", ".parquet")


def make_pool(kind, folder):
    if kind == "folder":
        return make_folder(folder, ["cat/0.png", "dog/1.png", "dog/2.png"])
    if kind == "parquet":
        write(folder / "a.parquet", {"image": images_column([1, 2, 3]), "label": pa.array(["x", "y", "x"])}, group=2)
    else:
        write_binary(folder / "data_batch_1.bin", cifar_pixels(3), [1, 2, 3])
    return folder


@pytest.mark.parametrize("kind", ["folder", "parquet", "cifar"])
def test_a_saved_listing_is_the_same_pool(tmp_path, kind):
    (tmp_path / "pool").mkdir()
    pool = open_pool(str(make_pool(kind, tmp_path / "pool")))
    assert pool.kind == kind
    save_pool(pool, Place(str(tmp_path / "pool.arrow")))
    again = load_pool(Place(str(tmp_path / "pool.arrow")))
    assert again.listing.read(0, 9).equals(pool.listing.read(0, 9))
    for name in ("uri", "kind", "num_rows", "digest", "class_names", "detail", "schema"):
        assert getattr(again, name) == getattr(pool, name)
    assert [(s.row, s.id, s.label) for s in read(again, 1, 3)] == [(s.row, s.id, s.label) for s in read(pool, 1, 3)]


@pytest.mark.parametrize("kind", ["folder", "parquet", "cifar"])
def test_the_digest_follows_the_files_and_nothing_else(tmp_path, kind):
    folder = make_pool(kind, tmp_path)
    first = open_pool(str(folder)).digest
    assert open_pool(str(folder)).digest == first
    assert open_pool(f"{folder}/").digest == first
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(png(1))
    assert open_pool(str(folder)).digest == first
    file = next(
        path for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".parquet", ".bin") and path.name[0] != "."
    )
    before = file.stat().st_mtime_ns
    os.utime(file, ns=(before, before + 1_000_000))
    assert open_pool(str(folder)).digest != first
    os.utime(file, ns=(before, before))
    assert open_pool(str(folder)).digest == first
    file.rename(file.with_name("data_batch_2.bin" if kind == "cifar" else f"other{file.suffix}"))
    assert open_pool(str(folder)).digest != first


def test_the_digest_knows_which_columns_were_read(tmp_path):
    file = write(tmp_path / "x.parquet", {"image": images_column([1]), "label": pa.array([1]), "fine": pa.array([2])})
    assert open_pool(str(file)).digest != open_pool(str(file), Columns(label="fine")).digest
