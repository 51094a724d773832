"""What an export is of: selections, their features and pool, addresses without keys, a model's predictions."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from trained import CLASSES, make_checkpoint, setup_of

from cli.main import run
from engine.embed import embed
from engine.export import export
from engine.export.addresses import Addresses, shared
from engine.export.turn import turned, turned_back
from engine.predict import predict
from engine.schema import InputError
from engine.select import select
from engine.store import FeatureStore
from engine.verbs import EmbedOptions, ExportOptions, PredictOptions, SelectOptions


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pool of nine images, one broken and one that is shown turned; its features; a selection, and one that follows it."""
    place = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(3)
    for row in range(9):
        file = place / "images" / CLASSES[row % 3] / f"{row}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6 if row == 4 else 1
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(file, exif=exif)
    (place / "images" / CLASSES[0] / "0.jpg").write_bytes(b"words")
    given = {"encoder": "pixels", "workers": 0, "max_rejected": "1"}
    embed(EmbedOptions(pool=str(place / "images"), out=str(place / "features"), **given))
    for out, more in (("first", {}), ("second", {"labeled": str(place / "first")})):
        told = {"strategy": "random", "budget": "3", "workers": 0, **more}
        select(SelectOptions(features=str(place / "features"), out=str(place / out), **told))
    return place


def lines(world, out, *selections, form="ids", **given):
    """Export to a file; return its lines."""
    named = tuple(str(world / name) if not str(name).startswith("/") else str(name) for name in selections)
    export(ExportOptions(selection=named, format=form, out=str(out), **given))
    return out.read_text().splitlines()


def refused(world, words, *selections, form="label-studio", out="nowhere/a.json", **given):
    given |= {"format": form, "out": str(world / out)}
    with pytest.raises(InputError, match=words):
        export(ExportOptions(selection=tuple(str(world / name) for name in selections), **given))
    assert not (world / "nowhere").exists()


def test_the_pool_is_found_by_the_selection(world, tmp_path):
    tasks = json.loads("\n".join(lines(world, tmp_path / "a.json", "first", form="label-studio")))
    picks = pq.read_table(world / "first" / "picks.parquet")
    assert [task["data"]["pool_id"] for task in tasks] == picks["id"].to_pylist()
    assert [task["data"]["image"] for task in tasks] == [f"{world}/images/{name}" for name in picks["id"].to_pylist()]


def test_which_images(world, tmp_path):
    first, second = ((world / name / "ids.txt").read_text().splitlines() for name in ("first", "second"))
    ids = FeatureStore(str(world / "features")).ids(np.array(json.loads((world / "second" / "labeled.json").read_text())))
    assert sorted(ids) == sorted(first)
    assert lines(world, tmp_path / "1.txt", "second") == second
    assert lines(world, tmp_path / "2.txt", "second", which="labeled") == ids
    assert lines(world, tmp_path / "3.txt", "second", which="both") == ids + second
    assert lines(world, tmp_path / "4.txt", "second", "first", "second") == second + first
    rows = json.loads(lines(world, tmp_path / "5.json", "first", "second", form="indices")[0])
    assert rows == [row for name in ("first", "second") for row in json.loads((world / name / "indices.json").read_text())]
    options = ExportOptions(selection=(str(world / "second"),), format="fiftyone", out=str(tmp_path / "fo"), which="both")
    export(options)
    tags = [sample["tags"] for sample in json.loads((tmp_path / "fo" / "samples.json").read_text())["samples"]]
    assert tags == [["labeled"]] * 3 + [["picks"]] * 3


def test_ids_and_rows_need_the_pool_only_where_they_must(world, tmp_path):
    ids, rows = tmp_path / "ids.txt", tmp_path / "rows.json"
    shutil.copy(world / "first" / "ids.txt", ids)
    shutil.copy(world / "first" / "indices.json", rows)
    pool = str(world / "images")
    assert lines(world, tmp_path / "a.txt", ids) == ids.read_text().splitlines()
    assert lines(world, tmp_path / "b.json", rows, form="indices") == [rows.read_text()]
    refused(world, "the pool is needed, and nothing says where it is", ids)
    refused(world, "--pool", ids, form="indices")
    refused(world, "--pool", rows, form="ids", out="nowhere/a.txt")
    assert lines(world, tmp_path / "c.json", ids, form="indices", pool=pool) == [rows.read_text()]
    assert lines(world, tmp_path / "d.txt", rows, pool=pool) == ids.read_text().splitlines()
    assert lines(world, tmp_path / "e.txt", rows, features=str(world / "features")) == ids.read_text().splitlines()
    refused(world, "no selection folder", ids, which="both")
    rows.write_text("[3, 9]")
    refused(world, "row 9; the pool has rows 0 to 8", rows, pool=pool)
    ids.write_text("cat/77.jpg\n")
    refused(world, "'cat/77.jpg'", ids, pool=pool)
    ids.write_text("")
    refused(world, "is empty", ids, pool=pool)
    refused(world, "does not exist", "third")
    ids.write_text("".join(f"{name}\n" for name in (world / "second" / "ids.txt").read_text().splitlines()))
    assert len(lines(world, tmp_path / "f.txt", ids, "second")) == 3  # the same images, by their ids and by a selection


