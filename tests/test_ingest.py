"""Vectors that a user has already -> features/."""

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from engine.ingest import import_features
from engine.schema import BLOCK_ROWS, InputError
from engine.store import FeatureStore
from engine.verbs import ImportOptions

X = np.array([[1.5, -2.0], [0.25, 4.0], [3.0, 0.0]], np.float32)


def do_import(file, **given):
    out = f"{file}.store"
    manifest = import_features(ImportOptions(file=str(file), out=out, **given))
    return manifest, FeatureStore(out)


def refused(file, *words, **given):
    with pytest.raises(InputError) as caught:
        do_import(file, **given)
    for word in (file.name, *words):
        assert str(word) in str(caught.value)
    assert "\n" not in str(caught.value)


def npy(folder, x):
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


def npz(folder, x=X, **arrays):
    np.savez(folder / "x.npz", features=x, **arrays)
    return folder / "x.npz"


def lists(x, kind=None):
    return pa.array([list(row) for row in np.asarray(x).tolist()], kind or pa.list_(pa.float32()))


def parquet(folder, **columns):
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


# --- files


def test_npy(tmp_path):
    manifest, store = do_import(npy(tmp_path, X))
    assert np.array_equal(store.vectors(), X)
    assert store.rows.tolist() == [0, 1, 2]
    assert store.ids(store.rows) == ["0", "1", "2"]
    assert store.labels.tolist() == [-1, -1, -1]
    assert (store.num_rows, store.num_vectors, store.dim, store.has_labels, store.class_names) == (3, 3, 2, False, None)
    assert (manifest["num_rejected"], manifest["num_labeled"], manifest["dtype"]) == (0, 0, "float32")
    assert manifest["pool"] == {"uri": str(tmp_path / "x.npy"), "kind": "import"}
    assert manifest["encoder"] == {"name": "imported"}


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint8", ">f4"])
def test_any_numbers_become_float32(tmp_path, dtype):
    x = np.array([[1, 2], [3, 4], [250, 0]]).astype(dtype)
    _, store = do_import(npy(tmp_path, x))
    assert store.vectors().dtype == np.float32
    assert store.vectors().tolist() == [[1, 2], [3, 4], [250, 0]]


def test_fortran_order_and_views(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(do_import(npy(tmp_path, np.asfortranarray(x)))[1].vectors(), x)


def test_npz_with_ids_and_labels(tmp_path):
    manifest, store = do_import(npz(tmp_path, ids=np.array(["b", "a", "ü"]), labels=np.array([2, -1, 0])))
    assert store.ids(store.rows) == ["b", "a", "ü"]
    assert store.labels.tolist() == [2, -1, 0]
    assert manifest["num_labeled"] == 2
    assert np.array_equal(store.vectors(np.array([2, 0])), X[[2, 0]])


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "uint16", "float32"])
def test_whole_numbers_of_any_type_are_labels(tmp_path, dtype):
    _, store = do_import(npz(tmp_path, labels=np.array([2, 0, 1], dtype)))
    assert store.labels.tolist() == [2, 0, 1]


def test_string_labels_are_numbered_in_name_order(tmp_path):
    manifest, store = do_import(npz(tmp_path, labels=np.array(["dog", "", "cat"])))
    assert manifest["class_names"] == ["cat", "dog"]
    assert store.labels.tolist() == [1, -1, 0]
    assert manifest["num_labeled"] == 2


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 2), pa.list_(pa.int64())]
)
def test_parquet(tmp_path, kind):
    x = X.round().astype(int) if pa.types.is_integer(kind.value_type) else X
    columns = {"vector": lists(x, kind), "id": pa.array([7, 8, 9]), "label": pa.array([1, None, 0])}
    _, store = do_import(parquet(tmp_path, **columns))
    assert np.array_equal(store.vectors(), x)
    assert store.ids(store.rows) == ["7", "8", "9"]
    assert store.labels.tolist() == [1, -1, 0]


def test_parquet_columns_may_be_named(tmp_path):
    columns = {"a": lists(X), "b": lists(X + 1), "name": pa.array(["x", "y", "z"]), "kind": pa.array(["q", "p", "q"])}
    file = parquet(tmp_path, **columns)
    manifest, store = do_import(file, column="b", id_column="name", label_column="kind")
    assert np.array_equal(store.vectors(), X + 1)
    assert store.ids(store.rows) == ["x", "y", "z"]
    assert (manifest["class_names"], store.labels.tolist()) == (["p", "q"], [1, 0, 1])
    refused(file, "2 columns of number lists (a, b)", "--column")
    refused(file, "'name' is not a column of number lists (those are: a, b)", column="name")
    refused(file, "'nope'", "--label-column", "a, b, name, kind", column="a", label_column="nope")
    refused(file, "'nope'", "--id-column", column="a", id_column="nope")


