"""Detection: targets, augmentation, the canvas, every head, weights, and what box AP says."""

import dataclasses
import io
import json
import pickle
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from engine.images import Record
from engine.schema import InputError
from engine.tasks import Setup, build_task
from engine.tasks.bodies import stages_of
from engine.tasks.canvas import CanvasInput
from engine.tasks.coco import FIGURES, box_ap
from engine.tasks.detectors import KNOWN
from engine.tasks.necks import STRIDES
from engine.verbs import DetectOptions

TRAINING = {field.name for field in dataclasses.fields(DetectOptions)}
NAMES = ("cell", "platelet", "dust")


def setup_of(model="fcos:test_efficientnet", **given):
    """Return a setup; training options and the setup's own fields by name."""
    training = DetectOptions(**{"augment": "none", **{name: given.pop(name) for name in [*given] if name in TRAINING}})
    return Setup("detect", model, NAMES, training, **{"weights": "random", "image_size": 96, **given})


def record_of(width=120, height=90, boxes=(), labels=(), crowd=None, seed=0):
    """Return a record of a noisy PNG; boxes are x, y, width, height."""
    file = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(file, "PNG")
    return Record(
        row=seed,
        id=f"image-{seed}",
        data=file.getvalue(),
        label=-1,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        box_labels=np.array(labels, np.int64),
        crowd=np.zeros(len(labels), bool) if crowd is None else np.array(crowd),
    )


def prepared(task, records):
    images = [Image.open(io.BytesIO(record.data)) for record in records]
    return np.stack([task.input.prepare(image) for image in images]), np.array([image.size for image in images])


# -- the canvas


@pytest.mark.parametrize(
    ("size", "shape"),
    [((200, 150), (96, 128)), ((150, 200), (128, 96)), ((400, 100), (40, 160)), ((7, 7), (96, 96)), ((3000, 1), (1, 160))],
)
def test_the_rule_of_sizes(size, shape):
    assert CanvasInput(96, 160, False, "bilinear").shape(*size) == shape
    assert CanvasInput(96, 96, True, "bilinear").shape(*size) == (96, 96)


@pytest.mark.parametrize("size", [(200, 150), (150, 200), (50, 301), (160, 96)])
def test_what_lies_in_the_canvas_is_the_resized_image(size):
    given = pickle.loads(pickle.dumps(CanvasInput(96, 160, False, "bilinear")))
    assert given == CanvasInput(96, 160, False, "bilinear")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    canvas = given.prepare(image)
    assert canvas.shape == (3, 96, 160)
    assert canvas.nbytes == given.num_bytes
    cut = given.cut(canvas, *size)
    height, width = given.shape(*size)
    expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(cut, expected)
    assert int(canvas.astype(np.int64).sum()) == int(expected.astype(np.int64).sum())  # black elsewhere


# -- targets and augmentation


@pytest.mark.parametrize(("head", "offset"), [("fcos", 0), ("retinanet", 0), ("fasterrcnn", 1), ("ssd", 1), ("ssdlite", 1)])
def test_targets_by_hand(head, offset):
    task = build_task(setup_of(f"{head}:test_efficientnet"))
    record = record_of(200, 100, [[20, 10, 40, 30], [190, 90, 50, 50], [0, 0, 9, 9]], [2, 0, 1], crowd=[False, False, True])
    images, targets = task.collate([task.example(record)])
    scale = np.array([0.48, 0.96] if head.startswith("ssd") else [0.8, 0.8])  # 200 x 100 -> 96 x 96, or 160 x 80
    assert images[0].shape == ((3, 96, 96) if head.startswith("ssd") else (3, 80, 160))
    assert images[0].dtype == torch.uint8
    expected = np.array([[20, 10, 60, 40], [190, 90, 200, 100]]) * np.tile(scale, 2)
    np.testing.assert_allclose(targets[0]["boxes"].numpy(), expected, rtol=1e-6)
    assert targets[0]["labels"].tolist() == [2 + offset, offset]


class Oracle(torch.nn.Linear):
    """A model that finds the targets of the images it knows, the last one best."""

    def __init__(self, images, targets):
        super().__init__(1, 1)
        self.known = [*zip(images, targets, strict=True)]

    def forward(self, images):
        shown = [(image * 255).round().byte() for image in images]
        found = [next(target for image, target in self.known if image.equal(one)) for one in shown]
        return [{**target, "scores": torch.arange(1, len(target["labels"]) + 1) / 4} for target in found]


