"""Predictions of a pool: probabilities and boxes as feature stores, and a checkpoint's backbone that embeds."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from trained import CLASSES, make_checkpoint, setup_of

from cli.main import run
from engine.checkpoints import Checkpoint
from engine.embed import embed, embed_all
from engine.encoders import build_encoders
from engine.evaluate import evaluate
from engine.predict import predict
from engine.schema import InputError
from engine.select import select
from engine.store import DETECTION, FeatureStore, detections_array, detections_numpy
from engine.verbs import CompareOptions, DedupOptions, EmbedOptions, EvaluateOptions, PredictOptions, SelectOptions

DETECTOR = {"task": "detect", "image_size": 64, "augment": "none", "score_threshold": 0.0, "max_boxes": 7}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """70 images of three classes and several sizes: two parts; one of them is no image."""
    folder = tmp_path_factory.mktemp("pool") / "images"
    rng = np.random.default_rng(0)
    for index in range(70):
        place = folder / CLASSES[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        size = (30 + index % 7, 40 - index % 5)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(place / f"{index:02d}.png")
    (folder / "cat" / "03.png").write_bytes(b"words")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("classifier") / "c", setup_of(mean=(0.4,), std=(0.3,)), best_seed=5)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("detector") / "c", setup_of("fcos:test_efficientnet", **DETECTOR))


def run_predict(pool, checkpoint, out, **given):
    options = {"workers": 0, "max_rejected": "1", **given}
    return predict(PredictOptions(pool=str(pool), checkpoint=checkpoint, out=str(out), **options))


def run_embed(pool, out, **given):
    return embed(EmbedOptions(pool=str(pool), out=str(out), **{"workers": 0, "max_rejected": "1", **given}))


def table_of(out):
    store = FeatureStore(str(out))
    return pa.concat_tables([store.read_part(part["name"]) for part in store.manifest["parts"]])


def image_of(pool, name):
    return Image.open(pool / name).convert("RGB")


# --- probabilities


def test_probabilities_are_those_of_a_bare_loop(pool, classifier, tmp_path):
    manifest = run_predict(pool, classifier, tmp_path / "out")
    assert (manifest["column"], manifest["dim"], manifest["num_vectors"], manifest["num_rejected"]) == ("probs", 3, 69, 1)
    told = manifest["encoder"]
    assert told["class_names"] == list(CLASSES)
    assert (told["name"], told["model"], told["task"], told["best"]) == ("probs", "test_resnet", "classify", False)
    assert told["digest"] == Checkpoint(classifier).digest()
    task, model = Checkpoint(classifier).load()
    table = table_of(tmp_path / "out")
    found = np.array(table["probs"].to_pylist())
    with torch.inference_mode():
        for name, row in zip(table["id"].to_pylist(), found, strict=True):
            pixels = torch.from_numpy(task.input.prepare(image_of(pool, name))).float() / 255
            np.testing.assert_allclose(row, model((pixels[None] - 0.4) / 0.3).softmax(1)[0], atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    assert table["label"].to_pylist() == [CLASSES.index(name.split("/")[0]) for name in table["id"].to_pylist()]


def test_any_number_of_actors_gives_the_same_bytes(pool, classifier, detector, tmp_path, ray_session):
    for name, checkpoint in (("probs", classifier), ("boxes", detector)):
        here = run_predict(pool, checkpoint, tmp_path / name / "here")
        there = run_predict(pool, checkpoint, tmp_path / name / "there", workers=2)
        assert len(here["parts"]) == 2
        assert here["digest"] == there["digest"]
        assert here["parts"] == there["parts"]


def test_predict_is_embed_by_another_name(pool, classifier, tmp_path):
    manifest = run_predict(pool, classifier, tmp_path / "out", dtype="float16")
    again = run_embed(pool, tmp_path / "out", encoder="probs", checkpoint=classifier, dtype="float16")
    assert again == manifest  # done before


def test_the_identity_is_the_weights_and_not_their_place(pool, classifier, tmp_path):
    manifest = run_predict(pool, classifier, tmp_path / "out")
    shutil.copytree(classifier, tmp_path / "copy")
    assert run_predict(pool, str(tmp_path / "copy"), tmp_path / "out") == manifest
    with pytest.raises(InputError, match=r"is published with other inputs .*checkpoint"):
        run_predict(pool, classifier, tmp_path / "out", best=True)
    assert run_predict(pool, classifier, tmp_path / "best", best=True)["digest"] != manifest["digest"]


def test_probabilities_are_vectors_to_select_from(pool, classifier, tmp_path):
    run_predict(pool, classifier, tmp_path / "probs")
    given = {"features": str(tmp_path / "probs"), "out": str(tmp_path / "picks"), "budget": "6", "workers": 0}
    (manifest,) = select(SelectOptions(strategy="kmeans", **given))
    assert manifest["num_picks"] == 6


# --- a checkpoint's backbone


def test_embedding_with_a_checkpoint_is_its_backbone_and_preprocessing(pool, classifier, tmp_path):
    options = {"encoder": "embedding,patterns,probs", "checkpoint": classifier, "workers": 0, "max_rejected": "1"}
    manifests = embed_all(EmbedOptions(pool=str(pool), out=str(tmp_path / "out"), **options))
    assert [manifest["column"] for manifest in manifests] == ["embedding", "patterns", "probs"]
    assert manifests[0]["encoder"]["input_size"] == [3, 32, 32]
    assert manifests[0]["encoder"]["mean"] == [0.4, 0.4, 0.4]
    assert "weights" not in manifests[0]["encoder"]
    _, model = Checkpoint(classifier).load()
    with torch.inference_mode():
        features = torch.tensor(table_of(tmp_path / "out" / "embedding")["embedding"].to_pylist())
        expected = model.head(features).softmax(dim=1).numpy()
    np.testing.assert_allclose(np.array(table_of(tmp_path / "out" / "probs")["probs"].to_pylist()), expected, atol=1e-5)
    alone = run_predict(pool, classifier, tmp_path / "alone")
    assert alone["digest"] == manifests[2]["digest"]


def test_one_model_for_all_encoders(classifier):
    made = build_encoders(EmbedOptions(pool="", out="", encoder="embedding,patterns,probs", checkpoint=classifier), "cpu")
    assert made["embedding"].network is made["patterns"].network
    assert made["probs"].predictor.model.backbone is made["embedding"].network.model
    assert made["probs"].input == made["embedding"].input


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"encoder": "probs"}, "--encoder probs needs --checkpoint"),
        ({"encoder": "pixels", "best": True}, "--best is for --checkpoint"),
        ({"checkpoint": "c", "backbone": "resnet18"}, "--backbone beside --checkpoint"),
        ({"checkpoint": "c", "mean": (0.5,), "weights": "random"}, "--weights, --mean beside --checkpoint"),
        ({"checkpoint": "c", "encoder": "detections"}, "holds a model for classify, which gives probs: --encoder probs"),
        ({"checkpoint": "d", "encoder": "probs"}, "holds a model for detect, which gives detections: --encoder detections"),
        ({"checkpoint": "d"}, "holds a model for detect: --encoder embedding takes the backbone of a classifier"),
        ({"checkpoint": "d", "encoder": "detections", "draft": True}, "--draft is not for --encoder detections"),
        ({"checkpoint": "d", "encoder": "detections", "dtype": "float16"}, "--dtype is not for --encoder detections"),
        ({"checkpoint": "c", "pooling": "cls"}, "has no class token"),
    ],
)
def test_what_does_not_go_together(pool, classifier, detector, tmp_path, given, words):
    if "checkpoint" in given:
        given = {**given, "checkpoint": {"c": classifier, "d": detector}[given["checkpoint"]]}
    with pytest.raises(InputError, match=words):
        run_embed(pool, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


# --- boxes


def test_boxes_survive_being_stored():
    rng = np.random.default_rng(0)
    given = [np.hstack([rng.random((m, 5)), rng.integers(0, 9, (m, 1))]).astype(np.float32) for m in (2, 0, 3, 0)]
    column = detections_array(np.concatenate(given), np.array([2, 0, 3, 0]))
    assert column.type == pa.list_(DETECTION)
    again = detections_numpy(pa.chunked_array([column]))
    assert [boxes.tolist() for boxes in again] == [boxes.tolist() for boxes in given]
    assert column[0].as_py()[1] == {
        "label": int(given[0][1, 5]),
        **{name: float(value) for name, value in zip(("x", "y", "width", "height", "score"), given[0][1], strict=False)},
    }
    assert detections_numpy(pa.chunked_array([detections_array(np.empty((0, 6), np.float32), np.zeros(0, int))])) == []


def test_boxes_are_those_of_the_task_in_px_as_stored(pool, detector, tmp_path):
    manifest = run_predict(pool, detector, tmp_path / "out", batch_size=8)
    assert (manifest["column"], manifest["num_vectors"], manifest["num_rejected"]) == ("detections", 69, 1)
    table = table_of(tmp_path / "out")
    assert manifest["num_detections"] == sum(len(boxes) for boxes in table["detections"].to_pylist()) > 0
    task, model = Checkpoint(detector).load()
    for name, found in zip(table["id"].to_pylist()[:9], detections_numpy(table["detections"])[:9], strict=True):
        image = image_of(pool, name)
        (expected,) = task.predict(model, task.input.prepare(image)[None], np.array([image.size]))
        np.testing.assert_allclose(found, expected, atol=1e-3)
    store = FeatureStore(str(tmp_path / "out"))
    assert store.columns[:5] == ["row", "id", "label", "width", "height"]


def test_images_without_boxes_have_empty_lists(pool, detector, tmp_path, monkeypatch):
    def none(self, model, pixels, sizes):
        assert sizes.tolist() == [[40 - i % 5, 30 + i % 7] for i in rows[: len(sizes)]]
        del rows[: len(sizes)]
        return [np.full((int(width) % 2, 6), 1, np.float32) for width in sizes[:, 0]]

    order = sorted((f"{CLASSES[i % 3]}/{i:02d}.png", i) for i in range(70))
    rows = [i for _, i in order if i != 3]
    monkeypatch.setattr("engine.tasks.detect.Detect.predict", none)
    manifest = run_predict(pool, detector, tmp_path / "out")
    table = table_of(tmp_path / "out")
    counts = [len(boxes) for boxes in table["detections"].to_pylist()]
    assert counts == [width % 2 for width in table["width"].to_pylist()]
    assert manifest["num_detections"] == sum(counts)


def test_boxes_are_no_vectors(pool, detector, classifier, tmp_path):
    from engine.compare import compare
    from engine.dedup import dedup

    run_predict(pool, detector, tmp_path / "boxes")
    given = {"features": str(tmp_path / "boxes"), "out": str(tmp_path / "out")}
    for refuse in (
        lambda: select(SelectOptions(strategy="kmeans", budget="5", **given)),
        lambda: dedup(DedupOptions(**given)),
        lambda: compare(CompareOptions(strategies=("random",), budget="5", metrics=("coverage",), **given)),
        lambda: evaluate(EvaluateOptions(subject=given["features"], selection=str(tmp_path), metrics=("coverage",))),
    ):
        with pytest.raises(InputError, match="holds the boxes that a detector found, not vectors"):
            refuse()


# --- the command


def test_the_command(pool, classifier, detector, tmp_path, capsys):
    rest = ["--workers", "0", "--max-rejected", "1"]
    assert run(["predict", str(pool), "--checkpoint", classifier, "--out", str(tmp_path / "p"), *rest, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["command"], facts["num_vectors"], facts["dim"], facts["already_done"]) == ("predict", 69, 3, False)
    assert run(["predict", str(pool), "--checkpoint", detector, "--out", str(tmp_path / "d"), *rest]) == 0
    assert "boxes in 69 images, 1 images rejected" in " ".join(capsys.readouterr().out.split())
    assert run(["info", str(tmp_path / "d"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_detections"] > 0
    assert run(["predict", str(pool), "--checkpoint", str(tmp_path / "p"), "--out", str(tmp_path / "x")]) == 2
    assert "is a features folder, not a checkpoint" in capsys.readouterr().err