def test_labels_of_a_dictionary_column(tmp_path):
    """What pandas writes for a categorical column."""
    manifest, store = do_import(parquet(tmp_path, vector=lists(X), label=pa.array(["b", "a", "b"]).dictionary_encode()))
    assert (manifest["class_names"], store.labels.tolist()) == (["a", "b"], [1, 0, 1])


@pytest.mark.parametrize("suffix", ["feather", "arrow"])
def test_arrow(tmp_path, suffix):
    file = tmp_path / f"x.{suffix}"
    pyarrow.feather.write_feather(pa.table({"v": lists(X, pa.list_(pa.float32(), 2)), "label": pa.array([0, 1, 1])}), str(file))
    _, store = do_import(file)
    assert np.array_equal(store.vectors(), X)
    assert store.labels.tolist() == [0, 1, 1]


def test_many_chunks_and_row_groups(tmp_path):
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    pq.write_table(pa.table({"v": lists(x)}), tmp_path / "x.parquet", row_group_size=3)
    assert np.array_equal(do_import(tmp_path / "x.parquet")[1].vectors(), x)


# --- labels in the last column


def test_the_last_column_may_be_the_labels(tmp_path):
    x = np.array([[0.5, 1.5, 3.0], [2.5, 3.5, 0.0], [4.5, 5.5, -1.0]])
    manifest, store = do_import(npy(tmp_path, x), label_column="last")
    assert store.vectors().tolist() == [[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]]
    assert store.labels.tolist() == [3, 0, -1]
    assert (manifest["dim"], manifest["num_labeled"]) == (2, 2)


def test_the_last_column_of_a_table(tmp_path):
    file = parquet(tmp_path, vector=lists([[0.5, 3.0], [1.5, 4.0]]), label=pa.array([9, 9]))
    _, store = do_import(file, label_column="last")
    assert (store.vectors().tolist(), store.labels.tolist()) == ([[0.5], [1.5]], [3, 4])


def test_a_last_column_that_holds_no_labels(tmp_path):
    refused(npy(tmp_path, X + 0.1), "labels must be whole numbers", label_column="last")
    refused(npy(tmp_path, X[:, :1]), "one column", "--label-column last", label_column="last")
    with pytest.raises(InputError, match="--label-column 'kind': for this file it can only be 'last'"):
        do_import(npy(tmp_path, X), label_column="kind")


# --- wrong input


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_named(tmp_path, value):
    x = np.ones((BLOCK_ROWS + 5, 2), np.float32)
    x[BLOCK_ROWS + 3, 1] = value
    names = np.array([f"n{row}" for row in range(len(x))])
    refused(npz(tmp_path, x, ids=names), f"row {BLOCK_ROWS + 3} (id 'n{BLOCK_ROWS + 3}')", "a NaN or an infinity")


def test_a_missing_number_in_a_list_is_named(tmp_path):
    refused(parquet(tmp_path, v=pa.array([[1.0, 2.0], [None, 3.0]], pa.list_(pa.float32()))), "row 1", "NaN")


def test_after_a_wrong_file_the_mended_one_can_be_imported(tmp_path):
    refused(npy(tmp_path, np.array([[1.0, np.nan]])), "row 0")
    _, store = do_import(npy(tmp_path, np.array([[1.0, 2.0]])))
    assert store.vectors().tolist() == [[1.0, 2.0]]


def test_float16_overflow_says_what_to_do(tmp_path):
    x = np.array([[1.0, 2.0], [70_000.0, 0.0]], np.float32)
    refused(npy(tmp_path, x), "row 1 (id '1')", "too large for float16: pass --dtype float32", dtype="float16")
    _, store = do_import(npy(tmp_path, X), dtype="float16", overwrite=True)
    assert store.manifest["dtype"] == "float16"
    assert store.read_block(0)["embedding"].type == pa.list_(pa.float16(), 2)
    assert np.array_equal(store.vectors(), X)


def test_float32_overflow_does_not_advise_float32(tmp_path):
    file = npy(tmp_path, np.array([[1.0, 1e300]]))
    refused(file, "row 0", "too large for float32")
    with pytest.raises(InputError) as caught:
        do_import(file, overwrite=True)
    assert "pass --dtype float32" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.ones(5, np.float32), "shape (5,)"),
        (np.ones((2, 3, 4), np.float32), "shape (2, 3, 4)"),
        (np.float32(3), "shape ()"),
        (np.empty((0, 4), np.float32), "is empty: its vectors have shape (0, 4)"),
        (np.empty((4, 0), np.float32), "is empty: its vectors have shape (4, 0)"),
        (np.array([["a", "b"]]), "vectors are (n, d) numbers"),
        (np.ones((2, 2), complex), "complex128"),
        (np.ones((2, 2), bool), "bool"),
    ],
    ids=["1-d", "3-d", "0-d", "no-rows", "no-columns", "strings", "complex", "bool"],
)
@pytest.mark.parametrize("write", [npy, npz])
def test_arrays_that_are_no_vectors(tmp_path, write, x, words):
    refused(write(tmp_path, x), words)
    assert not (tmp_path / "x.npy.store").exists()