@pytest.mark.parametrize("model", ["fcos:test_efficientnet", "ssdlite:test_efficientnet"])
def test_boxes_come_back_as_they_were_stored(model):
    task = build_task(setup_of(model))
    boxes = [[11, 7, 35, 40], [2, 1, 50, 20]]
    records = [record_of(*size, boxes, [1, 0], seed=seed) for seed, size in enumerate([(97, 61), (61, 97), (301, 70)])]
    oracle = Oracle(*task.collate([task.example(record) for record in records]))
    for found, record in zip(task.predict(oracle, *prepared(task, records)), records, strict=True):
        assert found.dtype == np.float32
        assert found[:, 4].tolist() == [0.5, 0.25]
        np.testing.assert_allclose(found[::-1, :4], record.boxes, atol=1e-3)
        assert found[::-1, 5].tolist() == record.box_labels.tolist()


def test_flip_mirrors_boxes():
    record = record_of(100, 80, [[10, 20, 30, 40]], [1])
    plain = build_task(setup_of(image_size=80)).example(record)
    task = build_task(setup_of(image_size=80, augment="flip"))
    seen = {}
    for seed in range(8):
        torch.manual_seed(seed)
        example = task.example(record)
        flipped = not example["image"].equal(plain["image"])
        seen[flipped] = example
        if flipped:
            assert example["image"].equal(plain["image"].flip(2))
    assert seen[False]["boxes"].tolist() == [[10, 20, 40, 60]]
    assert seen[True]["boxes"].tolist() == [[60, 20, 90, 60]]


def test_ssd_augmentation_is_a_function_of_the_seed_and_leaves_no_empty_box():
    task = build_task(setup_of("ssd:test_efficientnet", augment="ssd"))
    record = record_of(120, 90, [[5, 5, 50, 40], [80, 50, 30, 30], [118, 88, 2, 2]], [0, 1, 2])
    counts = set()
    for seed in range(30):
        torch.manual_seed(seed)
        first = task.example(record)
        torch.manual_seed(seed)
        again = task.example(record)
        assert all(first[name].equal(again[name]) for name in first)
        boxes = first["boxes"]
        assert first["image"].shape == (3, 96, 96)
        assert bool(((boxes >= 0) & (boxes <= 96)).all())
        assert bool((boxes[:, 2:] > boxes[:, :2]).all())
        assert len(boxes) == len(first["labels"])
        counts.add((len(boxes), round(float(boxes[0, 0]), 3)))
    assert len(counts) > 20
    assert {count for count, _ in counts} >= {1, 2, 3}


@pytest.mark.parametrize("augment", ["none", "flip", "ssd"])
def test_images_without_boxes_and_slivers_are_examples(augment):
    task = build_task(setup_of(augment=augment))
    for record in (record_of(120, 90), record_of(120, 90, [[1, 1, 5, 5]], [0], crowd=[True]), record_of(2, 90)):
        for seed in range(6):
            torch.manual_seed(seed)
            example = task.example(record)
            assert example["boxes"].shape == (0, 4)
            assert example["labels"].shape == (0,)


def test_what_cannot_be_used():
    task = build_task(setup_of())
    assert task.check(record_of(9, 9)) is None
    assert task.check(record_of(9, 9, [[1, 1, 2, 2]], [2])) is None
    assert "class 3" in task.check(record_of(9, 9, [[1, 1, 2, 2]], [3]))


# -- models


