"""Answers of people -> labels: by hand, back to the pool's ids, and on to the trainer that takes them."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from trainings import CLASSES, picture

from cli.main import run
from engine.answers import import_labels
from engine.answers.asked import Asked
from engine.answers.said import rotated
from engine.chosen import read_chosen
from engine.export import export
from engine.labels import read_labels
from engine.schema import InputError
from engine.sources import open_pool
from engine.verbs import ExportOptions, ImportLabelsOptions

IDS = ["a/1.jpg", "a/2.jpg", "b/1.jpg"]


@pytest.fixture
def asked(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("".join(f"{name}\n" for name in IDS))
    return str(file)


def taken(tmp_path, asked, form, answers, out="out.csv", **given):
    """Write answers to a file and take them back; return what was written, and what was said of it."""
    file = tmp_path / f"answers{given.pop('ending', '.json')}"
    file.write_text(answers if isinstance(answers, str) else json.dumps(answers))
    told = {"answers": (str(file),), "format": form, "asked": (asked,), "out": str(tmp_path / out), "overwrite": True, **given}
    facts = import_labels(ImportLabelsOptions(**told))
    text = (tmp_path / out).read_text()
    return (json.loads(text) if out.endswith(".json") else text.splitlines()), facts


def wrong(words, *told, **given):
    with pytest.raises(InputError, match=words):
        taken(*told, **given)


def choice(label):
    return {"type": "choices", "from_name": "choice", "to_name": "image", "value": {"choices": [label]}}


def rectangle(label, x, y, width, height, size=(200, 100), **more):
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [label], **more}
    return {"type": "rectanglelabels", "original_width": size[0], "original_height": size[1], "value": value}


def task(name, *results, **more):
    return {"data": {"image": f"/x/{name}", "pool_id": name}, "annotations": [{"result": list(r), **more} for r in results]}


# --- Label Studio


def test_label_studio_choices(tmp_path, asked):
    tasks = [task("b/1.jpg", [choice("cat")]), task("a/1.jpg", [choice("dog, big")], was_cancelled=False), task("a/2.jpg")]
    tasks += [task("zebra.jpg", [choice("cat")])]
    lines, facts = taken(tmp_path, asked, "label-studio", tasks)
    assert lines == ["id,label", 'a/1.jpg,"dog, big"', "b/1.jpg,cat"]
    assert (facts["num_answered"], facts["unanswered"], facts["strangers"]) == (2, ["a/2.jpg"], ["zebra.jpg"])
    wrong("1 of 3 images have no answer: 'a/2.jpg'", tmp_path, asked, "label-studio", tasks, complete=True)
    _, facts = taken(tmp_path, asked, "label-studio", [*tasks, task("a/2.jpg", [choice("x")], was_cancelled=True)])
    assert (facts["num_answered"], facts["notes"]) == (2, ["answers that were skipped: 1"])


def test_label_studio_boxes(tmp_path, asked):
    tilted = rectangle("cat", 50, 50, 10, 10, rotation=90)
    tasks = [task("a/1.jpg", [rectangle("dog", 10, 20, 50, 40), tilted]), task("a/2.jpg", []), task("b/1.jpg")]
    tasks[0]["annotations"][0]["result"].append({"type": "polygonlabels", "value": {}})
    found, facts = taken(tmp_path, asked, "label-studio", tasks, "out.json")
    assert found["images"][0] == {"id": 1, "file_name": "a/1.jpg", "width": 200, "height": 100}
    assert [image["file_name"] for image in found["images"]] == ["a/1.jpg", "a/2.jpg"]  # nothing in a/2 is an answer
    named = {category["id"]: category["name"] for category in found["categories"]}
    boxes = [(named[box["category_id"]], *box["bbox"]) for box in found["annotations"]]
    assert boxes[0] == pytest.approx(("dog", 20, 20, 100, 40))
    assert boxes[1][1:] == pytest.approx((90, 50, 10, 20))  # 20 x 10 px about its corner (100, 50)
    assert set(facts["notes"]) == {
        "rotated boxes, of which the upright box around them is kept: 1",
        "results that are neither boxes nor classes, left out: 1",
    }
    wrong(
        "hold labels, which a file that ends in .csv",
        tmp_path,
        asked,
        "label-studio",
        [task("a/1.jpg", [choice("c")])],
        "o.json",
    )
    wrong("hold boxes, which a file that ends in .json", tmp_path, asked, "label-studio", tasks, "o.csv")
    lines, _ = taken(tmp_path, asked, "label-studio", tasks, "out.jsonl")
    assert json.loads(lines[1]) == {"id": "a/2.jpg", "objects": []}


def test_answers_that_differ(tmp_path, asked):
    old, new = {"updated_at": "2026-02-01T09:00:00+02:00"}, {"updated_at": "2026-02-01T08:00:00Z"}
    tasks = [task("a/1.jpg", [choice("dog")], completed_by=7, **new), task("a/1.jpg", [choice("cat")], completed_by=8, **old)]
    wrong("'a/1.jpg' differ, 'dog' by 7 and 'cat' by 8", tmp_path, asked, "label-studio", tasks)
    lines, facts = taken(tmp_path, asked, "label-studio", tasks, on_conflict="latest")
    assert (lines[1:], facts["num_conflicts"]) == (["a/1.jpg,dog"], 1)
    tasks[1]["annotations"][0]["result"] = [choice("dog")]
    assert taken(tmp_path, asked, "label-studio", tasks)[0][1:] == ["a/1.jpg,dog"]
    table = "id,label\na/1.jpg,dog\na/2.jpg,\na/1.jpg,cat\n"
    assert taken(tmp_path, asked, "csv", table, ending=".csv", on_conflict="latest")[0][1:] == ["a/1.jpg,cat"]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"a": 1}, "no list of tasks"),
        ("[", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ([{"id": 1, "image": "x", "choice": "cat"}], "not JSON-MIN"),
        ([{"id": 1, "data": {"text": "x"}, "annotations": []}], "neither pool_id nor image"),
        ([task("a/1.jpg", [choice("cat"), choice("dog")])], "2 classes, 'cat' and 'dog'"),
        ([task("a/1.jpg", [rectangle("cat", "wide", 0, 1, 1)])], "x is 'wide'"),
        ([task("a/1.jpg", [rectangle("cat", 0, 0, 1, 1, size=(None, 1))])], "original_width is None"),
        ([task("a/1.jpg", [{**rectangle("cat", 0, 0, 1, 1), "image_rotation": 90}])], "turn it back"),
        ([task("a/1.jpg", [{"type": "choices"}])], "type 'choices' without a value"),
        ([task("x/1.jpg", [choice("cat")])], "none of the 3 images asked for"),
        ([task("a/1.jpg")], "has anybody answered"),
    ],
)
def test_label_studio_answers_that_are_refused(tmp_path, asked, answers, words):
    wrong(words, tmp_path, asked, "label-studio", answers)


# --- CVAT

XML = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels><label><name>dog</name></label></labels></task></meta>
<image id="0" name="a/1.jpg" width="200" height="100">
 <tag label="cat" source="manual"></tag>
 <box label="dog" xtl="10.5" ytl="20" xbr="30.5" ybr="60" occluded="0" z_order="0"><attribute name="a">b</attribute></box>
 <box label="&lt;cat&gt;" xtl="90" ytl="45" xbr="110" ybr="55" rotation="90" z_order="0"></box>
 <polygon label="dog" points="1,2;3,4;5,6"></polygon>
</image>
<image id="1" name="a/2.jpg" width="50" height="60"></image>
<image id="2" name="c/9.jpg" width="50" height="60"><tag label="dog"/></image>
</annotations>"""