@pytest.mark.parametrize("write", [npy, npz])
def test_object_arrays_are_refused(tmp_path, write):
    refused(write(tmp_path, np.array([[1, 2], [3, None]], dtype=object)), "numbers")


def test_ids_must_be_there_and_differ(tmp_path):
    refused(npz(tmp_path, ids=np.array(["a", "b", "b"])), "'b' occurs 2 times")
    refused(npz(tmp_path, ids=np.array(["a", "b"])), "2 ids for 3 vectors")


def test_a_missing_id_is_named_as_missing(tmp_path):
    refused(parquet(tmp_path, v=lists(X), id=pa.array(["a", None, "c"])), "row 1 has no id")


def test_ids_in_two_columns_are_refused(tmp_path):
    refused(npz(tmp_path, ids=np.ones((3, 2))), "ids")


def test_labels_must_fit(tmp_path):
    refused(npz(tmp_path, labels=np.array([1, 2])), "2 labels for 3 vectors")
    refused(npz(tmp_path, labels=np.array([1, 2, -2])), "labels must be whole numbers from 0")
    refused(npz(tmp_path, labels=np.array([1, 2, 0.5])), "labels must be whole numbers from 0")
    refused(npz(tmp_path, labels=np.array([1, 2, np.nan])), "labels must be whole numbers from 0")


def test_one_hot_labels_are_refused(tmp_path):
    refused(npz(tmp_path, labels=np.eye(3)), "labels")


def test_files_that_cannot_be_read(tmp_path):
    refused(tmp_path / "none.npy", "does not exist")
    for name in ("bad.npy", "bad.npz", "bad.parquet", "bad.arrow", "bad.feather", "bad.csv"):
        (tmp_path / name).write_text("1,2,3\n" * 5)
        refused(tmp_path / name)
    np.savez(tmp_path / "y.npz", vectors=X)
    refused(tmp_path / "y.npz", "vectors", "must be called 'features'")


def test_a_folder_named_like_a_file_is_refused(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    refused(tmp_path / "folder.npy")


def test_tables_that_hold_no_vectors(tmp_path):
    refused(parquet(tmp_path, a=pa.array([1.0, 2.0])), "0 columns of number lists")
    refused(parquet(tmp_path, v=pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32()))), "row 1 has 2 numbers, row 0 has 1")
    refused(parquet(tmp_path, v=pa.array([[1.0], None], pa.list_(pa.float32()))), "row 1 has no vector")


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2)])
def test_a_table_without_rows_is_refused(tmp_path, kind):
    refused(parquet(tmp_path, v=pa.array([], kind)), "is empty")


# --- the store


def test_the_round_trip_over_blocks_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * BLOCK_ROWS + 100, 3)).astype(np.float32)
    labels = rng.integers(-1, 9, len(x))
    manifest, store = do_import(npz(tmp_path, x, labels=labels))
    assert [(p["start"], p["stop"], p["num_vectors"], p["num_labeled"]) for p in manifest["parts"]] == [
        (start, stop, stop - start, int((labels[start:stop] >= 0).sum()))
        for start, stop in ((0, 8192), (8192, 16384), (16384, 16484))
    ]
    assert store.num_blocks == 3
    assert store.vectors().tobytes() == x.tobytes()
    assert np.array_equal(store.labels, labels)
    rows = rng.permutation(len(x))[:500]
    assert store.vectors(rows).tobytes() == x[rows].tobytes()
    assert store.ids(rows) == [str(row) for row in rows]


def test_the_same_vectors_have_the_same_digest_whatever_the_file(tmp_path):
    first, _ = do_import(npy(tmp_path, X))
    second, _ = do_import(npz(tmp_path))
    third, _ = do_import(parquet(tmp_path, v=lists(X)))
    other, _ = do_import(npz(tmp_path, X + 1), overwrite=True)
    assert first["digest"] == second["digest"] == third["digest"] != other["digest"]


def test_a_file_is_imported_once(tmp_path):
    file = npy(tmp_path, X)
    first, _ = do_import(file)
    part = tmp_path / "x.npy.store" / "parts" / "part-000000000000.arrow"
    before = part.stat()
    again, _ = do_import(file)
    assert again == first
    assert (part.stat().st_ino, part.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    npy(tmp_path, np.vstack([X, X]))
    refused(file, "is published with other inputs (inputs.file")
    assert do_import(file, overwrite=True)[1].num_rows == 6


def test_the_fixture_holds_the_digits(feature_store, digits):
    x, y = digits
    assert np.array_equal(feature_store.vectors(), x)
    assert np.array_equal(feature_store.labels, y)
    assert feature_store.ids(np.array([0, 1796])) == ["digit-0000", "digit-1796"]