def test_features_that_are_elsewhere_now(world, tmp_path):
    shutil.copytree(world / "first", tmp_path / "first")
    manifest = json.loads((world / "first" / "manifest.json").read_text())
    (tmp_path / "first" / "manifest.json").write_text(json.dumps({**manifest, "features": str(tmp_path / "gone")}))
    refused(world, "features that say where it is are not at .*gone any more.*--features", tmp_path / "first")
    assert lines(world, tmp_path / "a.txt", tmp_path / "first")  # ids are in the selection
    assert lines(world, tmp_path / "a.json", tmp_path / "first", form="label-studio", features=str(world / "features"))
    assert lines(world, tmp_path / "b.json", tmp_path / "first", form="label-studio", pool=str(world / "images"))


def test_what_a_round_asks_for(world, tmp_path):
    folder = tmp_path / "round-00"
    folder.mkdir()
    (folder / "to_label.csv").write_text("id,uri,row,rank\nb,x,7,0\na,x,2,1\n")
    assert lines(world, tmp_path / "a.txt", folder) == ["b", "a"]
    assert lines(world, tmp_path / "a.json", folder, form="indices") == ["[7, 2]"]


def test_another_pool_is_refused_with_both_digests(world, tmp_path):
    shutil.copytree(world / "images", tmp_path / "images")
    told = {"pool": str(tmp_path / "images")}
    assert lines(world, tmp_path / "a.txt", "first", **told)  # moved: the same relative paths
    picked = (world / "first" / "ids.txt").read_text().splitlines()
    rest = sorted(str(file.relative_to(tmp_path / "images")) for file in (tmp_path / "images").rglob("*.jpg"))
    other = tmp_path / "images" / next(name for name in reversed(rest) if name not in picked)
    other.rename(other.with_name(other.name.replace(".jpg", "0.jpg")))
    was = FeatureStore(str(world / "features")).manifest["inputs"]["pool"]["digest"]
    refused(world, f"has digest (?!{was}).*had {was}.*--by-ids", "first", **told)
    shutil.copytree(world / "features", tmp_path / "features")
    assert lines(world, tmp_path / "b.txt", "first", features=str(tmp_path / "features"))
    embed(
        EmbedOptions(
            pool=str(world / "images"),
            out=str(tmp_path / "other"),
            encoder="pixels",
            pixels_size=4,
            workers=0,
            max_rejected="1",
        )
    )
    refused(world, "has digest", "first", features=str(tmp_path / "other"))
    assert lines(world, tmp_path / "c.txt", "first", by_ids=True, **told) == picked
    first = tmp_path / "images" / CLASSES[0] / "0.jpg"
    first.rename(tmp_path / "images" / CLASSES[2] / "99.jpg")  # all rows move up by one
    refused(world, "is '.*', and the selection calls it", "first", by_ids=True, **told)
    (tmp_path / "images" / CLASSES[2] / "99.jpg").unlink()
    refused(world, "has 8 rows, and the one that was embedded 9", "first", by_ids=True, **told)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://KEY:SE/CRET@bucket/a%20b/c.jpg?endpoint_override=h:1&secret_key=x", "s3://bucket/a b/c.jpg"),
        ("gs://bucket/c.jpg", "gs://bucket/c.jpg"),
        ("https://me:pw@host/c.jpg?sig=abc&w=1", "https://***@host/c.jpg?sig=***&w=1"),
        ("file:///data/a%20b.jpg", "/data/a b.jpg"),
        ("/data/a%20b?.jpg", "/data/a%20b?.jpg"),
    ],
)
def test_addresses_have_no_keys(uri, expected):
    assert shared(uri) == expected


def test_prefixes():
    there = Addresses.of(("s3://b/=/data/local-files/?d=b/", "s3://b/x/=X:"))
    assert there.of_image("s3://K:S@b/a%20&b.jpg") == "/data/local-files/?d=b/a%20%26b.jpg"
    assert there.of_image("s3://b/x/y.jpg") == "X:y.jpg"
    assert there.of_image("/c.jpg") == "/c.jpg"
    assert (there.keys, there.local) == (1, 1)
    with pytest.raises(InputError, match="'/d/' is where no image"):
        Addresses.of(("/d/=",)).check()


