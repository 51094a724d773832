"""Labels apart from the pool: what is taken of a file, what is counted, what is an error."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from pools import make_folder

from engine.chosen import Chosen, read_chosen
from engine.folders import digest_of
from engine.gather import Wanted, gather
from engine.labels import read_labels
from engine.places import Place
from engine.schema import MAX_PIXELS, InputError
from engine.sources import open_pool

NAMES = [f"{i}.png" for i in range(8)]
LABELS = Wanted(boxes=False, strict=True, max_pixels=MAX_PIXELS)
BOXES = Wanted(boxes=True, strict=True, max_pixels=MAX_PIXELS)
KINDS = ("csv", "tsv", "parquet", "arrow", "jsonl")


@pytest.fixture
def pool(tmp_path):
    """Eight images without labels: 0.png to 7.png."""
    return open_pool(str(make_folder(tmp_path / "pool", NAMES)))


def some(*rows, by_row=False):
    return Chosen(np.array(rows, dtype=np.int64), digest_of(rows), {}, by_row)


def table(file, columns):
    """Write columns as the kind of file that its ending says."""
    data, suffix = pa.table(columns), file.suffix
    if suffix == ".parquet":
        pq.write_table(data, file)
    elif suffix == ".arrow":
        pyarrow.feather.write_feather(data, file, compression="uncompressed")
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in data.to_pylist()))
    else:
        comma = {".csv": ",", ".tsv": "\t"}[suffix]
        rows = [data.column_names, *([row[name] for name in data.column_names] for row in data.to_pylist())]
        file.write_text("".join(comma.join("" if v is None else str(v) for v in row) + "\n" for row in rows))
    return file


def labels_of(file, pool, chosen, class_names=None, id_column=None, label_column=None):
    return read_labels(str(file), pool, chosen, class_names, id_column, label_column)


def refused(file, pool, chosen, *words, class_names=None, **more):
    with pytest.raises(InputError) as caught:
        labels_of(file, pool, chosen, class_names, **more)
    for word in words:
        assert str(word) in str(caught.value)


# --- tables


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table(tmp_path, pool, kind):
    columns = {"id": ["6.png", "2.png", "0.png", "1.png"], "label": ["owl", "ant", "yak", "owl"]}
    found = labels_of(table(tmp_path / f"labels.{kind}", columns), pool, some(1, 2, 6))
    assert found.class_names == ("ant", "owl")  # the yak is nobody's business
    at = found.find(["1.png", "2.png", "6.png", "0.png"])
    assert [int(found.codes[i]) if i >= 0 else None for i in at] == [1, 0, 1, None]
    assert (found.num_unused, found.num_unknown, found.boxes) == (1, 0, None)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_classes_by_number(tmp_path, pool, kind):
    file = table(tmp_path / f"labels.{kind}", {"id": ["0.png", "1.png"], "label": [2, 0]})
    assert labels_of(file, pool, some(0, 1)).class_names is None
    assert labels_of(file, pool, some(0, 1)).codes.tolist() == [2, 0]
    named = labels_of(file, pool, some(0, 1), ("ant", "bee", "owl"))
    assert (named.codes.tolist(), named.class_names) == ([2, 0], ("ant", "bee", "owl"))
    refused(file, pool, some(0, 1), "label 2", "0 to 1", class_names=("ant", "bee"))


def test_numbers_may_be_names(tmp_path, pool):
    file = table(tmp_path / "labels.csv", {"id": ["0.png", "1.png"], "label": ["10", "2"]})
    assert labels_of(file, pool, some(0, 1), ("10", "2", "3")).codes.tolist() == [0, 1]


def test_a_class_that_is_not_the_pools_is_named_with_the_nearest(tmp_path, pool):
    file = table(tmp_path / "labels.csv", {"id": NAMES[:3], "label": ["owl", "aunt", "yak"]})
    refused(file, pool, some(0, 1), "'aunt', did you mean 'ant'?", "ant, owl", class_names=("ant", "owl"))
    assert labels_of(file, pool, some(0), ("ant", "owl")).codes.tolist() == [1]  # what others are called is not looked at


def test_columns_are_found_or_named(tmp_path, pool):
    file = table(tmp_path / "labels.csv", {"file_name": NAMES[:2], "class": ["ant", "owl"], "checked": ["owl", "owl"]})
    assert labels_of(file, pool, some(0, 1)).codes.tolist() == [0, 1]
    assert labels_of(file, pool, some(0, 1), label_column="checked").codes.tolist() == [0, 0]
    assert labels_of(file, pool, some(0, 1), id_column="of the pool").codes.tolist() == [0, 1]
    odd = table(tmp_path / "odd.csv", {"name": NAMES[:2], "what": ["ant", "owl"]})
    refused(odd, pool, some(0), "name, what", "--id-column")
    assert labels_of(odd, pool, some(0, 1), id_column="name", label_column="what").codes.tolist() == [0, 1]


def test_entries_of_other_images_are_counted_and_change_nothing(tmp_path, pool):
    few = table(tmp_path / "few.csv", {"id": ["3.png"], "label": ["ant"]})
    ids = ["3.png", "4.png", "x.png", "x.png", "y.png"]
    many = table(tmp_path / "many.csv", {"id": ids, "label": ["ant", "owl", "cat", "dog", "cat"]})
    found = labels_of(many, pool, some(3))
    assert (found.num_unused, found.num_unknown, found.class_names) == (4, 2, ("ant",))
    assert found.ids.to_pylist() == ["3.png"]
    assert found.digest == labels_of(few, pool, some(3)).digest
    assert found.digest != labels_of(many, pool, some(4)).digest


def test_a_file_of_other_images_is_refused(tmp_path, pool):
    file = table(tmp_path / "labels.csv", {"id": ["a/1.png", "a/2.png"], "label": ["ant", "owl"]})
    refused(file, pool, some(0, 1), "none of the 2 images", "'a/1.png'", "'0.png'")


def test_an_id_twice(tmp_path, pool):
    same = table(tmp_path / "same.csv", {"id": ["1.png", "0.png", "1.png"], "label": ["ant", "owl", "ant"]})
    assert labels_of(same, pool, some(0, 1)).codes.tolist() == [0, 1]
    two = table(tmp_path / "two.csv", {"id": ["1.png", "0.png", "1.png"], "label": ["ant", "owl", "owl"]})
    refused(two, pool, some(0, 1), "two things of '1.png'", "'ant'", "'owl'")
    assert labels_of(two, pool, some(0)).codes.tolist() == [0]


def test_a_chosen_image_without_a_label_is_an_error(tmp_path, pool):
    file = table(tmp_path / "labels.csv", {"id": ["1.png", "2.png", "5.png"], "label": ["ant", "", "owl"]})
    labels = labels_of(file, pool, some(1, 2, 3, 5))
    with pytest.raises(InputError, match=r"2 of 4 images .* have no label: '2.png': no label in .*; '3.png'.*--labels"):
        gather(pool, some(1, 2, 3, 5), Place(str(tmp_path / "images")), LABELS, labels)
    images = gather(pool, some(1, 5), Place(str(tmp_path / "images")), LABELS, labels_of(file, pool, some(1, 5)))
    assert [(r.id, r.label) for r in images.records()] == [("1.png", 0), ("5.png", 1)]
    assert images.class_names == ("ant", "owl")
    assert (images.manifest["num_labels_unused"], images.manifest["num_labels_unknown"]) == (1, 0)


def test_labels_apart_take_the_place_of_the_pools(tmp_path):
    pool = open_pool(str(make_folder(tmp_path / "pool", ["ant/0.png", "owl/1.png"])))
    file = table(tmp_path / "labels.csv", {"id": ["ant/0.png", "owl/1.png"], "label": ["owl", "ant"]})
    images = gather(pool, some(0, 1), Place(str(tmp_path / "i")), LABELS, labels_of(file, pool, some(0, 1), pool.class_names))
    assert ([r.label for r in images.records()], images.class_names) == ([1, 0], ("ant", "owl"))


def test_images_are_labelled_by_the_names_under_which_they_were_picked(tmp_path, pool):
    file = table(tmp_path / "labels.csv", {"id": ["5", "6", "99"], "label": ["ant", "owl", "owl"]})
    chosen = some(5, 6, by_row=True)
    labels = labels_of(file, pool, chosen)
    assert (labels.num_unused, labels.num_unknown) == (1, 1)
    images = gather(pool, chosen, Place(str(tmp_path / "images")), LABELS, labels)
    assert [(r.id, r.label) for r in images.records()] == [("5.png", 0), ("6.png", 1)]


def test_what_is_no_file_of_labels_is_named(tmp_path, pool):
    refused(tmp_path / "none.csv", pool, some(0), "does not exist")
    (tmp_path / "x.xml").write_text("<a/>")
    refused(tmp_path / "x.xml", pool, some(0), "neither COCO (.json) nor a table", ".csv", ".jsonl")
    (tmp_path / "x.jsonl").write_text("{no")
    refused(tmp_path / "x.jsonl", pool, some(0), "cannot be read as JSON lines")
    refused(table(tmp_path / "x.csv", {"id": [None, "0.png"], "label": ["a", "b"]}), pool, some(0), "row 0 has no id")
    refused(table(tmp_path / "x.parquet", {"id": ["0.png"], "label": [0.5]}), pool, some(0), "double")
    refused(table(tmp_path / "x.csv", {"id": ["0.png"], "label": ["-7"]}), pool, some(0), "label -7")


# --- boxes


def coco(file, boxes, names=("cell",), **more):
    """Write boxes [category, x, y, width, height] by the number of their image, of 2 x 2 px."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 2, "height": 2} for i in boxes],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": 10 * i + j, "image_id": i, "category_id": box[0], "bbox": box[1:], "iscrowd": j == 1}
            for i, own in boxes.items()
            for j, box in enumerate(own)
        ],
    }
    file.write_text(json.dumps(content | more))
    return file


