"""Lists of images: CSV, TSV, text, Parquet and Arrow with paths; tables with images and further columns."""

import datetime
import json

import pyarrow as pa
import pyarrow.feather as feather
import pytest
from pools import everything, images_column, make_folder, refused, value_of, write

from engine.sources import Columns, open_pool, read


@pytest.fixture
def pictures(tmp_path):
    return make_folder(tmp_path / "pictures", [f"{i}.png" for i in range(5)])


def text(file, *lines):
    file.write_text("\n".join(lines) + "\n")
    return file


# --- CSV


def test_a_csv_with_labels_and_metadata(tmp_path, pictures):
    file = text(
        tmp_path / "list.csv",
        "path,label,score,camera,zip,day,flag",
        "pictures/2.png,dog,0.5,3,01234,monday,true",
        f"{pictures}/0.png,,1,4,99999,,false",
        f'file://{pictures}/1.png,cat,,,00001,"tues, day",',
    )
    pool = open_pool(str(file))
    assert (pool.kind, pool.num_rows, pool.class_names) == ("list", 3, ("cat", "dog"))
    assert {f.name: f.type for f in pool.schema} == {
        "score": pa.float64(),
        "camera": pa.int64(),
        "zip": pa.string(),
        "day": pa.string(),
        "flag": pa.bool_(),
    }
    samples = everything(pool)
    assert [value_of(s) for s in samples] == [2, 0, 1]
    assert [s.label for s in samples] == [1, None, 0]
    assert [s.id for s in samples] == ["pictures/2.png", f"{pictures}/0.png", f"file://{pictures}/1.png"]
    assert samples[0].extra == {"score": 0.5, "camera": 3, "zip": "01234", "day": "monday", "flag": True}
    assert samples[2].extra == {"score": None, "camera": None, "zip": "00001", "day": "tues, day", "flag": None}
    for f in pool.schema:
        assert len(pa.array([s.extra[f.name] for s in samples], f.type)) == 3


def test_a_type_is_found_over_all_rows_of_a_text_file(tmp_path):
    """The last of 400,000 rows decides: far behind the first block that is read."""
    lines = [f"{i}.png,{i},{i % 9},{i}" for i in range(400_000)]
    pool = open_pool(str(text(tmp_path / "long.csv", "path,n,label,m", *lines, "x.png,1.5,owl,?")))
    assert [f.type for f in pool.schema] == [pa.float64(), pa.string()]
    assert pool.class_names == (*"012345678", "owl")
    assert next(read(pool, 7, 8)).extra == {"n": 7.0, "m": "7"}


def test_numbers_as_labels_are_codes(tmp_path, pictures):
    file = text(tmp_path / "list.tsv", "uri\tlabel", "pictures/0.png\t7", "pictures/1.png\t-1", "pictures/2.png\t")
    pool = open_pool(str(file))
    assert pool.class_names is None
    assert [s.label for s in everything(pool)] == [7, None, None]


def test_labels_with_leading_zeros_are_names(tmp_path, pictures):
    file = text(tmp_path / "list.csv", "uri,label", "pictures/0.png,01", "pictures/1.png,1")
    assert open_pool(str(file)).class_names == ("01", "1")


def test_columns_of_a_csv_can_be_named(tmp_path, pictures):
    file = text(tmp_path / "list.csv", "a,b,c,d,e", "0.png,x,k1,1,2", "1.png,y,k0,3,4")
    columns = Columns(image="a", label="b", id="c", metadata=("e",), images=str(pictures))
    pool = open_pool(str(file), columns)
    samples = everything(pool)
    assert [(s.id, s.label, value_of(s), s.extra) for s in samples] == [("k1", 0, 0, {"e": 2}), ("k0", 1, 1, {"e": 4})]
    refused(file, "no image column", "a, b, c, d, e", "--image-column")
    refused(file, "no column 'z'", columns=Columns(image="a", metadata=("z",)))


def test_a_row_without_a_path_is_a_sample_with_an_error(tmp_path, pictures):
    file = text(tmp_path / "list.csv", "path,n", ",1", "pictures/1.png,2", "pictures/gone.png,3")
    first, there, gone = everything(open_pool(str(file)))
    assert (first.row, first.error, first.extra) == (0, "no image in this row", {"n": 1})
    assert (there.id, value_of(there)) == ("1", 1)
    assert gone.error.startswith("cannot be read")
    assert gone.extra == {"n": 3}


def test_the_same_path_twice_makes_rows_the_ids(tmp_path, pictures):
    file = text(tmp_path / "list.csv", "path", "pictures/1.png", "pictures/1.png")
    assert [(s.id, value_of(s)) for s in everything(open_pool(str(file)))] == [("0", 1), ("1", 1)]


def test_the_same_id_twice_is_named_with_both_rows(tmp_path):
    file = text(tmp_path / "list.csv", "path,id", "a.png,5", "b.png,6", "c.png,5")
    refused(file, "list.csv", "'5' is the id of rows 0 and 2")