def test_cvat(tmp_path, asked):
    lines, facts = taken(tmp_path, asked, "cvat", XML, ending=".xml")
    assert (lines[1:], facts["num_strangers"], facts["num_unanswered"]) == (["a/1.jpg,cat"], 1, 2)
    found, facts = taken(tmp_path, asked, "cvat", XML, "out.json", ending=".xml")
    named = {category["id"]: category["name"] for category in found["categories"]}
    boxes = [(named[box["category_id"]], *box["bbox"]) for box in found["annotations"]]
    assert boxes[0] == pytest.approx(("dog", 10.5, 20, 20, 40))
    assert boxes[1][0] == "<cat>"
    assert boxes[1][1:] == pytest.approx((95, 40, 10, 20))  # about its middle (100, 50)
    assert (len(found["images"]), facts["unanswered"]) == (1, ["a/2.jpg", "b/1.jpg"])
    found, _ = taken(tmp_path, asked, "cvat", XML, "out.json", ending=".xml", empty_answers=True)
    assert [image["file_name"] for image in found["images"]] == ["a/1.jpg", "a/2.jpg"]


def test_cvat_as_a_zip(tmp_path, asked):
    with zipfile.ZipFile(tmp_path / "answers.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("task/annotations.xml", XML)
    told = {"format": "cvat", "asked": (asked,), "out": str(tmp_path / "out.csv")}
    assert import_labels(ImportLabelsOptions(answers=(str(tmp_path / "answers.zip"),), **told))["num_answered"] == 1
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("other.xml", XML)
    told["out"] = str(tmp_path / "more.csv")
    for name, words in (("empty.zip", "0 files called annotations.xml"), ("ids.txt", "cannot be read as XML")):
        with pytest.raises(InputError, match=words):
            import_labels(ImportLabelsOptions(answers=(str(tmp_path / name),), **told))


BOMB = '<!DOCTYPE a [<!ENTITY x "0123456789"><!ENTITY y "&x;&x;&x;&x;">]><annotations><image name="&y;"/></annotations>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotations><image name="&x;"/></annotations>'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "document type"),
        (OUTSIDE, "document type"),
        ("<annotations><image", "cannot be read as XML"),
        ("<annotations></annotations>", "holds no image"),
        ('<annotations><track id="0" label="x"/></annotations>', "of a video"),
        (XML.replace("10.5", "nan"), "xtl is 'nan'"),
        (XML.replace('<tag label="cat"', '<tag label="dog"/><tag label="cat"'), "2 classes"),
        (XML.replace('name="a/1.jpg" width="200"', 'name="a/1.jpg"'), "width is None"),
    ],
)
def test_xml_that_is_refused(tmp_path, asked, text, words):
    wrong(words, tmp_path, asked, "cvat", text, ending=".xml")


