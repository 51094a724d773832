"""Chosen images in a folder of their own: what is in it, what is not, and what can't be gathered."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pools import make_folder, png, write

from engine import gather as module
from engine import records
from engine.chosen import Chosen, read_chosen
from engine.folders import digest_of
from engine.gather import Wanted, gather, jobs_of
from engine.places import Place
from engine.schema import MAX_PIXELS, InputError, RunError
from engine.sources import open_pool, read, read_rows

NAMES = [f"{name}/{i}.png" for name in ("ant", "owl") for i in range(10)]
LABELS = Wanted(boxes=False, strict=True, max_pixels=MAX_PIXELS)
BOXES = Wanted(boxes=True, strict=True, max_pixels=MAX_PIXELS)


def some(*rows, ids=None):
    return Chosen(np.array(sorted(rows), dtype=np.int64), digest_of(sorted(rows)), ids or {})


def everything(pool):
    return some(*range(pool.num_rows))


@pytest.fixture
def pool(tmp_path):
    return open_pool(str(make_folder(tmp_path / "pool", NAMES)))


def files_of(place):
    return {str(file.relative_to(place)): file.read_bytes() for file in Path(place).rglob("*") if file.is_file()}


def parts_of(place):
    return {name: data for name, data in files_of(place).items() if name.startswith("parts/")}


def refused(kind, pool, chosen, out, wanted, *words, **more):
    with pytest.raises(kind) as caught:
        gather(pool, chosen, Place(str(out)), wanted, **more)
    for word in words:
        assert str(word) in str(caught.value)


# --- what is in it


def test_images_come_with_their_class_in_the_order_of_their_rows(tmp_path, pool):
    images = gather(pool, some(13, 2, 7), Place(str(tmp_path / "images")), LABELS)
    assert (len(images), images.class_names) == (3, ("ant", "owl"))
    assert [(r.row, r.id, r.label) for r in images.records()] == [(2, NAMES[2], 0), (7, NAMES[7], 0), (13, NAMES[13], 1)]
    assert [r.data for r in images.records()] == [png(2), png(7), png(13)]
    assert images.manifest["num_left_out"] == 0


def test_real_images_are_those_of_the_pool(tmp_path, shared):
    pool = open_pool(str(shared / "cifar10" / "train.parquet"))
    rows = np.sort(np.random.default_rng(0).permutation(50_000)[:300])
    images = gather(pool, some(*rows.tolist()), Place(str(tmp_path / "images")), LABELS)
    assert images.class_names == pool.class_names
    found, expected = list(images.records()), list(read_rows(pool, rows))
    assert [(r.row, r.id, r.label, r.data) for r in found] == [(s.row, s.id, s.label, s.data) for s in expected]


def test_real_boxes_are_those_of_the_pool(tmp_path, shared):
    pool = open_pool(str(shared / "bccd" / "train.json"))
    images = gather(pool, read_chosen("all", pool), Place(str(tmp_path / "images")), BOXES)
    assert (len(images), images.class_names) == (292, ("RBC", "WBC", "Platelets"))
    assert (images.manifest["num_boxes"], images.manifest["num_without_boxes"]) == (3941, 0)
    record, sample = images.record(5), next(read(pool, 5, 6))
    assert record.id == sample.id
    assert record.boxes.tolist() == [[b[side] for side in ("x", "y", "width", "height")] for b in sample.extra["boxes"]]
    assert record.box_labels.tolist() == [b["label"] for b in sample.extra["boxes"]]
    assert record.label == -1


def test_pixels_become_png(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    data = np.concatenate([np.array([[3], [0], [9], [1]], np.uint8), pixels.reshape(4, -1)], axis=1)
    data.tofile(tmp_path / "test_batch.bin")
    images = gather(open_pool(str(tmp_path / "test_batch.bin")), some(1, 2), Place(str(tmp_path / "images")), LABELS)
    assert [r.label for r in images.records()] == [0, 9]
    for record, own in zip(images.records(), pixels[1:3], strict=True):
        assert record.data.startswith(b"\x89PNG")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(record.data))), own.transpose(1, 2, 0))
    assert (images.class_names, images.manifest["max_label"]) == ((), 9)  # nothing names the classes


def coco(folder, boxes, names=("cell",), annotated=True):
    """Write a COCO file of 2 x 2 px images, each with its boxes [category, x, y, width, height]."""
    make_folder(folder, [f"{i}.png" for i in range(len(boxes))])
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 2, "height": 2} for i in range(len(boxes))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    if annotated:
        content["annotations"] = [
            {"id": 100 * i + j, "image_id": i, "category_id": box[0], "bbox": box[1:], "iscrowd": 0}
            for i, own in enumerate(boxes)
            for j, box in enumerate(own)
        ]
    (folder / "boxes.json").write_text(json.dumps(content))
    return str(folder / "boxes.json")


def test_no_boxes_are_counted_and_boxes_without_area_are_left_out(tmp_path):
    boxes = [[[0, 0, 0, 1, 1]], [], [[0, 1, 1, 0, 1], [0, 0, 0, 2, 2]], [[0, 5, 5, 1, 1]]]
    pool = open_pool(coco(tmp_path / "coco", boxes))
    images = gather(pool, everything(pool), Place(str(tmp_path / "images")), BOXES)
    assert [len(r.boxes) for r in images.records()] == [1, 0, 1, 0]
    assert (images.manifest["num_boxes"], images.manifest["num_without_boxes"]) == (2, 2)
    assert images.manifest["boxes_left_out"] == {"no area": 1, "outside": 1}


# --- how it is made


def test_jobs_are_small_and_keep_extents_together(tmp_path, monkeypatch, pool):
    monkeypatch.setattr(module, "JOB_IMAGES", 6)
    assert jobs_of(pool, np.arange(20)) == [(0, 6), (6, 12), (12, 18), (18, 20)]
    file = write(tmp_path / "x.parquet", {"image": [png(i) for i in range(23)], "label": list(range(23))}, group=4)
    rows = np.array([0, 1, 2, 4, 5, 6, 7, 8, 22])
    assert jobs_of(open_pool(str(file)), rows) == [(0, 3), (3, 9)]
    whole = write(tmp_path / "y.parquet", {"image": [png(i) for i in range(23)], "label": list(range(23))}, group=20)
    assert jobs_of(open_pool(str(whole)), np.arange(23)) == [(0, 6), (6, 12), (12, 18), (18, 23)]


def test_parts_are_cut_by_size_and_are_skipped_once_they_are_there(tmp_path, monkeypatch, pool):
    monkeypatch.setattr(module, "JOB_IMAGES", 8)
    monkeypatch.setattr(records, "PART_BYTES", 3 * len(png(0)) + 2)
    out = tmp_path / "images"
    images = gather(pool, everything(pool), Place(str(out)), LABELS)
    assert [part["num_images"] for part in images.manifest["parts"]] == [3, 3, 2, 3, 3, 2, 3, 1]
    before = files_of(out)
    (out / "manifest.json").unlink()
    (out / "parts" / "part-000000000011.arrow").unlink()  # the middle of the second job: as if it was killed there
    asked = []
    samples = records.pool_samples
    monkeypatch.setattr(records, "pool_samples", lambda pool, rows: asked.append(rows.tolist()) or samples(pool, rows))
    again = gather(pool, everything(pool), Place(str(out)), LABELS)
    assert asked == [list(range(8, 16))]
    assert again.digest == images.digest
    assert {n: d for n, d in files_of(out).items() if n != "manifest.json"} == {
        n: d for n, d in before.items() if n != "manifest.json"
    }
    gather(pool, everything(pool), Place(str(out)), LABELS)
    assert len(asked) == 1  # it was done


def test_ray_gathers_the_same_and_leaves_nothing_of_the_rest(tmp_path, ray_session, monkeypatch, shared):
    monkeypatch.setattr(module, "JOB_IMAGES", 100)
    pool = open_pool(str(shared / "cifar10" / "test.parquet"))
    rows = np.sort(np.random.default_rng(5).permutation(10_000)[:250]).tolist()
    here = gather(pool, some(*rows), Place(str(tmp_path / "here")), LABELS, here=True)
    there = gather(pool, some(*rows), Place(str(tmp_path / "there")), LABELS, here=False)
    assert parts_of(tmp_path / "here") == parts_of(tmp_path / "there")
    assert here.digest == there.digest
    assert len(there.manifest["parts"]) > 2
    chosen = set(rows)
    for name, data in files_of(tmp_path / "there").items():
        assert not [row for row in range(10_000) if row not in chosen and f"test_{row:05d}.jpg".encode() in data], name
    with pytest.raises(InputError, match="calls it 'zebra'"):
        gather(pool, some(1, 2, ids={2: "zebra"}), Place(str(tmp_path / "odd")), LABELS, here=False)
    assert not (tmp_path / "odd").exists()


def test_the_folder_holds_nothing_of_other_images(tmp_path):
    notes = [f"note-{i}-of-image" for i in range(20)]
    columns = {"image": [png(i) for i in range(20)], "id": [f"image-{i:02d}" for i in range(20)], "label": notes}
    pool = open_pool(str(write(tmp_path / "x.parquet", columns)))
    gather(pool, some(4, 11), Place(str(tmp_path / "images")), LABELS)
    for name, data in files_of(tmp_path / "images").items():
        others = [row for row in range(20) if row not in (4, 11)]
        assert not [row for row in others if f"image-{row:02d}".encode() in data or png(row) in data], name
    assert png(4) in files_of(tmp_path / "images")["parts/part-000000000000.arrow"]


def test_another_choice_is_another_folder(tmp_path, pool):
    gather(pool, some(1, 2), Place(str(tmp_path / "images")), LABELS)
    refused(InputError, pool, some(1, 3), tmp_path / "images", LABELS, "is published", "chosen")
    assert len(gather(pool, some(1, 3), Place(str(tmp_path / "images")), LABELS, overwrite=True)) == 2


# --- what can't be gathered


def test_another_pool_than_was_selected_from_is_named(tmp_path, pool):
    refused(InputError, pool, some(1, 2, ids={2: "ant/x.png"}), tmp_path / "i", LABELS, "row 2", NAMES[2], "'ant/x.png'")
    assert not (tmp_path / "i").exists()


def test_a_chosen_image_that_is_broken_is_named_and_the_rest_is_kept(tmp_path, monkeypatch, pool):
    monkeypatch.setattr(module, "JOB_IMAGES", 5)
    (tmp_path / "pool" / NAMES[8]).write_bytes(b"no image")
    refused(RunError, pool, everything(pool), tmp_path / "images", LABELS, f"'{NAMES[8]}' (row 8", "not an image file")
    assert list(parts_of(tmp_path / "images")) == ["parts/part-000000000000.arrow"]
    (tmp_path / "pool" / NAMES[8]).write_bytes(png(8))
    assert len(gather(pool, everything(pool), Place(str(tmp_path / "images")), LABELS)) == 20


def test_a_broken_image_of_a_test_pool_is_counted(tmp_path):
    names = [f"ant/{i:03d}.png" for i in range(120)]
    pool = open_pool(str(make_folder(tmp_path / "pool", names)))
    loose = Wanted(boxes=False, strict=False, max_pixels=MAX_PIXELS)
    (tmp_path / "pool" / names[7]).write_bytes(b"no image")
    images = gather(pool, everything(pool), Place(str(tmp_path / "images")), loose)
    assert (len(images), images.manifest["num_left_out"]) == (119, 1)
    assert images.manifest["left_out"][0]["id"] == names[7]
    (tmp_path / "pool" / names[9]).unlink()
    refused(RunError, pool, everything(pool), tmp_path / "more", loose, "2 of 120", "above 1%", names[7], names[9])


def test_images_without_a_label_are_counted_and_named(tmp_path):
    labels = ["ant", None, "owl", "", "owl"]
    pool = open_pool(str(write(tmp_path / "x.parquet", {"image": [png(i) for i in range(5)], "label": labels})))
    refused(InputError, pool, everything(pool), tmp_path / "images", LABELS, "2 of 5", "no label", "'1'", "'3'", "--labels")
    assert not (tmp_path / "images").exists()
    loose = Wanted(boxes=False, strict=False, max_pixels=MAX_PIXELS)
    images = gather(pool, everything(pool), Place(str(tmp_path / "test")), loose)
    assert ([r.row for r in images.records()], images.manifest["num_left_out"]) == ([0, 2, 4], 2)
    refused(InputError, pool, some(1, 3), tmp_path / "none", loose, "2 of 2", "no label")


def test_the_first_job_tells_where_no_image_has_a_label(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "JOB_IMAGES", 4)
    pool = open_pool(str(make_folder(tmp_path / "pool", [f"{i:02d}.png" for i in range(12)])))
    refused(InputError, pool, everything(pool), tmp_path / "images", LABELS, "4 of 4", "no label")


def test_images_that_were_not_annotated_are_no_background(tmp_path):
    pool = open_pool(coco(tmp_path / "coco", [[], []], annotated=False))
    refused(InputError, pool, everything(pool), tmp_path / "images", BOXES, "2 of 2", "no boxes", "not annotated")


def test_classes_are_matched_by_name(tmp_path):
    pool = open_pool(str(make_folder(tmp_path / "pool", ["bee/1.png", "owl/1.png", "ant/1.png", "owl/2.png"])))
    wanted = Wanted(False, True, MAX_PIXELS, ("owl", "ant"))
    images = gather(pool, some(0, 2, 3), Place(str(tmp_path / "images")), wanted)  # no bee
    assert pool.class_names == ("ant", "bee", "owl")
    assert ([r.label for r in images.records()], images.class_names) == ([1, 0, 0], ("owl", "ant"))
    wanted = Wanted(False, True, MAX_PIXELS, ("owl", "beetle"))
    refused(InputError, pool, everything(pool), tmp_path / "more", wanted, "2 labels", "'ant'", "owl, beetle")
    refused(InputError, pool, some(1), tmp_path / "bee", wanted, "'bee', did you mean 'beetle'?")


def test_numbers_that_are_no_class_are_refused(tmp_path):
    pool = open_pool(str(write(tmp_path / "x.parquet", {"image": [png(0), png(1)], "label": [1, 7]})))
    wanted = Wanted(False, True, MAX_PIXELS, ("a", "b", "c"))
    refused(InputError, pool, everything(pool), tmp_path / "images", wanted, "1 labels of 2 images", "'7'", "a, b, c")
    assert [r.label for r in gather(pool, some(0), Place(str(tmp_path / "one")), wanted).records()] == [1]


def test_boxes_of_an_unknown_class_are_refused(tmp_path):
    pool = open_pool(coco(tmp_path / "coco", [[[0, 0, 0, 1, 1]], [[1, 0, 0, 1, 1]]], names=("cell", "debris")))
    wanted = Wanted(True, True, MAX_PIXELS, ("cells", "cell"))
    assert [r.box_labels.tolist() for r in gather(pool, some(0), Place(str(tmp_path / "one")), wanted).records()] == [[1]]
    refused(InputError, pool, everything(pool), tmp_path / "images", wanted, "'debris'", "cells, cell")