def test_boxes_of_the_chosen_images_alone(tmp_path, pool):
    bad, none = [1, 0, 0, 0, 1], [1, 3, 3, 1, 1]
    boxes = {1: [[0, 0, 0, 1, 1], bad], 2: [], 3: [bad, none, [7, 0, 0, 1, 1]], 4: [[1, -1, 0, 2, 2], [0, 1, 1, 1, 1]]}
    file = coco(tmp_path / "labels.json", boxes, names=("cell", "debris"))
    labels = labels_of(file, pool, some(1, 2, 4))  # image 3 has a category that is none: nobody asked
    assert (labels.left_out, labels.num_unused, labels.num_unknown) == ({"outside": 0, "no area": 1}, 1, 0)
    images = gather(pool, some(1, 2, 4), Place(str(tmp_path / "images")), BOXES, labels)
    assert [r.boxes.tolist() for r in images.records()] == [[[0, 0, 1, 1]], [], [[0, 0, 1, 2], [1, 1, 1, 1]]]
    assert [r.crowd.tolist() for r in images.records()] == [[False], [], [False, True]]
    told = {key: images.manifest[key] for key in ("num_boxes", "num_without_boxes", "boxes_left_out", "num_labels_unused")}
    expected = {"num_boxes": 3, "num_without_boxes": 1, "boxes_left_out": {"outside": 0, "no area": 1}, "num_labels_unused": 1}
    assert told == expected
    assert images.class_names == ("cell", "debris")
    assert b"3.png" not in b"".join(f.read_bytes() for f in (tmp_path / "images").rglob("*") if f.is_file())