def test_another_order_of_a_list_is_another_pool(tmp_path):
    one = open_pool(str(text(tmp_path / "a.csv", "path,label", "a.png,1", "b.png,2")))
    same = open_pool(str(text(tmp_path / "b.csv", "path,label", "a.png,1", "b.png,2", "")))
    other = open_pool(str(text(tmp_path / "c.csv", "path,label", "b.png,2", "a.png,1")))
    assert one.digest == same.digest
    assert one.digest != other.digest


def test_csv_files_that_cannot_be_read_are_named(tmp_path):
    refused(text(tmp_path / "ragged.csv", "path,n", "a.png,1", "b.png,1,2"), "ragged.csv", "CSV")
    (tmp_path / "empty.csv").write_text("")
    refused(tmp_path / "empty.csv", "empty.csv", "CSV")
    refused(text(tmp_path / "head.csv", "path,n"), "head.csv", "is empty")
    refused(text(tmp_path / "twice.csv", "path,n,n", "a.png,1,2"), "twice.csv", "two columns named 'n'")


def test_a_list_may_climb_out_of_its_folder(tmp_path, pictures):
    (tmp_path / "lists").mkdir()
    file = text(tmp_path / "lists" / "a.csv", "path", "../pictures/3.png")
    assert value_of(everything(open_pool(str(file)))[0]) == 3


# --- text


def test_a_list_of_paths_and_labels(tmp_path, pictures):
    (pictures / "with space.png").write_bytes((pictures / "4.png").read_bytes())
    file = text(tmp_path / "LT.txt", "0.png 3", "with space.png 0", "", "2.png 999\r", "3.png -1")
    pool = open_pool(str(file), Columns(images=str(pictures)))
    assert (pool.kind, pool.num_rows, pool.class_names) == ("list", 4, None)
    found = [(s.row, s.id, s.label, value_of(s)) for s in everything(pool)]
    assert found == [(0, "0.png", 3, 0), (1, "with space.png", 0, 4), (2, "2.png", 999, 2), (3, "3.png", None, 3)]


def test_paths_of_a_text_list_are_relative_to_its_folder(tmp_path, pictures):
    file = tmp_path / "LT.txt"
    file.write_text("pictures/1.png 1")
    assert [(value_of(s), s.label) for s in everything(open_pool(str(file)))] == [(1, 1)]


def test_a_line_that_is_no_path_and_label_is_named(tmp_path):
    refused(text(tmp_path / "LT.txt", "a.png 1", "", "b.png"), "line 3", "path label", "'b.png'")
    long = [f"{i}.png 1" for i in range(500_000)]
    refused(text(tmp_path / "long.txt", *long, "nothing"), "line 500001", "'nothing'")


def test_lines_are_whole_whatever_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.sources.tables.CHUNK_BYTES", 5)
    file = text(tmp_path / "LT.txt", "a.png 1", "bb.png 22", "a long name of a file.png 333")
    assert [(s.id, s.label) for s in everything(open_pool(str(file)))] == [
        ("a.png", 1),
        ("bb.png", 22),
        ("a long name of a file.png", 333),
    ]


# --- tables


def test_a_parquet_list_keeps_its_types(tmp_path, pictures):
    columns = {
        "uri": pa.array(["pictures/1.png", "pictures/0.png"], pa.large_string()),
        "label": pa.array(["b", "a"]).dictionary_encode(),
        "when": pa.array([datetime.datetime(2024, 1, 2), None], pa.timestamp("us")),
        "tags": pa.array([["x", "y"], None]),
        "width": pa.array([1, 2]),
        "nested": pa.array([{"a": 1}, {"a": 2}]),
    }
    pool = open_pool(str(write(tmp_path / "x.parquet", columns)))
    assert (pool.kind, pool.class_names, pool.schema.names) == ("list", ("a", "b"), ["when", "tags"])
    assert set(pool.detail["columns_left_out"]) == {"width", "nested"}
    samples = everything(pool)
    assert [(s.label, value_of(s)) for s in samples] == [(1, 1), (0, 0)]
    assert samples[0].extra == {"when": datetime.datetime(2024, 1, 2), "tags": ["x", "y"]}
    assert samples[1].extra == {"when": None, "tags": None}


def test_metadata_that_cannot_pass_is_refused_only_when_named(tmp_path):
    file = write(tmp_path / "x.parquet", {"uri": pa.array(["a"]), "width": pa.array([1]), "z": pa.array([{"a": 1}])})
    assert open_pool(str(file)).schema.names == []
    refused(file, "'width' cannot pass", "of that name", columns=Columns(metadata=("width",)))
    refused(file, "'z' cannot pass", "neither a scalar", columns=Columns(metadata=("z",)))