# --- others


def test_coco_answers(tmp_path, asked):
    images = [{"id": 3, "file_name": "images/a/1.jpg", "width": 20, "height": 20}, {"id": 4, "file_name": "b/1.jpg"}]
    box = {"id": 1, "image_id": 3, "category_id": 5, "bbox": [15, 5, 10, 5], "area": 50, "iscrowd": 1}
    content = {"images": images, "annotations": [box], "categories": [{"id": 5, "name": "dog"}, {"id": 9, "name": "cat"}]}
    found, facts = taken(tmp_path, asked, "coco", content, "out.json")
    assert [c["name"] for c in found["categories"]] == ["dog", "cat"]
    assert [(b["bbox"], b["iscrowd"]) for b in found["annotations"]] == [([15, 5, 5, 5], 1)]
    assert (found["images"][0]["file_name"], facts["num_answered"]) == ("a/1.jpg", 1)
    assert taken(tmp_path, asked, "coco", content, "out.json", empty_answers=True)[1]["num_answered"] == 2


def test_fiftyone_answers(tmp_path, asked):
    box = {"_cls": "Detection", "label": "dog", "bounding_box": [0.1, 0.2, 0.5, 0.25]}
    sized = {"metadata": {"_cls": "ImageMetadata", "width": 100, "height": 40}}
    samples = [
        {"filepath": "data/1.jpg", "pool_id": "a/1.jpg", "mine": {"_cls": "Classification", "label": "cat"}},
        {"filepath": "/x/a/2.jpg", "mine": {"_cls": "Detections", "detections": [box]}, **sized},
        {"filepath": "/x/b/1.jpg", "mine": None},
    ]
    content = {"samples": samples}
    assert taken(tmp_path, asked, "fiftyone", content, field="mine")[0][1:] == ["a/1.jpg,cat"]
    found, _ = taken(tmp_path, asked, "fiftyone", content, "out.json", field="mine")
    assert found["annotations"][0]["bbox"] == pytest.approx([10, 8, 50, 10])
    wrong("no field 'ground_truth' .one of: filepath, metadata, mine", tmp_path, asked, "fiftyone", content)
    del samples[1]["metadata"]
    wrong("compute_metadata", tmp_path, asked, "fiftyone", content, "out.json", field="mine")