@pytest.mark.parametrize("head", STRIDES)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_trains_a_step(head, frozen):
    task = build_task(setup_of(f"{head}:test_efficientnet", freeze_norm=frozen))
    torch.manual_seed(0)
    model = task.build(True)
    task.train_mode(model)
    rates = task.rates(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    records = [record_of(120, 90, [[5, 5, 60, 60], [50, 20, 30, 50]], [0, 2]), record_of(90, 120, seed=1)]
    batch = task.collate([task.example(record) for record in records])
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.shape == ()
    assert torch.isfinite(loss)
    missed = [name for name, parameter in model.named_parameters() if name in rates and parameter.grad is None]
    assert not missed  # or DDP would wait for them
    torch.optim.SGD([parameter for name, parameter in model.named_parameters() if name in rates], lr=1e-3).step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    norms = {name for name in moved if name.startswith("backbone.body.") and "bn" in name}
    assert bool(norms) != frozen
    model.eval()
    for found in task.predict(model, *prepared(task, records)):
        assert found.shape[1] == 6
        assert found.shape[0] <= 100


def test_one_image_alone_trains_ssdlite():
    task = build_task(setup_of("ssdlite:test_efficientnet"))
    torch.manual_seed(0)
    model = task.build(True)
    task.train_mode(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    loss = task.loss(model, task.collate([task.example(record_of(120, 90, [[5, 5, 60, 60]], [0]))]))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("head", STRIDES)
def test_bf16_gives_nearly_the_same_boxes_and_loss(head):
    task = build_task(setup_of(f"{head}:test_efficientnet", freeze_norm=True, score_threshold=0.0, max_boxes=5))
    torch.manual_seed(0)
    model = task.build(True)
    task.train_mode(model)
    record = record_of(120, 90, [[5, 5, 60, 60], [50, 20, 30, 50]], [0, 2])
    batch = task.collate([task.example(record)] * 2)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(float(task.loss(model, batch).detach()))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    seen = []
    anchors = model.rpn.anchor_generator if head == "fasterrcnn" else model.anchor_generator
    anchors.register_forward_hook(lambda _, __, made: seen.append(made[0].dtype))
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        task.predict(model, *prepared(task, [record]))
    assert seen == [torch.float32]


@pytest.mark.parametrize("model", ["fcos:test_efficientnet", "ssdlite:test_efficientnet", "fasterrcnn:test_efficientnet"])
def test_an_image_gives_the_same_alone_and_beside_others(model, monkeypatch):
    from torchvision.models.detection import transform

    def interpolated(*_):
        raise AssertionError("the model resized an image again")

    monkeypatch.setattr(transform, "_resize_image_and_masks", interpolated)
    task = build_task(setup_of(model, score_threshold=0.01))
    torch.manual_seed(0)
    net = task.build(True).eval()
    records = [record_of(*size, seed=seed) for seed, size in enumerate([(120, 90), (60, 130), (120, 90), (33, 30)])]
    pixels, sizes = prepared(task, records)
    together = task.predict(net, pixels, sizes)
    assert any(len(found) for found in together)
    for at, found in enumerate(together):
        alone = task.predict(net, pixels[at : at + 1], sizes[at : at + 1])[0]
        assert len(alone) == len(found)
        np.testing.assert_allclose(np.sort(alone[:, 4]), np.sort(found[:, 4]), atol=1e-5)
        np.testing.assert_allclose(alone[:3, :4], found[:3, :4], atol=1e-2)
        assert (found[:, :2] >= -1e-4).all()
        assert (found[:, :2] + found[:, 2:4] <= sizes[at] + 1e-3).all()


def test_options_reach_the_model():
    found = {}
    for name, options in {"plain": {}, "strict": {"score_threshold": 0.08}, "few": {"max_boxes": 3}}.items():
        task = build_task(setup_of(**options))
        torch.manual_seed(0)
        found[name] = task.predict(task.build(True).eval(), *prepared(task, [record_of()]))[0]
    assert len(found["few"]) == 3
    assert 0 < len(found["strict"]) < len(found["plain"])
    assert found["plain"][:, 4].min() < 0.08 < found["strict"][:, 4].min()
    model = build_task(setup_of("fasterrcnn:test_efficientnet", nms_threshold=0.3, mean=(0.5,), std=(0.25,))).build(True)
    assert model.roi_heads.nms_thresh == 0.3
    assert (model.transform.image_mean, model.transform.image_std) == ([0.5] * 3, [0.25] * 3)


def test_rates_of_the_parts_and_frozen_stages():
    task = build_task(setup_of(lr=0.1, backbone_lr=0.01, trainable_layers=2, freeze_norm=True))
    model = task.build(True)
    rates = task.rates(model)
    assert {name: rates[name] for name in rates if name.startswith(("head.", "backbone.fpn."))}.keys() == {
        name for name, _ in model.named_parameters() if not name.startswith("backbone.body.")
    }
    body = {name for name in rates if name.startswith("backbone.body.")}
    assert {name.split(".")[3] for name in body} == {"3", "4"}
    assert [*{rates[name] for name in body}] == [pytest.approx(0.1)]
    assert {rates[name] for name in rates.keys() - body} == {1.0}
    assert not any("bn" in name for name in body)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "vgg11", "resnet18"])
