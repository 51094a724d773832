"""Annotated pools: COCO files and VOC folders; what becomes of odd boxes."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pools import everything, make_folder, refused, value_of

from engine.embed import embed
from engine.places import Place
from engine.sources import Columns, load_pool, open_pool, read, save_pool
from engine.sources.boxes import BOXES, Drawn, boxes_array
from engine.store import FeatureStore
from engine.verbs import EmbedOptions


def corners(boxes):
    return [tuple(box[name] for name in ("label", "x", "y", "width", "height", "crowd")) for box in boxes]


# --- the column


def test_boxes_are_clipped_sorted_by_image_and_counted():
    drawn = Drawn(
        np.array([2, 0, 0, 2, 1, 0, 2]),
        np.array([5, 1, 2, 3, 4, 6, 7]),
        np.array(
            [
                [-1, -2, 4, 4],
                [0.1, 0.2, 0.3, 0.4],
                [9, 9, 5, 5],
                [10, 0, 1, 1],
                [-5, -5, 100, 100],
                [1, 1, 0, 3],
                [np.nan, 0, np.nan, 1],
            ]
        ),
        np.array([False, False, True, False, False, False, False]),
    )
    sizes = np.array([[10, 10], [np.nan, np.nan], [10, 10], [10, 10]])
    column, left_out = boxes_array(drawn, sizes, np.array([True, True, True, False]))
    assert column.type == BOXES.type
    assert left_out == {"outside": 1, "no area": 2}
    first, second, third, fourth = column.to_pylist()
    f = lambda *values: tuple(float(np.float32(v)) for v in values)  # noqa: E731
    assert corners(first) == [(1, *f(0.1, 0.2, 0.3, 0.4), False), (2, *f(9, 9, 1, 1), True)]
    assert corners(second) == [(4, *f(-5, -5, 100, 100), False)]
    assert corners(third) == [(5, *f(0, 0, 3, 2), False)]
    assert fourth is None


def test_no_boxes_at_all():
    empty = Drawn(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 4)), np.empty(0, bool))
    column, left_out = boxes_array(empty, np.full((2, 2), np.nan))
    assert (column.to_pylist(), sum(left_out.values())) == ([[], []], 0)
    assert len(boxes_array(empty, np.empty((0, 2)))[0]) == 0


# --- COCO


def coco(file, images, annotations=(), categories=((3, "dog"), (1, "cat")), **more):
    content = {
        "images": [dict(zip(("id", "file_name", "width", "height"), image, strict=False)) for image in images],
        "annotations": [
            dict(zip(("id", "image_id", "category_id", "bbox"), (i, *a), strict=True), segmentation=[[1, 2]])
            for i, a in enumerate(annotations)
        ],
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**content, **more}))
    return file


def test_a_coco_file(tmp_path):
    make_folder(tmp_path, ["images/0.png", "images/sub/1.png"])
    images = [(70, "sub/1.png", 100, 50), (20, "0.png", 100, 50)]
    annotations = [(20, 3, [90, 40, 20, 20]), (70, 1, [1, 2, 3, 4]), (20, 1, [200, 0, 9, 9]), (20, 1, [5, 5, 0, 9])]
    pool = open_pool(str(coco(tmp_path / "train.json", images, annotations)))
    assert (pool.kind, pool.num_rows, pool.class_names) == ("coco", 2, ("cat", "dog"))
    assert pool.detail["boxes_left_out"] == {"outside": 1, "no area": 1}
    assert pool.schema.field("boxes").type == BOXES.type
    first, second = everything(pool)
    assert [(s.id, s.label, value_of(s)) for s in (first, second)] == [("sub/1.png", None, 1), ("0.png", None, 0)]
    assert corners(first.extra["boxes"]) == [(0, 1, 2, 3, 4, False)]
    assert corners(second.extra["boxes"]) == [(1, 90, 40, 10, 10, False)]
    assert (first.extra["image_id"], second.extra["image_id"]) == ("70", "20")
    for f in pool.schema:
        assert len(pa.array([s.extra[f.name] for s in (first, second)], f.type)) == 2


def test_sizes_that_are_not_known_clip_nothing(tmp_path):
    make_folder(tmp_path, ["0.png"])
    file = coco(tmp_path / "a.json", [(1, "0.png")], [(1, 1, [-5, 0, 9999, 9999])])
    (sample,) = everything(open_pool(str(file)))
    assert corners(sample.extra["boxes"]) == [(0, -5, 0, 9999, 9999, False)]


def test_an_image_without_boxes_and_a_file_without_annotations(tmp_path):
    make_folder(tmp_path, ["0.png"])
    (sample,) = everything(open_pool(str(coco(tmp_path / "a.json", [(1, "0.png")]))))
    assert sample.extra["boxes"] == []
    content = json.loads((tmp_path / "a.json").read_text())
    del content["annotations"]
    (tmp_path / "b.json").write_text(json.dumps(content))
    (sample,) = everything(open_pool(str(tmp_path / "b.json")))
    assert sample.extra["boxes"] is None


def test_a_missing_image_keeps_its_row_and_has_a_reason(tmp_path):
    make_folder(tmp_path, ["1.png", "2.png"])
    images = [(1, "gone.png"), (2, "1.png"), (3, "2.png")]
    pool = open_pool(str(coco(tmp_path / "a.json", images, [(1, 1, [0, 0, 1, 1])])))
    gone, *there = everything(pool)
    assert gone.error.startswith("cannot be read")
    assert (gone.row, gone.id, len(gone.extra["boxes"])) == (0, "gone.png", 1)
    assert [(s.row, s.id, s.error) for s in there] == [(1, "1.png", None), (2, "2.png", None)]


def test_a_run_goes_on_without_a_missing_image(tmp_path):
    make_folder(tmp_path / "images", ["1.png", "2.png"])
    file = coco(tmp_path / "a.json", [(1, "gone.png"), (2, "1.png"), (3, "2.png")])
    options = EmbedOptions(pool=str(file), out=str(tmp_path / "out"), encoder="pixels", workers=0, max_rejected="50%")
    assert embed(options)["num_rejected"] == 1
    (rejected,) = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert (rejected["row"], rejected["id"]) == (0, "gone.png")
    assert rejected["reason"].startswith("cannot be read")
    assert FeatureStore(str(tmp_path / "out")).rows.tolist() == [1, 2]


@pytest.mark.parametrize("folder", ["", "images", "train", "elsewhere"])
def test_where_the_images_of_a_coco_file_are_found(tmp_path, folder):
    make_folder(tmp_path / folder, ["0.png"])
    file = coco(tmp_path / "train.json", [(1, "0.png")])
    if folder == "elsewhere":
        refused(file, "train.json", "'0.png'", "--images")
        refused(file, "nowhere", "not a folder", columns=Columns(images=str(tmp_path / "nowhere")))
    columns = Columns(images=str(tmp_path / "elsewhere")) if folder == "elsewhere" else None
    assert value_of(everything(open_pool(str(file), columns))[0]) == 0


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([(1, "a.png"), (2, "b.png"), (1, "c.png")], ["'1' is the id of rows 0 and 2"]),
        ([(1, "a.png"), (2, "a.png")], ["'a.png' is the id of rows 0 and 1", "file_name"]),
        ([(1, "../a.png")], ["'../a.png'", "climbs out"]),
        ([(1, "a/../../a.png")], ["climbs out"]),
        ([(1, "/etc/passwd")], ["'/etc/passwd'", "not below"]),
        ([(1, "s3://b/a.png")], ["not below"]),
        ([(1,)], ["row 0", "file_name"]),
        ([], ["is empty"]),
    ],
)
def test_coco_images_that_are_refused(tmp_path, images, words):
    make_folder(tmp_path, ["a.png", "b.png", "c.png"])
    refused(coco(tmp_path / "x.json", images), "x.json", *words)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ((9, 1, [0, 0, 1, 1]), ["annotation 0", "image_id 9"]),
        ((1, 9, [0, 0, 1, 1]), ["annotation 0", "category_id 9"]),
        ((1, 1, [0, 0, 1]), ["annotation 0", "[0, 0, 1]", "four numbers"]),
        ((1, 1, [0, 0, 1, "1"]), ["four numbers"]),
    ],
)
def test_coco_annotations_that_are_refused(tmp_path, annotation, words):
    make_folder(tmp_path, ["a.png"])
    refused(coco(tmp_path / "x.json", [(1, "a.png")], [annotation]), "x.json", *words)


@pytest.mark.parametrize(
    ("categories", "words"),
    [(((1, "a"), (1, "b")), ["'a' and 'b'", "id 1"]), ((("x", "a"),), ["category", "'x'"]), (((1, None),), ["no name"])],
)
def test_coco_categories_that_are_refused(tmp_path, categories, words):
    make_folder(tmp_path, ["a.png"])
    refused(coco(tmp_path / "x.json", [(1, "a.png")], (), categories), "x.json", *words)


@pytest.mark.parametrize("content", ["nope", "[1, 2]", '{"images": 3}', '{"images": [1]}', '{"a": 1}'])
def test_json_that_is_not_coco_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    refused(tmp_path / "x.json", "x.json")


def test_the_digest_of_a_coco_pool_follows_what_it_says(tmp_path):
    make_folder(tmp_path, ["0.png", "1.png"])
    images = [(1, "0.png"), (2, "1.png")]
    digests = [
        open_pool(str(coco(tmp_path / "a.json", *content))).digest
        for content in (
            (images, [(1, 1, [0, 0, 1, 1])]),
            (images, [(1, 1, [0, 0, 1, 2])]),
            (images[::-1], [(1, 1, [0, 0, 1, 1])]),
            (images, [(1, 1, [0, 0, 1, 1])], ((3, "dog"), (1, "ox"))),
        )
    ]
    assert len(set(digests)) == 4
    assert open_pool(str(coco(tmp_path / "b.json", images, [(1, 1, [0, 0, 1, 1])], info={"year": 2017}))).digest == digests[0]


def test_real_coco(shared):
    pool = open_pool(str(shared / "bccd" / "train.json"))
    assert (pool.num_rows, pool.class_names) == (292, ("RBC", "WBC", "Platelets"))
    assert pool.detail["boxes_left_out"] == {"outside": 0, "no area": 0}
    samples = everything(pool)
    labels = [box["label"] for s in samples for box in s.extra["boxes"]]
    assert np.bincount(labels).tolist() == [3348, 301, 292]
    assert all(s.error is None and len(s.data) > 1000 for s in samples)


# --- VOC

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox>"
    "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def voc(folder, notes, size=(100, 50), **splits):
    """Write a VOC folder; the n-th image has grey value n; notes maps a name to its objects, None: no annotation."""
    make_folder(folder / "JPEGImages", [f"{name}.png" for name in notes])
    (folder / "Annotations").mkdir()
    for name, objects in notes.items():
        sized = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
        if objects is not None:
            body = "".join(OBJECT.format(*o) for o in objects)
            (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{sized}{body}</annotation>")
    for split, names in splits.items():
        (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def test_a_voc_folder(tmp_path):
    notes = {"a": [("dog", 0, 1, 1, 100, 50)], "b": [("person", 1, 11, 21, 12, 40), ("cat", 0, 95, 1, 120, 9)], "c": []}
    pool = open_pool(str(voc(tmp_path, notes, trainval=["c", "b"], test=["a"])))
    assert (pool.kind, pool.num_rows, len(pool.class_names)) == ("voc", 2, 20)
    cat, person = pool.class_names.index("cat"), pool.class_names.index("person")
    first, second = everything(pool)
    assert [(s.id, value_of(s)) for s in (first, second)] == [("c", 2), ("b", 1)]
    assert first.extra["boxes"] == []
    assert corners(second.extra["boxes"]) == [(person, 10, 20, 2, 20, True), (cat, 94, 0, 6, 9, False)]
    (sample,) = everything(open_pool(str(tmp_path), Columns(split="test")))
    assert corners(sample.extra["boxes"]) == [(pool.class_names.index("dog"), 0, 0, 100, 50, False)]
    refused(tmp_path, "no split 'val'", "test, trainval", "--split", columns=Columns(split="val"))


def test_other_classes_are_sorted_and_a_folder_without_splits_is_one(tmp_path):
    notes = {"b": [("zebra", 0, 1, 1, 5, 5)], "a": [("ant", 0, 7, 7, 7, 9), ("cat", 0, 200, 1, 210, 9)]}
    pool = open_pool(str(voc(tmp_path, notes)))
    assert pool.class_names == ("ant", "cat", "zebra")
    assert pool.detail["boxes_left_out"] == {"outside": 1, "no area": 1}
    assert [s.id for s in everything(pool)] == ["a", "b"]
    assert [len(s.extra["boxes"]) for s in everything(pool)] == [0, 1]


def test_voc_images_that_are_missing_or_not_annotated(tmp_path):
    pool = open_pool(str(voc(tmp_path, {"a": None, "b": [("ant", 0, 1, 1, 5, 5)]}, None, trainval=["a", "gone", "b"])))
    first, gone, last = everything(pool)
    assert (first.extra, gone.extra) == ({"boxes": None}, {"boxes": None})
    assert gone.error.startswith("cannot be read")
    assert (last.row, len(last.extra["boxes"])) == (2, 1)


def test_voc_folders_that_are_refused(tmp_path):
    refused(voc(tmp_path / "a", {"a": []}, trainval=["a", "../a"]), "'../a'", "climbs out")
    refused(voc(tmp_path / "b", {"a": []}, trainval=["a", "a"]), "'a' is the id of rows 0 and 1")
    refused(voc(tmp_path / "c", {"a": [("ant", 0, 1, "x", 5, 5)]}), "a.xml", "ymin 'x'")
    voc(tmp_path / "d", {"a": []})
    (tmp_path / "d" / "Annotations" / "a.xml").write_text("<annotation>")
    refused(tmp_path / "d", "a.xml", "XML")


def test_the_real_boxes_as_voc_and_as_coco_are_the_same(tmp_path, shared):
    """BCCD was VOC; its COCO file kept VOC's corners, so ours begin a pixel before, and are a pixel larger."""
    content = json.loads((shared / "bccd" / "test.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "Annotations").mkdir()
    for image in content["images"][:20]:
        shutil.copy(shared / "bccd" / "images" / image["file_name"], tmp_path / "JPEGImages")
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        objects = [
            OBJECT.format(names[a["category_id"]], 0, *a["bbox"][:2], *np.add(a["bbox"][:2], a["bbox"][2:])) for a in own
        ]
        stem = image["file_name"].rpartition(".")[0]
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    as_voc, as_coco = open_pool(str(tmp_path)), open_pool(str(shared / "bccd" / "test.json"))
    found = {s.id: s.extra["boxes"] for s in everything(as_voc)}
    for sample in read(as_coco, 0, 20):
        ours = found[sample.id.rpartition(".")[0]]
        assert [(b["x"] + 1, b["y"] + 1, b["width"] - 1, b["height"] - 1) for b in ours] == [
            (b["x"], b["y"], b["width"], b["height"]) for b in sample.extra["boxes"]
        ]


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_a_saved_listing_keeps_boxes(tmp_path, kind):
    if kind == "coco":
        make_folder(tmp_path, ["0.png"])
        pool = open_pool(str(coco(tmp_path / "a.json", [(1, "0.png")], [(1, 1, [0, 0, 1, 1])])))
    else:
        pool = open_pool(str(voc(tmp_path / "voc", {"a": [("ant", 0, 1, 1, 5, 5)]})))
    save_pool(pool, Place(str(tmp_path / "pool.arrow")))
    again = load_pool(Place(str(tmp_path / "pool.arrow")))
    assert (again.schema, again.detail, again.class_names) == (pool.schema, pool.detail, pool.class_names)
    assert [s.extra for s in everything(again)] == [s.extra for s in everything(pool)]