def test_a_table_of_answers(tmp_path, asked):
    table = "file,species\nimages/a/1.jpg,cat\n1.jpg,dog\n"
    given = {"ending": ".csv", "id_column": "file", "label_column": "species"}
    wrong("'1.jpg' may be 'a/1.jpg' or 'b/1.jpg'", tmp_path, asked, "csv", table, **given)
    lines, _ = taken(tmp_path, asked, "csv", table.replace("\n1.jpg", "\n2.jpg"), **given)
    assert lines[1:] == ["a/1.jpg,cat", "a/2.jpg,dog"]
    wrong("--id-column", tmp_path, asked, "csv", table, ending=".csv")
    wrong("--label-column", tmp_path, asked, "csv", table, ending=".csv", id_column="file")


def test_which_image_is_meant():
    asked = Asked()
    for name in ("cat/1.png", "dog/1.png", "deep/er/x.png", "x-0.tar/000", "2007_1", "s3://b/y.jpg"):
        asked.add(name)
    asked.add("cifar/7", "images/7.png")
    cases = {
        "cat/1.png": "cat/1.png",
        "root/dog/1.png": "dog/1.png",
        "bird/1.png": None,
        "x.png": "deep/er/x.png",
        "other/x.png": None,
        "x.jpg": None,
        "2007_1.jpg": "2007_1",
        "JPEGImages/2007_1.jpg": "2007_1",
        "images/7.png": "cifar/7",
        "7.png": "cifar/7",
        "b/y.jpg": "s3://b/y.jpg",
        "12007_1.jpg": None,
    }
    assert {name: asked.find(name) for name in cases} == cases


def test_a_box_rotated_about_a_point():
    assert rotated((0, 0, 4, 2), 90, (0, 0)) == pytest.approx((-2, 0, 2, 4))
    assert rotated((0, 0, 2, 2), 45, (1, 1)) == pytest.approx((1 - 2**0.5, 1 - 2**0.5, 8**0.5, 8**0.5))


def test_ids_that_are_no_file_names_go_to_json_lines(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("s3://b/1.jpg\n")
    tasks = [task("s3://b/1.jpg", [rectangle("dog", 0, 0, 50, 50)])]
    wrong(r"ends in .jsonl", tmp_path, str(file), "label-studio", tasks, "out.json")
    lines, _ = taken(tmp_path, str(file), "label-studio", tasks, "out.jsonl")
    assert json.loads(lines[0])["objects"] == [{"bbox": [0, 0, 100, 50], "category": "dog", "iscrowd": 0}]


# --- there and back


@pytest.fixture
def pool(tmp_path):
    """Twelve images without labels, one of them shown turned; the rows that are asked for."""
    rng = np.random.default_rng(1)
    for row in range(12):
        (tmp_path / "pool").mkdir(exist_ok=True)
        (tmp_path / "pool" / f"{row:02d}.png").write_bytes(picture(row % 3, rng))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "pool" / "05.png", exif=exif)
    (tmp_path / "rows.json").write_text(json.dumps([7, 5, 0, 1, 2, 3, 4, 6]))
    return tmp_path / "pool"


def row_of(task):
    return int(task["data"]["pool_id"].removesuffix(".png"))