def test_stages_are_those_that_end_with_a_map(name):
    body = timm.create_model(name, features_only=True)
    found = stages_of(body, body.feature_info.module_name())
    assert [parameter for stage in found for parameter in stage] == [parameter for parameter, _ in body.named_parameters()]
    assert len(found) == len(body.feature_info.module_name())


# -- weights


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("wrapper", [None, "teacher", "state_dict"])
def test_a_file_gives_timms_own_maps(tmp_path, name, wrapper):
    torch.manual_seed(1)
    own = timm.create_model(name)
    state = own.state_dict()
    if wrapper:
        prefix = {"teacher": "backbone.", "state_dict": "module.encoder_q."}[wrapper]
        torch.save({wrapper: {prefix + key: value for key, value in state.items()}}, tmp_path / "weights.pth")
    else:
        save_file(state, tmp_path / "weights.safetensors")
    file = next(tmp_path.iterdir())
    torch.manual_seed(2)
    model = build_task(setup_of(f"fcos:{name}", weights=str(file))).build(True).eval()
    images = torch.rand(2, 3, 64, 96)
    expected = [own.eval().forward_intermediates(images, intermediates_only=True)[at] for at in (-3, -2, -1)]
    found = model.backbone.body(images)[-3:]
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_files_that_do_not_fit(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"does not fit the detector's network \(\d+ missing: blocks\.0"):
        build_task(setup_of(weights=str(tmp_path / "other.safetensors"))).build(True)
    state = timm.create_model("test_efficientnet").state_dict()
    state["blocks.9.0.conv.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "deeper.safetensors")
    with pytest.raises(InputError, match=r"1 unexpected: blocks\.9"):
        build_task(setup_of(weights=str(tmp_path / "deeper.safetensors"))).build(True)


def test_the_shared_weights_fit(shared):
    file = str(shared / "weights" / "mobilenetv2_100.safetensors")
    setup = setup_of("ssdlite:mobilenetv2_100", weights=file, model_option=("pad_type=same",), mean=(0.5,), std=(0.5,))
    body = build_task(setup).build(True).eval().backbone.body
    own = timm.create_model("mobilenetv2_100", pad_type="same", checkpoint_path=file).eval()
    images = torch.rand(1, 3, 96, 96) * 2 - 1
    torch.testing.assert_close(body(images)[-1], own.forward_intermediates(images, intermediates_only=True)[-1])


def test_torchvision_weights_of_a_whole_network(tmp_path):
    from torchvision.models import mobilenet_v3_large

    torch.manual_seed(1)
    own = mobilenet_v3_large().eval()
    torch.save(own.state_dict(), tmp_path / "own.pth")
    images = torch.rand(1, 3, 96, 96)
    for name in ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_fpn"):
        model = build_task(setup_of(name, weights=str(tmp_path / "own.pth"))).build(True).eval()
        found = model.backbone.features(images) if "ssdlite" in name else model.backbone.body(images)["1"]
        if name == "fasterrcnn_mobilenet_v3_large_fpn":
            torch.testing.assert_close(found, own.features(images))
        else:  # its batch norm has another epsilon
            assert found.shape == own.features(images).shape


@pytest.mark.parametrize("name", ["ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "ssdlite:mobilenetv2_100"])
def test_hub_weights_are_asked_for(monkeypatch, tmp_path, name):
    """There is no network here: what is tested is everything up to the call."""
    import huggingface_hub.constants

    asked = []

    def offline(url, *_, **how):
        asked.append((how["weights_only"], how["check_hash"]))
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    task = build_task(setup_of(name, weights="hub", image_size=None))
    with pytest.raises(InputError, match="cannot be fetched from the hub"):
        task.build(True)
    assert asked == ([(True, True)] if ":" not in name else [])
    task.build(False)


def test_a_checkpoint_folder_gives_the_whole_detector(tmp_path):
    task = build_task(setup_of())
    torch.manual_seed(1)
    model = task.build(True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    manifest = {"kind": "checkpoint", "inputs": {}, "options": {}, "model": task.setup.to_json()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    torch.manual_seed(2)
    again = build_task(setup_of(weights=str(tmp_path))).build(True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="with model 'fcos:test_efficientnet', not 'ssd:test_efficientnet'"):
        build_task(setup_of("ssd:test_efficientnet", weights=str(tmp_path))).build(True)
    named = dataclasses.replace(setup_of(weights=str(tmp_path)), class_names=("a", "b", "c"))
    with pytest.raises(InputError, match="with class_names"):
        build_task(named).build(True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "fcoss:resnet18"}, "unknown detector 'fcoss:resnet18'"),
        ({"model": "fcos"}, "one of: fcos_resnet50_fpn"),
        ({"model": "fcos:resnet1"}, "unknown backbone 'resnet1', did you mean"),
        ({"model": "fcos:vit_tiny_patch16_224"}, "gives maps of strides 16, 16, 16: fcos takes 8, 16, 32"),
        ({"model": "fasterrcnn:test_efficientnet", "trainable_layers": 6}, "this network has 5 stages"),
        ({"model": "ssd:test_efficientnet", "max_size": 200}, "squeezes images into a square"),
        ({"max_size": 64}, "at least image_size, 96"),
        ({"layer_decay": 0.7}, "layer_decay is 0.7"),
        ({"lr": 0.0, "backbone_lr": 0.1}, "lr is 0"),
        ({"crop_pct": 0.9}, "--crop-pct 0.9"),
        ({"std": (0.1, 0.2)}, "has 2 values"),
        ({"std": (0.1, 0.2, 0.0)}, "above 0"),
        ({"mean": (123.0,)}, "must lie in 0..1"),
        ({"model": "ssd300_vgg16", "model_option": ("pad_type=same",)}, "takes none"),
        ({"model": "ssd300_vgg16"}, "does not take images of 96 px"),
        ({"model_option": ("fpn_channels=48",)}, "multiple of 32"),
        ({"model_option": ("fpn_channels=64", "nonsense=1")}, "nonsense"),
        ({"weights": "missing.pth"}, "does not exist"),
    ],
)
def test_what_cannot_be_built(given, message):
    with pytest.raises(InputError, match=message):
        build_task(setup_of(**given)).build(True)


def test_the_models_own_defaults():
    sizes = {name: build_task(setup_of(name, image_size=None)).input for name in [*KNOWN, "fcos:resnet18", "ssdlite:resnet18"]}
    assert {name: (given.short_px, given.long_px) for name, given in sizes.items()} == {
        **dict.fromkeys([name for name in KNOWN if "fpn" in name], (800, 1333)),
        "ssd300_vgg16": (300, 300),
        "ssdlite320_mobilenet_v3_large": (320, 320),
        "fcos:resnet18": (320, 533),
        "ssdlite:resnet18": (320, 320),
    }


# -- metrics


def truth(*images):
    return [record_of(300, 300, boxes, labels, seed=seed) for seed, (boxes, labels) in enumerate(images)]


def as_predictions(records, score=0.5):
    return [np.column_stack([r.boxes, np.full(len(r.boxes), score), r.box_labels]).astype(np.float32) for r in records]


def test_the_truth_as_prediction_is_perfect():
    records = truth(([[10, 10, 20, 20], [50, 50, 60, 60]], [0, 1]), ([], []), ([[0, 0, 200, 200]], [1]))
    results = {name: (value, note) for name, value, note in box_ap(as_predictions(records), records, NAMES)}
    assert list(results) == [*FIGURES, "AP/cell", "AP/platelet", "AP/dust"]
    for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100", "AP/cell", "AP/platelet"):
        assert results[name] == (pytest.approx(1.0), "")
    assert results["AP/dust"] == (None, "no such boxes in the truth")


def test_average_precision_by_hand():
    """Best first: a hit of IoU 1, a miss, a hit of IoU 0.72.

    Up to IoU 0.7 precision is 1 at 51 of the 101 recalls, 2/3 at the others; above, 1 at 51 and 0 at the others.
    """
    records = truth(([[0, 0, 40, 40], [100, 100, 100, 100]], [0, 0]))
    boxes = [[0, 0, 40, 40, 0.9, 0], [200, 0, 40, 40, 0.8, 0], [100, 100, 72, 100, 0.7, 0]]
    results = {name: value for name, value, _ in box_ap([np.array(boxes, np.float32)], records, NAMES[:1])}
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert results["AP50"] == pytest.approx(low)
    assert results["AP75"] == pytest.approx(high)
    assert results["AP"] == pytest.approx((low + high) / 2)
    assert results["AR_1"] == pytest.approx(0.5)
    assert results["AR_100"] == pytest.approx(0.75)
    assert results["AP/cell"] == results["AP"]


def test_boxes_in_a_crowd_count_neither_way():
    record = record_of(300, 300, [[0, 0, 40, 40], [100, 100, 150, 150]], [0, 0], crowd=[False, True])
    boxes = [[120, 120, 30, 30, 0.9, 0], [130, 160, 30, 30, 0.8, 0], [0, 0, 40, 40, 0.7, 0]]
    assert box_ap([np.array(boxes, np.float32)], [record], NAMES[:1])[0] == ("AP", pytest.approx(1.0), "")
    plain = dataclasses.replace(record, crowd=np.zeros(2, bool))
    assert box_ap([np.array(boxes, np.float32)], [plain], NAMES[:1])[0][1] < 0.2


def test_no_predictions_are_worth_nothing_and_no_truth_is_no_figure():
    records = truth(([[10, 10, 20, 20]], [0]), ([], []))
    none = [np.zeros((0, 6), np.float32)] * 2
    results = {name: value for name, value, _ in box_ap(none, records, NAMES)}
    assert (results["AP"], results["AR_100"], results["AP/cell"]) == (0.0, 0.0, 0.0)
    assert (results["AP_large"], results["AP/dust"]) == (None, None)
    assert all(value is None for _, value, _ in box_ap(as_predictions(records), truth(([], []), ([], [])), NAMES))


# -- real images


def blood_cells(shared, num_images):
    """Return the first BCCD training images as records."""
    content = json.loads((shared / "bccd" / "train.json").read_text())
    boxes = {image["id"]: [] for image in content["images"][:num_images]}
    for box in content["annotations"]:
        boxes.get(box["image_id"], []).append(box)
    return [
        Record(
            row=row,
            id=image["file_name"],
            data=(shared / "bccd" / "images" / image["file_name"]).read_bytes(),
            label=-1,
            boxes=np.array([box["bbox"] for box in boxes[image["id"]]], np.float32),
            box_labels=np.array([box["category_id"] - 1 for box in boxes[image["id"]]], np.int64),
            crowd=np.zeros(len(boxes[image["id"]]), bool),
        )
        for row, image in enumerate(content["images"][:num_images])
    ]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ssdlite", "fcos"])
def test_a_detector_learns_four_images(shared, head):
    setup = setup_of(
        f"{head}:mobilenetv2_100",
        weights=str(shared / "weights" / "mobilenetv2_100.safetensors"),
        model_option=("pad_type=same", *(["fpn_channels=64"] if head == "fcos" else [])),
        mean=(0.5,),
        std=(0.5,),
        image_size=320 if head == "ssdlite" else 240,
        freeze_norm=True,
    )
    task = build_task(setup)
    torch.manual_seed(0)
    model = task.build(True)
    task.train_mode(model)
    batch = task.collate([task.example(record) for record in blood_cells(shared, 4)])
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if name in task.rates(model)], lr=1e-3)
    losses = []
    for _ in range(30):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_torchvisions_detectors_train_a_step(name, tmp_path):
    """At full width; the image is small, so that it is quick."""
    task = build_task(setup_of(name, image_size=None if name.startswith("ssd") else 224))
    torch.manual_seed(0)
    model = task.build(True)
    task.train_mode(model)
    records = [record_of(320, 240, [[20, 20, 100, 100]], [1]), record_of(240, 320, seed=1)]
    loss = task.loss(model, task.collate([task.example(record) for record in records]))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for name, p in model.named_parameters() if name in task.rates(model))
    assert len(task.rates(model)) == len([*model.parameters()])  # from random weights all train


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_torchvisions_detectors_are_what_torchvision_builds(name, tmp_path):
    network = KNOWN[name].network
    torch.save(torchvision.models.get_model(network).state_dict(), tmp_path / "own.pth")
    task = build_task(setup_of(name, image_size=None, weights=str(tmp_path / "own.pth")))
    model = task.build(True)
    classes = len(NAMES) + (0 if name.startswith(("fcos", "retinanet")) else 1)
    with patch("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: torch.load(tmp_path / "own.pth")):
        theirs = torchvision.models.get_model(name, weights=None, weights_backbone="DEFAULT", num_classes=classes)
    shapes = [
        {key: value.shape for key, value in one.state_dict().items() if "num_batches" not in key} for one in (model, theirs)
    ]
    assert shapes[0] == shapes[1]
    trained = {key for key, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert task.rates(model).keys() == trained
    for key, value in theirs.state_dict().items():
        if key.startswith(("backbone.body", "backbone.features")):
            assert torch.equal(value, model.state_dict()[key])