def test_an_image_that_was_not_annotated_is_an_error(tmp_path, pool):
    file = coco(tmp_path / "labels.json", {1: [[0, 0, 0, 1, 1]]})
    with pytest.raises(InputError, match=r"1 of 2 images .* no boxes: '2.png': no boxes: not annotated in .*labels.json"):
        gather(pool, some(1, 2), Place(str(tmp_path / "images")), BOXES, labels_of(file, pool, some(1, 2)))


def test_classes_of_boxes_are_matched_by_name(tmp_path, pool):
    file = coco(tmp_path / "labels.json", {1: [[0, 0, 0, 1, 1]], 2: [[1, 0, 0, 1, 1]]}, names=("debris", "cell"))
    found = labels_of(file, pool, some(2), ("cell", "dust"))
    assert (found.boxes.to_pylist()[0][0]["label"], found.class_names) == (0, ("cell", "dust"))
    refused(file, pool, some(1, 2), "'debris'", "cell, dust", class_names=("cell", "dust"))


def test_real_boxes_apart_from_their_images(tmp_path, shared):
    bare = open_pool(str(shared / "bccd" / "images"))
    file = shared / "bccd" / "train.json"
    told = open_pool(str(file))
    ids = [f"{name}\n" for name in told.listing.read(20, 30)["path"].to_pylist()]
    (tmp_path / "ids.txt").write_text("".join(ids))
    chosen, same = read_chosen(str(tmp_path / "ids.txt"), bare), read_chosen(str(tmp_path / "ids.txt"), told)
    labels = labels_of(file, bare, chosen)
    assert (len(labels.ids), labels.num_unused, labels.num_unknown) == (10, 282, 0)
    apart = gather(bare, chosen, Place(str(tmp_path / "apart")), BOXES, labels)
    within = gather(told, same, Place(str(tmp_path / "within")), BOXES)
    assert apart.class_names == within.class_names == ("RBC", "WBC", "Platelets")
    by_id = {record.id: record for record in within.records()}
    for record in apart.records():
        own = by_id[record.id]
        assert (record.data, record.boxes.tolist()) == (own.data, own.boxes.tolist())
        assert record.box_labels.tolist() == own.box_labels.tolist()


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_boxes_in_a_table(tmp_path, pool, kind):
    objects = [
        {"bbox": [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]], "category": ["owl", "ant"]},
        {"bbox": [], "category": []},
        {"bbox": [[0.0, 0.0, 2.0, 2.0]], "category": ["yak"]},
        None,
    ]
    shape = pa.struct([("bbox", pa.list_(pa.list_(pa.float64()))), ("category", pa.list_(pa.string()))])
    file = table(tmp_path / f"labels.{kind}", {"id": NAMES[:4], "objects": pa.array(objects, shape)})
    labels = labels_of(file, pool, some(0, 1))
    assert (labels.class_names, labels.left_out) == (("ant", "owl"), {"outside": 0, "no area": 1})
    images = gather(pool, some(0, 1), Place(str(tmp_path / "images")), BOXES, labels)
    assert [r.box_labels.tolist() for r in images.records()] == [[1], []]
    with pytest.raises(InputError, match=r"'3.png': no boxes: not annotated"):
        gather(pool, some(0, 3), Place(str(tmp_path / "more")), BOXES, labels_of(file, pool, some(0, 3)))