def test_a_list_of_addresses_with_keys_gives_none_of_them_away(world, tmp_path, capsys):
    """Nothing reads a list's images for ids; what is written for ids made of addresses is masked."""
    (tmp_path / "a.csv").write_text("path\nhttps://host/a.jpg?sig=SECRET\nhttps://host/b.jpg?sig=SECRET\n")
    (tmp_path / "rows.json").write_text("[1]")
    told = ["--format", "ids", "--out", str(tmp_path / "a.txt"), "--pool", str(tmp_path / "a.csv"), "--json"]
    assert run(["export", str(tmp_path / "rows.json"), *told]) == 0
    assert (tmp_path / "a.txt").read_text() == "https://host/b.jpg?sig=***\n"
    assert "SECRET" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_boxes_are_where_the_image_shows_them(orientation, tmp_path):
    """Against Pillow's own turning: the pixels of a box as stored are those of the turned box as shown."""
    from PIL import ImageOps

    image = Image.new("L", (11, 7))
    box = (2, 1, 3, 4)
    image.paste(255, (2, 1, 5, 5))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    x, y, width, height = turned(box, image.size, orientation)
    assert shown.getbbox() == (x, y, x + width, y + height)
    assert turned_back((x, y, width, height), shown.size, orientation) == box


def test_predictions_become_pre_annotations(world, tmp_path):
    make_checkpoint(tmp_path / "model", setup_of())
    told = {"pool": str(world / "images"), "max_rejected": "1", "workers": 0}
    predict(PredictOptions(checkpoint=str(tmp_path / "model"), out=str(tmp_path / "probs"), **told))
    store = FeatureStore(str(tmp_path / "probs"))
    out, given = tmp_path / "a.json", {"predictions": str(tmp_path / "probs")}
    tasks = json.loads("\n".join(lines(world, out, "second", form="label-studio", **given)))
    for task in tasks:
        (said,) = task["predictions"]
        probs = store.vectors(np.array([task["data"]["pool_row"]]))[0]
        (found,) = said["result"]
        assert found["value"] == {"choices": [CLASSES[int(probs.argmax())]]}
        assert (found["from_name"], found["to_name"], found["type"]) == ("choice", "image", "choices")
        assert said["score"] == pytest.approx(float(probs.max()))
    refused(world, "--predictions means nothing for coco", "first", form="coco", **given)
    refused(world, "holds embedding", "first", predictions=str(world / "features"))


def test_predicted_boxes_are_in_percent_of_the_image_as_shown(world, tmp_path):
    detector = {"task": "detect", "image_size": 64, "augment": "none", "score_threshold": 0.0, "max_boxes": 7}
    make_checkpoint(tmp_path / "model", setup_of("fcos:test_resnet", **detector))
    told = {"pool": str(world / "images"), "max_rejected": "1", "workers": 0}
    predict(PredictOptions(checkpoint=str(tmp_path / "model"), out=str(tmp_path / "boxes"), **told))
    store = FeatureStore(str(tmp_path / "boxes"))
    rows = np.array([4, 5])
    (tmp_path / "rows.json").write_text(json.dumps(rows.tolist()))
    drawn = store.detections(rows)
    least = sorted(box["score"] for boxes in drawn for box in boxes)[3]
    given = {"pool": str(world / "images"), "predictions": str(tmp_path / "boxes"), "min_score": least}
    tasks = json.loads("\n".join(lines(world, tmp_path / "a.json", tmp_path / "rows.json", form="label-studio", **given)))
    assert sum(len(task["predictions"][0]["result"]) for task in tasks) == sum(len(boxes) for boxes in drawn) - 3
    assert [task["data"].get("orientation") for task in tasks] == [6, None]
    for task, boxes, shown in zip(tasks, drawn, ((40, 60), (60, 40)), strict=True):
        kept = [box for box in boxes if box["score"] >= least]
        for found, box in zip(task["predictions"][0]["result"], kept, strict=True):
            value = found["value"]
            assert (found["original_width"], found["original_height"]) == shown
            assert value["rectanglelabels"] == [CLASSES[box["label"]]]
            stored = tuple(box[side] for side in ("x", "y", "width", "height"))
            expected = turned(stored, (60, 40), task["data"].get("orientation", 1))
            px = [value[side] * shown[at % 2] / 100 for at, side in enumerate(("x", "y", "width", "height"))]
            assert px == pytest.approx(expected, abs=1e-3)
    assert os.path.exists(tmp_path / "a.json")
