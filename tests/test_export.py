"""Every kind of pool in every format: read back by who reads it, or an error that says what to do."""

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine.export import EXPORTS, export
from engine.export.output import Names
from engine.schema import InputError, RunError
from engine.sources import open_pool, read
from engine.verbs import ExportOptions
from engine.verbs.export import FORMATS

PICKS = [4, 0, 3]
"""Rows, in pick order."""
SIZE = (32, 32)
HELD = ("parquet", "tar", "cifar")
NAMES = ["b/0.png", "a/1.png", "a/0.png", "c/2.png", "c/0.png"]


def pixels(row):
    """An image whose pixels say its row."""
    values = np.full((SIZE[1], SIZE[0], 3), 40 * row + 7, np.uint8)
    values[row, :, 0] = 255
    return values


def as_png(row):
    buffer = io.BytesIO()
    Image.fromarray(pixels(row)).save(buffer, format="PNG")
    return buffer.getvalue()


def files(folder, names):
    for row, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(as_png(row))
    return folder


def folder_pool(place):
    return files(place / "images", sorted(NAMES))


def coco_pool(place):
    files(place / "images", NAMES)
    box = {"image_id": 9, "category_id": 3, "bbox": [1, 2, 10.5, 4], "iscrowd": 0}
    crowd = {"image_id": 5, "category_id": 1, "bbox": [0, 0, 8, 8], "iscrowd": 1}
    images = [{"id": id, "file_name": name, "width": 32, "height": 32} for id, name in zip((5, 8, 7, 6, 9), NAMES, strict=True)]
    content = {"images": images, "categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}]}
    (place / "a.json").write_text(json.dumps({**content, "annotations": [{"id": 1, **box}, {"id": 2, **crowd}]}))
    return place / "a.json"


def voc_pool(place):
    files(place / "JPEGImages", [f"{row}.png" for row in range(5)])
    (place / "Annotations").mkdir()
    drawn = "<object><name>ant</name><bndbox><xmin>3</xmin><ymin>1</ymin><xmax>9</xmax><ymax>5</ymax></bndbox></object>"
    for row in range(4):
        size = "<size><width>32</width><height>32</height></size>"
        (place / "Annotations" / f"{row}.xml").write_text(f"<annotation>{size}{drawn * row}</annotation>")
    return place


def parquet_pool(place):
    image = pa.array([{"bytes": as_png(row), "path": f"x_{row}.png"} for row in range(5)])
    pq.write_table(
        pa.table({"image": image, "label": ["ant", "bee", "ant", "bee", "ant"]}), place / "a.parquet", row_group_size=2
    )
    return place / "a.parquet"


def tar_pool(place):
    with tarfile.open(place / "a.tar", "w") as archive:
        for row in range(5):
            for name, data in ((f"{row}.png", as_png(row)), (f"{row}.cls", str(row % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return place / "a.tar"


def cifar_pool(place):
    rows = [np.concatenate([[row % 3], pixels(row).transpose(2, 0, 1).reshape(-1)]) for row in range(5)]
    np.stack(rows).astype(np.uint8).tofile(place / "data_batch_1.bin")
    return place / "data_batch_1.bin"


def list_pool(place):
    files(place / "elsewhere", NAMES)
    lines = [f"{place}/elsewhere/{name},{name[0]},{100 + row}" for row, name in enumerate(NAMES)]
    (place / "lists").mkdir()
    (place / "lists" / "a.csv").write_text("\n".join(["path,label,id", *lines]))
    return place / "lists" / "a.csv"


POOLS = {
    "folder": folder_pool,
    "coco": coco_pool,
    "voc": voc_pool,
    "parquet": parquet_pool,
    "tar": tar_pool,
    "cifar": cifar_pool,
    "list": list_pool,
}


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    found = {}
    for kind, make in POOLS.items():
        place = tmp_path_factory.mktemp(kind)
        found[kind] = str(make(place))
    return found


@pytest.fixture
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(json.dumps(PICKS))
    return str(file)


def samples_of(uri):
    pool = open_pool(uri)
    every = list(read(pool, 0, pool.num_rows))
    return pool, [every[row] for row in PICKS]


def base_of(uri):
    """Below which folder a tool finds the images of a pool."""
    return Path(uri).parents[1] / "elsewhere" if uri.endswith(".csv") else Path(open_pool(uri).base or uri)


def same(image, sample):
    """Whether an image, or a file of one, has the pixels of a sample."""
    mine = np.asarray((image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB"))
    theirs = sample.data if isinstance(sample.data, Image.Image) else Image.open(io.BytesIO(sample.data))
    return np.array_equal(mine, np.asarray(theirs.convert("RGB")))


def told(rows, uri, form, out, copy=False, **given):
    return ExportOptions(selection=(str(rows),), format=form, out=str(out), pool=str(uri), copy=copy, **given)


def out_of(place, form, copy):
    ending = EXPORTS[form].endings
    return place / ("out" if not ending or (copy and not EXPORTS[form].embeds) else f"out{ending[0]}")


# --- who reads them: each returns the images in pick order, and checks what else is told


def read_label_studio(out, uri, copy):
    """As its import does: a list of tasks, each with `data` that the labelling setup's $image is taken from."""
    tasks = json.loads((out / "tasks.json" if copy else out).read_text())
    _pool, samples = samples_of(uri)
    assert [(t["data"]["pool_id"], t["data"]["pool_row"]) for t in tasks] == [(s.id, s.row) for s in samples]
    assert all(set(task) == {"data"} and all(isinstance(v, str | int) for v in task["data"].values()) for task in tasks)
    return [task["data"]["image"] for task in tasks]


def read_cvat(out, uri, copy):
    """As its manifest reader does: a version, a type, then a name, an extension and a size a line."""
    version, kind, *images = map(json.loads, (out / "manifest.jsonl" if copy else out).read_text().splitlines())
    assert (version, kind) == ({"version": "1.1"}, {"type": "images"})
    assert all((image["width"], image["height"]) == SIZE and image["meta"]["related_images"] == [] for image in images)
    base = out if copy else base_of(uri)
    return [base / f"{image['name']}{image['extension']}" for image in images]


def read_coco(out, uri, copy):
    from faster_coco_eval import COCO

    file = out / "annotations.json" if copy else out
    coco, (pool, samples) = COCO(str(file)), samples_of(uri)
    images = coco.loadImgs(sorted(coco.getImgIds()))
    drawn = [sample.extra.get("boxes") for sample in samples]
    for image, boxes in zip(images, drawn, strict=True):
        found = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
        assert [box["bbox"] for box in found] == [[b["x"], b["y"], b["width"], b["height"]] for b in boxes or ()]
        assert [coco.cats[box["category_id"]]["name"] for box in found] == [pool.class_names[b["label"]] for b in boxes or ()]
        assert [box["iscrowd"] for box in found] == [b["crowd"] for b in boxes or ()]
    assert ("annotations" in coco.dataset) == any(boxes is not None for boxes in drawn)
    base = out / "images" if copy else base_of(uri)
    if copy:  # as a pool, too
        assert [s.id for s in read(open_pool(str(file)), 0, 3)] == [image["file_name"] for image in images]
    return [base / image["file_name"] for image in images]


def read_fiftyone(out, uri, copy):
    """As fiftyone.types.FiftyOneDataset is imported; `test_fiftyone_reads_it` has the real importer, where it is installed."""
    assert json.loads((out / "metadata.json").read_text())["media_type"] == "image"
    samples, (pool, expected) = json.loads((out / "samples.json").read_text())["samples"], samples_of(uri)
    for found, sample in zip(samples, expected, strict=True):
        assert (found["pool_id"], found["tags"]) == (sample.id, ["picks"])
        truth = found.get("ground_truth")
        if sample.extra.get("boxes"):
            first = sample.extra["boxes"][0]
            assert truth["detections"][0]["bounding_box"] == [first[n] / 32 for n in ("x", "y", "width", "height")]
        elif sample.label is not None:
            assert truth["label"] == (pool.class_names[sample.label] if pool.class_names else str(sample.label))
    return [out / sample["filepath"] for sample in samples]


def read_huggingface(out, uri, copy):
    import datasets

    data = datasets.load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(out.parent / "cache"))
    pool, samples = samples_of(uri)
    assert data["id"] == [sample.id for sample in samples]
    if pool.schema.names.count("boxes"):
        drawn = [sample.extra["boxes"] for sample in samples]
        assert [[box["bbox"] for box in row] if row else row for row in data["objects"]] == [
            [[b["x"], b["y"], b["width"], b["height"]] for b in boxes] if boxes else boxes for boxes in drawn
        ]
    else:
        assert data["label"] == [sample.label for sample in samples]
        assert getattr(data.features["label"], "names", None) == (list(pool.class_names) if pool.class_names else None)
    return data["image"]


def read_imagefolder(out, uri, copy):
    from torchvision.datasets import ImageFolder

    data, (pool, samples) = ImageFolder(str(out)), samples_of(uri)
    with open(out / "ids.csv") as file:
        listed = list(csv.DictReader(file))
    assert [entry["id"] for entry in listed] == [sample.id for sample in samples]
    assert {path for path, _ in data.samples} == {str(out / entry["file_name"]) for entry in listed}
    assert all(Path(path).is_symlink() != copy for path, _ in data.samples)
    for entry, sample in zip(listed, samples, strict=True):
        named = pool.class_names[sample.label] if pool.class_names and sample.label is not None else str(sample.label)
        assert Path(entry["file_name"]).parent.name == ("unlabelled" if sample.label is None else named)
    return [out / entry["file_name"] for entry in listed]


def read_voc(out, uri, copy):
    _pool, samples = samples_of(uri)
    if copy:
        found = open_pool(str(out))
        again = list(read(found, 0, found.num_rows))
        assert found.kind == "voc"
        for one, other in zip(again, samples, strict=True):
            sides = ("x", "y", "width", "height", "crowd")
            drawn = [[tuple(b[n] for n in sides) for b in s.extra.get("boxes") or ()] for s in (one, other)]
            assert drawn[0] == drawn[1]
            assert (one.extra["boxes"] is None) == (other.extra.get("boxes") is None)
        return [io.BytesIO(sample.data) for sample in again]
    base = base_of(uri)
    return [next(base.glob(f"{stem}.*")) for stem in out.read_text().splitlines()]


def read_ids(out, uri, copy):
    _, samples = samples_of(uri)
    assert out.read_text().splitlines() == [sample.id for sample in samples]


def read_indices(out, uri, copy):
    assert np.array_equal(np.array(json.loads(out.read_text())), PICKS)


READERS = {
    "label-studio": read_label_studio,
    "cvat": read_cvat,
    "coco": read_coco,
    "fiftyone": read_fiftyone,
    "huggingface": read_huggingface,
    "imagefolder": read_imagefolder,
    "voc": read_voc,
    "ids": read_ids,
    "indices": read_indices,
}


def test_the_formats_are_those_of_the_options():
    assert tuple(EXPORTS) == FORMATS == tuple(READERS)


@pytest.mark.parametrize("copy", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", POOLS)
def test_every_pool_in_every_format(pools, rows, tmp_path, kind, form, copy):
    out, uri = out_of(tmp_path, form, copy), pools[kind]
    options, given = told(rows, uri, form, out, copy), {}
    images = form not in ("ids", "indices")
    if kind == "list" and not copy and form in ("cvat", "coco", "voc"):
        with pytest.raises(InputError, match="--uri-prefix"):  # absolute paths: below which folder does the tool look?
            export(options)
        given = {"uri_prefix": (f"{Path(uri).parents[1]}/elsewhere/=",)}
    if (kind in HELD and not copy and images) or (copy and not images):
        with pytest.raises(InputError, match="--copy"):
            export(options)
        assert os.listdir(tmp_path) == []
        return
    facts = export(told(rows, uri, form, out, copy, **given))
    assert (facts["num_images"], facts.get("num_copies", 0)) == (3, 3 if copy and images else 0)
    found = READERS[form](out, uri, copy)
    if images:
        assert len(found) == 3
        assert all(same(image, sample) for image, sample in zip(found, samples_of(uri)[1], strict=True))
    before = out.read_bytes() if out.is_file() else sorted(os.listdir(out))
    with pytest.raises(InputError, match="is there already"):
        export(told(rows, uri, form, out, copy, **given))
    export(told(rows, uri, form, out, copy, overwrite=True, **given))
    assert before == (out.read_bytes() if out.is_file() else sorted(os.listdir(out)))
    assert [name for name in os.listdir(tmp_path) if ".tmp-" in name] == []


def test_names_of_files_neither_collide_nor_climb():
    names = Names()
    given = [
        ("cat/0.png", 1),
        ("dog/0.PNG", 2),
        ("x/../../0.png", 3),
        ("0-3.png", 4),
        ("..", 5),
        ("s3://b/a b?c=d", 6),
        ("é.png", 7),
    ]
    found = [names.add(name, row, ".png", "images") for name, row in given]
    assert found[:4] == ["images/0.png", "images/0-2.png", "images/0-3.png", "images/0-3-4.png"]
    assert found[4:] == ["images/image.png", "images/a_b_c_d.png", "images/é.png"]
    assert [names.add("B.png", 8, ".png"), names.add("b.png", 9, ".png")] == ["B.png", "b-9.png"]
    stems = Names(stems=True)
    assert [stems.add("a.jpg", 0, ".jpg"), stems.add("a.png", 1, ".png")] == ["a.jpg", "a-1.png"]


def test_classes_become_folders_that_stay_inside(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\n0.png,../x\n1.png,../X\n2.png,\n3.png,unlabelled\n4.png,/etc/y\n")
    files(tmp_path, [f"{row}.png" for row in range(5)])
    (tmp_path / "rows.json").write_text("[0, 1, 2, 3, 4]")
    export(told(tmp_path / "rows.json", tmp_path / "a.csv", "imagefolder", tmp_path / "out"))
    folders = sorted(name for name in os.listdir(tmp_path / "out") if name != "ids.csv")
    assert (len(folders), len({name.lower() for name in folders})) == (5, 5)
    assert all(len(os.listdir(tmp_path / "out" / name)) == 1 for name in folders)


def test_a_broken_image_leaves_nothing_behind(pools, rows, tmp_path):
    shutil.copytree(pools["folder"], tmp_path / "images")
    (tmp_path / "images" / sorted(NAMES)[3]).write_bytes(b"words")
    with pytest.raises(RunError, match=r"c/0.png.*not an image"):
        export(told(rows, tmp_path / "images", "imagefolder", tmp_path / "out"))
    assert os.listdir(tmp_path) == ["images"]


def test_an_export_replaces_its_own_folders_alone(pools, rows, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"no export wrote.*thesis"):
        export(told(rows, pools["folder"], "imagefolder", tmp_path / "out", overwrite=True))
    with pytest.raises(InputError, match="what this command reads"):
        export(told(rows, pools["folder"], "fiftyone", pools["folder"], overwrite=True))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_the_order_of_picks_is_kept_over_many_parts_of_a_container(tmp_path):
    """More images than are read at a time, from row groups that each are needed again and again."""
    count, rng = 2100, np.random.default_rng(0)
    image = [{"bytes": as_png(row % 6), "path": f"{row}.png"} for row in range(count)]
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet", row_group_size=500)
    rows = rng.permutation(count).tolist()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    export(told(tmp_path / "rows.json", tmp_path / "a.parquet", "huggingface", tmp_path / "out.parquet", copy=True))
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["pool_row"].to_pylist() == rows
    assert [value["bytes"] for value in found["image"].to_pylist()] == [as_png(row % 6) for row in rows]