def test_to_label_studio_and_back_to_the_trainer(pool, tmp_path, capsys):
    """Commands alone: export, answers as Label Studio gives them, import-labels, finetune."""
    selection = str(tmp_path / "rows.json")
    out = str(tmp_path / "tasks.json")
    assert run(["export", selection, "--pool", str(pool), "--format", "label-studio", "--out", out, "-q"]) == 0
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    for number, one in enumerate(tasks):
        label = CLASSES[row_of(one) % 3]
        one |= {"id": number, "annotations": [{"result": [choice(label)], "was_cancelled": False}], "project": 1}
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    told = ["import-labels", str(tmp_path / "export.json"), "--format", "label-studio", "--asked", out, "--complete"]
    capsys.readouterr()
    assert run([*told, "--out", str(tmp_path / "labels.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_answered"] == 8
    training = ["--task", "classify", "--model", "test_resnet", "--weights", "random", "--image-size", "32"]
    training += ["--option", "epochs=1", "--option", "batch_size=4", "--labels", str(tmp_path / "labels.csv"), "--json"]
    assert run(["finetune", str(pool), "--selection", selection, "--out", str(tmp_path / "model"), *training]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 8


def boxes_of(pool, labels):
    """What finetune takes of a file of boxes, by id."""
    opened = open_pool(str(pool))
    found = read_labels(labels, opened, read_chosen("all", opened), None, None, None)
    return {
        name: [tuple(box.values()) for box in boxes]
        for name, boxes in zip(found.ids.to_pylist(), found.boxes.to_pylist(), strict=True)
    }


@pytest.mark.parametrize("form", ["label-studio", "cvat", "coco", "fiftyone"])
@pytest.mark.parametrize("copy", [False, True], ids=["in place", "copied"])
def test_boxes_there_and_back(pool, tmp_path, form, copy):
    """A box that is drawn on an image as a tool shows it is on the image as stored in the end, also where EXIF turns it."""
    out = tmp_path / ("out" if copy or form == "fiftyone" else {"cvat": "out.jsonl"}.get(form, "out.json"))
    told = {"selection": (str(tmp_path / "rows.json"),), "pool": str(pool), "format": form, "copy": copy}
    export(ExportOptions(out=str(out), **told))
    name = {"label-studio": "tasks.json", "cvat": "manifest.jsonl", "coco": "annotations.json", "fiftyone": "samples.json"}[
        form
    ]
    text = (out / name if out.is_dir() else out).read_text()
    answers, expected = tmp_path / "answers", (0, 6.0, 4.0, 15.0, 8.0, False)
    if form == "label-studio":
        tasks = json.loads(text)
        for one in tasks:
            x, y, width, height = (28, 6, 8, 15) if row_of(one) == 5 else (6, 4, 15, 8)
            wide, high = (40, 60) if row_of(one) == 5 else (32, 32)
            shares = (100 * x / wide, 100 * y / high, 100 * width / wide, 100 * height / high)
            one["annotations"] = [{"result": [rectangle("dog", *shares, size=(wide, high))]}]
        answers.write_text(json.dumps(tasks))
    elif form == "cvat":
        drawn = []
        for line in map(json.loads, text.splitlines()[2:]):
            x, y, width, height = (28, 6, 8, 15) if line["meta"]["pool_id"] == "05.png" else (6, 4, 15, 8)
            size = f'width="{line["width"]}" height="{line["height"]}"'
            box = f'<box label="dog" xtl="{x}" ytl="{y}" xbr="{x + width}" ybr="{y + height}"/>'
            drawn.append(f'<image id="0" name="{line["name"]}{line["extension"]}" {size}>{box}</image>')
        answers.write_text(f"<annotations>{''.join(drawn)}</annotations>")
    elif form == "coco":
        content = json.loads(text)
        box = {"category_id": 1, "bbox": [6, 4, 15, 8]}
        content["annotations"] = [{"id": at, "image_id": image["id"], **box} for at, image in enumerate(content["images"])]
        answers.write_text(json.dumps({**content, "categories": [{"id": 1, "name": "dog"}]}))
    else:
        content = json.loads(text)
        for sample in content["samples"]:
            wide, high = (sample["metadata"][side] for side in ("width", "height"))
            box = {"_cls": "Detection", "label": "dog", "bounding_box": [6 / wide, 4 / high, 15 / wide, 8 / high]}
            sample["ground_truth"] = {"_cls": "Detections", "detections": [box]}
        answers.write_text(json.dumps(content))
    for ending in ("json", "jsonl"):
        labels = str(tmp_path / f"labels.{ending}")
        import_labels(ImportLabelsOptions(answers=(str(answers),), format=form, asked=(str(out),), out=labels))
        found = boxes_of(pool, labels)
        assert set(found) == {f"{row:02d}.png" for row in range(8)}
        assert all(boxes == [pytest.approx(expected, abs=1e-4)] for boxes in found.values())


def test_what_is_no_export_is_refused(tmp_path, asked):
    (tmp_path / "rows.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"images": [{"file_name": "x"}]}')
    for name, words in (
        ("rows.json", "neither a selection nor an export"),
        ("other.json", "pool_id"),
        ("gone", "does not exist"),
    ):
        wrong(words, tmp_path, str(tmp_path / name), "csv", "id,label\na,b\n", ending=".csv")