@pytest.mark.parametrize("compression", ["uncompressed", "lz4"])
def test_arrow_files_hold_lists_and_images(tmp_path, pictures, compression):
    paths = pa.table({"uri": ["pictures/1.png"], "n": [7]})
    feather.write_feather(paths, tmp_path / "list.feather", compression=compression)
    (sample,) = everything(open_pool(str(tmp_path / "list.feather")))
    assert (value_of(sample), sample.extra) == (1, {"n": 7})
    images = pa.table({"image": images_column(range(5)), "label": list("edcba"), "n": range(5)})
    (tmp_path / "many").mkdir()
    for name, part in (("b.arrow", images.slice(3)), ("a.arrow", images.slice(0, 3))):
        feather.write_feather(part, tmp_path / "many" / name, compression=compression, chunksize=2)
    pool = open_pool(str(tmp_path / "many"))
    assert (pool.kind, pool.num_rows, pool.class_names) == ("parquet", 5, tuple("abcde"))
    assert [(s.row, s.id, value_of(s), s.label, s.extra) for s in read(pool, 1, 5)] == [
        (i, f"img_{i}.png", i, 4 - i, {"n": i}) for i in range(1, 5)
    ]


def test_an_arrow_stream_is_refused_with_the_way_out(tmp_path):
    table = pa.table({"uri": ["a.png"]})
    with pa.ipc.new_stream(tmp_path / "s.arrow", table.schema) as writer:
        writer.write_table(table)
    refused(tmp_path / "s.arrow", "s.arrow", "a stream is none", "new_file")


def test_images_as_large_binary_with_metadata(tmp_path):
    data = pa.array([row["bytes"] for row in images_column([4, 5]).to_pylist()], pa.large_binary())
    file = write(tmp_path / "x.parquet", {"image": data, "text": pa.array(["a", None], pa.large_string())}, group=1)
    pool = open_pool(str(file))
    assert pool.kind == "parquet"
    assert [(value_of(s), s.extra) for s in everything(pool)] == [(4, {"text": "a"}), (5, {"text": None})]


def test_an_id_column_may_be_named(tmp_path):
    file = write(tmp_path / "x.parquet", {"image": images_column([4, 5]), "key": pa.array([9, 8])})
    assert [s.id for s in everything(open_pool(str(file), Columns(id="key")))] == ["9", "8"]
    refused(file, "no column 'z'", columns=Columns(id="z"))


def test_options_without_a_use_are_refused(tmp_path, pictures):
    refused(pictures, "--split", "kind folder", columns=Columns(split="train"))
    file = write(tmp_path / "x.parquet", {"image": images_column([4])})
    refused(file, "--images", "kind parquet", columns=Columns(images="."))


def test_the_folder_of_lists_is_the_base_of_their_paths(tmp_path):
    make_folder(tmp_path / "pool" / "p", ["0.png", "1.png"])
    write(tmp_path / "pool" / "lists" / "b.parquet", {"path": ["p/1.png"]})
    write(tmp_path / "pool" / "lists" / "a.parquet", {"path": ["p/0.png"]})
    pool = open_pool(str(tmp_path / "pool" / "lists"), Columns(images=str(tmp_path / "pool")))
    assert [value_of(s) for s in everything(pool)] == [0, 1]


def test_objects_are_boxes(tmp_path):
    features = {
        "image": {"_type": "Image"},
        "objects": {"feature": {"category": {"names": ["cat", "dog"], "_type": "ClassLabel"}}, "_type": "Sequence"},
    }
    kind = pa.struct([("bbox", pa.list_(pa.list_(pa.float32()))), ("category", pa.list_(pa.int64()))])
    columns = {
        "image": images_column([1, 2, 3]),
        "width": pa.array([20, 20, 20]),
        "height": pa.array([10, 10, 10]),
        "objects": pa.array(
            [
                {"bbox": [[1, 2, 3, 4], [15, 5, 10, 2], [0, 0, 0, 5]], "category": [0, 1, 1]},
                {"bbox": [], "category": []},
                {"bbox": [[30, 0, 5, 5]], "category": [0]},
            ],
            kind,
        ),
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pool = open_pool(str(write(tmp_path / "x.parquet", columns, metadata=metadata)))
    assert (pool.class_names, pool.schema.names) == (("cat", "dog"), ["boxes"])
    assert pool.detail["boxes_left_out"] == {"outside": 1, "no area": 1}
    first, second, third = [s.extra["boxes"] for s in everything(pool)]
    assert [list(box.values()) for box in first] == [[0, 1, 2, 3, 4, False], [1, 15, 5, 5, 2, False]]
    assert (second, third) == ([], [])


def test_objects_may_be_a_list_of_structs_with_names(tmp_path):
    objects = [[{"bbox": [1.0, 2.0, 3.0, 4.0], "category": "owl", "iscrowd": 1}], None]
    pool = open_pool(str(write(tmp_path / "x.parquet", {"image": images_column([1, 2]), "objects": objects})))
    assert pool.class_names == ("owl",)
    first, second = [s.extra["boxes"] for s in everything(pool)]
    assert [list(box.values()) for box in first] == [[0, 1, 2, 3, 4, True]]
    assert second is None
    bad = [[{"bbox": [1.0, 2.0, 3.0], "category": "owl", "iscrowd": 1}]]
    refused(write(tmp_path / "y.parquet", {"image": images_column([1]), "objects": bad}), "y.parquet", "four numbers")
