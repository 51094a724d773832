"""Published folders, and the feature store."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from engine.folders import FORMAT, begin, digest_of, publish, read_manifest, to_json
from engine.ingest import import_features
from engine.places import Place
from engine.schema import BLOCK_ROWS, InputError
from engine.store import FeatureStore, part_bytes, part_name, table_bytes, vectors_array, vectors_numpy
from engine.verbs import ImportOptions

INPUTS, OPTIONS = {"pool": {"digest": "abc"}}, {"size": 2, "mean": (0.5, 1.0), "name": "x"}


def claim(place, inputs=INPUTS, options=OPTIONS, kind="features", overwrite=False):
    return begin(place, kind, inputs, options, overwrite)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def place(tmp_path):
    return Place(str(tmp_path / "out"))


# --- begin and publish


def test_a_new_folder_is_claimed_by_its_run(place, tmp_path):
    assert claim(place) is None
    assert list(tree(tmp_path / "out")) == ["run.json"]
    assert json.loads(place.at("run.json").read()) == {
        "kind": "features",
        "inputs": {"pool": {"digest": "abc"}},
        "options": {"size": 2, "mean": [0.5, 1.0], "name": "x"},
    }


def test_an_empty_folder_may_be_claimed(place, tmp_path):
    (tmp_path / "out").mkdir()
    assert claim(place) is None
    assert place.at("run.json").exists()


def test_the_same_run_goes_on(place, tmp_path):
    claim(place)
    place.at("parts", "part-0").write(b"work")
    before = tree(tmp_path / "out")
    assert claim(place) is None
    assert claim(place, options={"name": "x", "mean": [0.5, 1.0], "size": 2}) is None
    assert tree(tmp_path / "out") == before


def test_a_published_run_is_given_back(place, tmp_path):
    claim(place)
    manifest = publish(place, {"num_rows": 3, "digest": "d"})
    before = tree(tmp_path / "out")
    assert claim(place) == manifest == read_manifest(place)
    assert tree(tmp_path / "out") == before
    assert (manifest["format"], manifest["kind"], manifest["num_rows"], manifest["inputs"]) == (FORMAT, "features", 3, INPUTS)
    assert set(manifest["versions"]) == {"coresift", "numpy", "pyarrow", "ray", "torch", "timm"}
    assert manifest["published"].endswith("+00:00")


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"options": {**OPTIONS, "size": 3}}, "(options.size 2 -> 3)"),
        ({"options": {"size": 2, "mean": (0.5, 1.0)}}, '(options.name "x" -> null)'),
        ({"options": {**OPTIONS, "mean": (0.5,)}}, "(options.mean [0.5, 1.0] -> [0.5])"),
        ({"inputs": {"pool": {"digest": "xyz"}}}, '(inputs.pool.digest "abc" -> "xyz")'),
        ({"kind": "selection"}, '(kind "features" -> "selection")'),
        ({"options": {"a": 1, "b": 1, "c": 1}}, "(options.a null -> 1; options.b null -> 1; options.c null -> 1; "),
    ],
)
def test_another_run_is_refused_and_told_what_differs(place, tmp_path, published, changed, words):
    claim(place)
    if published:
        publish(place, {})
    before = tree(tmp_path / "out")
    with pytest.raises(InputError) as caught:
        claim(place, **changed)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/out {'is published' if published else 'was begun'} with other inputs {words}")
    assert message.endswith("choose another --out, or pass --overwrite")
    assert ("and 2 more" in message) == (len(changed.get("options", {})) == 3 and "a" in changed["options"])
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("published", [False, True])
def test_overwrite_empties_a_folder_of_ours(place, tmp_path, published):
    claim(place)
    place.at("parts", "part-0").write(b"work")
    if published:
        publish(place, {})
    assert claim(place, options={"size": 9}, overwrite=True) is None
    assert list(tree(tmp_path / "out")) == ["run.json"]
    assert json.loads(place.at("run.json").read())["options"] == {"size": 9}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_refused(place, tmp_path, overwrite):
    place.at("thesis.tex").write(b"precious")
    with pytest.raises(InputError, match=r"holds files that are not coresift's \('thesis\.tex'\)"):
        claim(place, overwrite=overwrite)
    assert tree(tmp_path / "out") == {"thesis.tex": b"precious"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["manifest.json", "run.json"])
@pytest.mark.parametrize("data", [b'{"name": "a web app"}', b"[]", b"no json"], ids=["object", "list", "text"])
def test_another_programs_manifest_does_not_make_a_folder_ours(place, tmp_path, name, data, overwrite):
    """Web apps and browser extensions have a manifest.json as well."""
    place.at(name).write(data)
    place.at("src", "precious.js").write(b"precious")
    before = tree(tmp_path / "out")
    with pytest.raises(InputError, match="out"):
        claim(place, overwrite=overwrite)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_folder(tmp_path, overwrite):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="file is a file"):
        claim(Place(str(tmp_path / "file")), overwrite=overwrite)
    with pytest.raises(InputError, match="file"):
        claim(Place(str(tmp_path / "file" / "below")), overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_manifest_of_another_format_is_refused_by_number(place):
    place.at("manifest.json").write(to_json({"format": 2, "kind": "features"}))
    with pytest.raises(InputError, match="has format 2; this version reads format 1"):
        read_manifest(place)
    with pytest.raises(InputError, match="has format 2"):
        FeatureStore(place.uri)


def test_no_manifest_is_none(place):
    assert read_manifest(place) is None
    claim(place)
    assert read_manifest(place) is None


# --- files


def test_a_write_is_whole_and_leaves_nothing_else(tmp_path):
    file = Place(str(tmp_path)).at("a", "b", "x.bin")
    file.write(b"old")
    file.write(pa.py_buffer(b"newer"))
    assert file.read() == b"newer"
    assert tree(tmp_path) == {"a/b/x.bin": b"newer"}


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch, broken):
    file = Place(str(tmp_path / "x.bin"))
    file.write(b"old")
    if broken == "replace":

        def fail(*arguments):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((TypeError, OSError)):
        file.write("text is no bytes" if broken == "write" else b"new")
    assert tree(tmp_path) == {"x.bin": b"old"}


def test_names_are_sorted_and_empty_where_there_is_nothing(tmp_path):
    place = Place(str(tmp_path))
    for name in ("b", "a", "ü"):
        place.at(name).write(b"")
    assert place.names() == ["a", "b", "ü"]
    assert place.at("nowhere").names() == []


@pytest.mark.parametrize("name", ["plain.png", "with space.png", "Größe.png", "100%.png", "a#b.png", "a?b.png", "a%20b.png"])
def test_a_uri_finds_files_of_any_name(tmp_path, name):
    """As on an object store, where pools are named by URI and the names below it are read from listings."""
    (tmp_path / name).write_bytes(b"x")
    assert Place(f"file://{tmp_path}").at(name).read() == b"x"


def test_a_uri_of_no_filesystem_is_named():
    with pytest.raises(InputError, match="cannot open 'nowhere://x/y'"):
        Place("nowhere://x/y").exists()


def test_a_relative_place_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Place("out").absolute == str(tmp_path / "out")
    assert Place(f"file://{tmp_path}/out").absolute == str(tmp_path / "out")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Place("~/out").absolute == str(tmp_path / "out")


def test_digests_do_not_depend_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": (1, 2)}) == digest_of({"b": [1, 2], "a": 1}) != digest_of({"a": 1, "b": [2, 1]})
    assert digest_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_part_names_sort_as_their_numbers():
    assert part_name(64) == "part-000000000064.arrow"
    assert sorted(map(part_name, (0, 8192, 64, 10**9))) == [part_name(n) for n in (0, 64, 8192, 10**9)]


def test_the_same_table_has_the_same_bytes():
    chunks = pa.chunked_array([[1, 2], [3]])
    whole = pa.table({"x": pa.array([1, 2, 3])})
    assert part_bytes(pa.table({"x": chunks})).equals(part_bytes(whole))
    assert table_bytes(whole).equals(table_bytes(whole))
    assert pa.ipc.open_file(part_bytes(pa.table({"x": chunks}))).num_record_batches == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_in_arrow_and_back(dtype):
    values = np.arange(12, dtype=dtype).reshape(4, 3)
    array = vectors_array(values)
    assert array.type == pa.list_(pa.from_numpy_dtype(dtype), 3)
    assert np.array_equal(vectors_numpy(pa.chunked_array([array])), values)
    assert np.array_equal(vectors_numpy(pa.chunked_array([array[:1], array[:0], array[1:]])), values)
    assert vectors_numpy(pa.chunked_array([array[:0]])).shape == (0, 3)
    assert vectors_numpy(pa.chunked_array([array[2:]])).tolist() == values[2:].tolist()


# --- the feature store


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    """8,292 vectors (row, 2 * row), labels row % 5, with block 1 beginning at row 8,192."""
    folder = tmp_path_factory.mktemp("two")
    rows = np.arange(BLOCK_ROWS + 100)
    np.savez(folder / "x.npz", features=np.stack([rows, 2 * rows], axis=1).astype(np.float32), labels=rows % 5)
    import_features(ImportOptions(file=str(folder / "x.npz"), out=str(folder / "out")))
    return FeatureStore(str(folder / "out"))


def test_what_a_store_says_of_itself(two_blocks):
    assert (two_blocks.num_rows, two_blocks.num_vectors, two_blocks.dim) == (8292, 8292, 2)
    assert (two_blocks.block_rows, two_blocks.num_blocks, two_blocks.has_labels) == (8192, 2, True)
    assert two_blocks.rows.tolist() == list(range(8292))
    assert two_blocks.labels[:7].tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_vectors_come_in_the_order_asked(two_blocks):
    rows = np.array([8291, 0, 8192, 8191, 0, 5])
    assert two_blocks.vectors(rows).tolist() == [[row, 2 * row] for row in rows.tolist()]
    assert two_blocks.ids(rows) == ["8291", "0", "8192", "8191", "0", "5"]
    assert two_blocks.vectors(rows[:0]).shape == (0, 2)
    assert two_blocks.vectors().shape == (8292, 2)


@pytest.mark.parametrize("row", [8292, 16384, -1])
def test_rows_that_are_not_there_are_refused(two_blocks, row):
    with pytest.raises(InputError, match=str(row)):
        two_blocks.vectors(np.array([3, row]))


def test_blocks_hold_their_rows_and_the_columns_asked(two_blocks):
    assert two_blocks.read_block(1, ["label", "row"]).column_names == ["label", "row"]
    assert two_blocks.read_block(1, ["row"])["row"].to_pylist() == list(range(8192, 8292))
    assert two_blocks.read_block(0).column_names == ["row", "id", "label", "embedding"]
    assert len(two_blocks.read_block(0)) == 8192


def test_small_columns_of_a_local_store_are_views_of_its_files(two_blocks):
    before = pa.total_allocated_bytes()
    columns = [two_blocks.read_column(name) for name in ("row", "id")]
    assert pa.total_allocated_bytes() == before
    assert all(len(column) == two_blocks.num_vectors for column in columns)


def test_small_columns_from_elsewhere_keep_nothing_else_in_memory(tmp_path, monkeypatch):
    class Elsewhere(pafs.SubTreeFileSystem):
        """A filesystem that is not the local one."""

    rows, dim = 4096, 256
    np.save(tmp_path / "x.npy", np.zeros((rows, dim), np.float32))
    import_features(ImportOptions(file=str(tmp_path / "x.npy"), out=str(tmp_path / "features")))
    store = FeatureStore(str(tmp_path / "features"))
    elsewhere = Elsewhere(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(Place, "opened", property(lambda self: (elsewhere, self.uri.removeprefix(str(tmp_path) + "/"))))
    before = pa.total_allocated_bytes()
    column = store.read_column("row")
    assert column.to_pylist() == list(range(rows))
    assert pa.total_allocated_bytes() - before < 4 * 8 * rows
    assert store.vectors(np.array([7], dtype=np.int64)).shape == (1, dim)


def test_a_store_may_be_opened_by_uri(two_blocks):
    store = FeatureStore(f"file://{two_blocks.place.path}")
    assert store.vectors(np.array([8192])).tolist() == [[8192, 16384]]


def test_folders_that_are_no_store_say_what_they_are(tmp_path, place):
    with pytest.raises(InputError, match=r"nowhere does not exist: give the folder that `coresift embed`"):
        FeatureStore(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"is not a feature store \(no manifest\.json\)"):
        FeatureStore(str(tmp_path))
    claim(place)
    with pytest.raises(InputError, match="out is unfinished: run the command that began it again"):
        FeatureStore(place.uri)
    claim(place, kind="selection", overwrite=True)
    publish(place, {})
    with pytest.raises(InputError, match="out is a selection folder, not features"):
        FeatureStore(place.uri)
