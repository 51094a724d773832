"""What a checkpoint is worth on a labelled pool: against hand-made truth, through the same predictions as `predict`."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from trained import CLASSES, make_checkpoint, setup_of

from cli.main import run
from engine.evaluate import evaluate
from engine.folders import read_manifest
from engine.places import Place
from engine.predict import predict
from engine.schema import InputError
from engine.store import FeatureStore, vectors_numpy
from engine.verbs import EvaluateOptions, PredictOptions

DETECTOR = {"task": "detect", "image_size": 64, "augment": "none"}
SIZES = [(40 + 3 * index, 60 + index) for index in range(4)]
"""Of the detection pool's images: each has its own."""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("classifier") / "c", best_seed=3)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("detector") / "c", setup_of("fcos:test_efficientnet", **DETECTOR))


def make_pool(folder, names=CLASSES, count=21):
    rng = np.random.default_rng(4)
    for index in range(count):
        place = folder / names[index % len(names)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (34, 36, 3), dtype=np.uint8)).save(place / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pool") / "images")


def measured(subject, test, **given):
    options = EvaluateOptions(subject=subject, test=str(test), **{"workers": 0, **given})
    return {entry["metric"]: entry for entry in evaluate(options)}


def predicted(classifier, pool, out, **given):
    """Return the class that the model gives each image, by id."""
    predict(PredictOptions(pool=str(pool), checkpoint=classifier, out=str(out), workers=0, **given))
    store = FeatureStore(str(out))
    found = vectors_numpy(store.read_column("probs")).argmax(axis=1)
    return dict(zip(store.read_column("id").to_pylist(), found.tolist(), strict=True))


# --- classification


def test_accuracies_are_those_of_the_predictions(classifier, pool, tmp_path):
    found = measured(classifier, pool)
    classes = predicted(classifier, pool, tmp_path / "out")
    right = {name: CLASSES[code] == name.split("/")[0] for name, code in classes.items()}
    assert list(found) == ["top1", "mean_class_top1", *(f"top1/{name}" for name in CLASSES)]
    assert found["top1"]["value"] == pytest.approx(100 * np.mean(list(right.values())))
    assert found["top1"]["note"] == "% of 21 images"
    for name in CLASSES:
        mine = [hit for image, hit in right.items() if image.startswith(name)]
        assert found[f"top1/{name}"]["value"] == pytest.approx(100 * np.mean(mine))
    best = measured(classifier, pool, best=True)
    again = predicted(classifier, pool, tmp_path / "best", best=True)
    assert best["top1"]["value"] == pytest.approx(100 * np.mean([CLASSES[c] == n.split("/")[0] for n, c in again.items()]))


def test_classes_go_by_their_names(classifier, pool, tmp_path):
    table = {"path": [], "label": []}
    for image in sorted(pool.rglob("*.png")):
        table["path"].append(str(image))
        table["label"].append(image.parent.name)
    names = ["owl", "cat", "dog"]
    codes = pa.array([names.index(name) for name in table["label"]])
    file = tmp_path / "pool.arrow"
    features = json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})
    arrow = pa.table({"path": table["path"], "label": codes}).replace_schema_metadata({"huggingface": features})
    with pa.ipc.new_file(str(file), arrow.schema) as writer:
        writer.write_table(arrow)
    mine, theirs = measured(classifier, pool), measured(classifier, file)
    assert [entry["value"] for entry in theirs.values()] == [entry["value"] for entry in mine.values()]


def test_a_class_that_the_pool_lacks_has_no_figure(classifier, tmp_path):
    found = measured(classifier, make_pool(tmp_path / "images", ("cat", "owl")))
    assert found["top1/dog"] == {"metric": "top1/dog", "value": None, "note": "no image of this class"}
    assert found["top1/owl"]["note"] == "% of 10 images"


def test_a_class_that_the_model_lacks_is_named(classifier, tmp_path):
    with pytest.raises(InputError, match=r"does not know: emu \(it knows cat, dog, owl\)"):
        measured(classifier, make_pool(tmp_path / "images", ("cat", "emu")), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_images_without_a_label_are_counted_and_left_out(classifier, pool, tmp_path):
    images = [str(path) for path in sorted(pool.rglob("*.png"))]
    lines = [f"{path},{'' if index % 3 else 1}" for index, path in enumerate(images)]
    lines[0] = f"{tmp_path}/gone.png,1"
    (tmp_path / "pool.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    found = measured(classifier, tmp_path / "pool.csv", max_rejected="2")
    assert found["top1"]["note"] == "% of 6 images; left out: 14 without a label, 1 that can't be read"
    (tmp_path / "none.csv").write_text("path,label\n" + "\n".join(f"{path}," for path in images) + "\n")
    with pytest.raises(InputError, match="has a label: there is nothing to measure against"):
        measured(classifier, tmp_path / "none.csv")


def test_a_label_that_the_head_does_not_know(classifier, pool, tmp_path):
    lines = [f"{path},7" for path in sorted(pool.rglob("*.png"))]
    (tmp_path / "pool.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    with pytest.raises(InputError, match="it has label 7, and the head knows classes 0 to 2"):
        measured(classifier, tmp_path / "pool.csv")


def test_labels_apart_from_the_pool(classifier, pool, tmp_path):
    classes = predicted(classifier, pool, tmp_path / "out")
    names = sorted(classes)
    truth = {name: CLASSES[classes[name]] for name in names[:6]}  # as predicted: all right
    truth[names[6]] = CLASSES[(classes[names[6]] + 1) % 3]
    lines = [f"{name},{label}" for name, label in truth.items()]
    (tmp_path / "labels.csv").write_text("id,label\n" + "\n".join([*lines, "nowhere.png,cat"]) + "\n")
    found = measured(classifier, pool, labels=str(tmp_path / "labels.csv"))
    assert found["top1"]["value"] == pytest.approx(100 * 6 / 7)
    assert found["top1"]["note"] == ("% of 7 images; left out: 14 without a label, 1 of the labels, whose images are not there")


def test_metrics_are_published_and_predictions_kept(classifier, pool, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    found = measured(classifier, pool, out=out)
    manifest = read_manifest(Place(out))
    assert manifest["kind"] == "metrics"
    assert manifest["metrics"] == list(found.values())
    assert FeatureStore(f"{out}/predictions").column == "probs"
    (tmp_path / "out" / "manifest.json").unlink()  # killed before it was published: predictions are not made again
    parts = {path: path.stat().st_ino for path in (tmp_path / "out" / "predictions").rglob("*.arrow")}
    assert measured(classifier, pool, out=out) == found
    assert {path: path.stat().st_ino for path in (tmp_path / "out" / "predictions").rglob("*.arrow")} == parts
    monkeypatch.setattr("engine.evaluate_model.predict", None)  # and now nothing is
    assert measured(classifier, pool, out=out) == found
    with pytest.raises(InputError, match="is published with other inputs"):
        measured(classifier, pool, out=out, best=True)
    shutil.copytree(classifier, tmp_path / "copy")
    assert measured(str(tmp_path / "copy"), pool, out=out) == found


def test_actors_give_the_same_figures(classifier, pool, ray_session):
    assert measured(classifier, pool, workers=2) == measured(classifier, pool)


# --- detection


def make_coco(folder, boxes, categories):
    """Write four images and their boxes: (image, class, x, y, width, height)."""
    folder.mkdir()
    for index, size in enumerate(SIZES):
        Image.fromarray(np.full((*size[::-1], 3), 60 * index, np.uint8)).save(folder / f"{index}.png")
    annotations = [
        {
            "id": n + 1,
            "image_id": at,
            "category_id": categories.index(name) + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for n, (at, name, *box) in enumerate(boxes)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(SIZES)]
    named = [{"id": n + 1, "name": name} for n, name in enumerate(categories)]
    (folder / "truth.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": named}))
    return folder / "truth.json"


TRUTH = [(0, "cat", 2, 3, 20, 30), (0, "owl", 10, 5, 12, 9), (2, "dog", 1, 1, 35, 40)]


@pytest.fixture
def knowing(monkeypatch):
    """A detector that finds all boxes but the dog, in the classes' own order."""

    def found(self, model, pixels, sizes):
        names = self.setup.class_names
        answers = []
        for size in sizes.tolist():
            mine = [(x, y, w, h, 0.9, names.index(name)) for at, name, x, y, w, h in TRUTH if list(SIZES[at]) == size]
            answers.append(np.array([box for box in mine if names[box[5]] != "dog"], np.float32).reshape(-1, 6))
        return answers

    monkeypatch.setattr("engine.tasks.detect.Detect.predict", found)


@pytest.mark.parametrize("categories", [["cat", "dog", "owl"], ["owl", "dog", "cat"]], ids=["same", "reordered"])
def test_box_ap_against_truth_by_hand(detector, knowing, tmp_path, categories):
    found = measured(detector, make_coco(tmp_path / "coco", TRUTH, categories))
    values = {name: entry["value"] for name, entry in found.items()}
    assert next(iter(found)) == "AP"
    assert values["AP/cat"] == values["AP/owl"] == pytest.approx(1.0)
    assert values["AP/dog"] == 0.0
    assert values["AP"] == pytest.approx(values["AP/cat"] * 2 / 3)


def test_boxes_apart_from_the_pool(detector, knowing, tmp_path):
    file = make_coco(tmp_path / "coco", TRUTH[:2], ["owl", "dog", "cat"])
    images = tmp_path / "images"
    images.mkdir()
    for path in (tmp_path / "coco").glob("*.png"):
        shutil.copy(path, images)
    found = measured(detector, images, labels=str(file))
    assert found["AP"]["value"] == found["AP/cat"]["value"] > 0
    with pytest.raises(InputError, match="has no boxes: a detector is measured on COCO"):
        measured(detector, images)


def test_a_detector_without_a_stub(detector, tmp_path):
    found = measured(detector, make_coco(tmp_path / "coco", TRUTH, list(CLASSES)), batch_size=2)
    assert 0 <= found["AP"]["value"] < 0.5


# --- what does not go together, and the command


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"test": None}, "is a checkpoint: give --test POOL"),
        ({"selection": "s", "neighbors": (1,)}, "--selection, --neighbors: for features"),
        ({"precision": "tf32"}, "tf32 is for features"),
        ({"address": "auto"}, "--address needs --out"),
        ({"labels": "nowhere.csv"}, "nowhere.csv' does not exist"),
    ],
)
def test_options_of_the_other_kind_are_refused(classifier, pool, given, words):
    with pytest.raises(InputError, match=words):
        evaluate(EvaluateOptions(**{"subject": classifier, "test": str(pool), "workers": 0, **given}))


def test_options_of_a_checkpoint_are_refused_for_features(feature_store):
    subject = feature_store.place.uri
    for given, words in (
        ({"selection": "s", "best": True, "label_column": "x"}, "--label-column, --best: for checkpoints"),
        ({}, "holds features: give --selection DIR"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(EvaluateOptions(subject=subject, **given))


def test_the_command(classifier, pool, capsys):
    assert run(["evaluate", classifier, "--test", str(pool), "--workers", "0", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["command"], facts["checkpoint"], facts["metrics"][0]["metric"]) == ("evaluate", classifier, "top1")
    assert run(["evaluate", classifier, "--test", str(pool), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert out.index("top1 ") < out.index("mean_class_top1") < out.index("top1/cat")
    assert run(["evaluate", classifier]) == 2
    assert "give --test POOL" in capsys.readouterr().err
