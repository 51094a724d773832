"""Classification: what each mode trains, transforms, mixtures, weights, and metrics by hand."""

import io
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from trained import make_checkpoint, setup_of

from engine.backbones import build_backbone
from engine.decode import BadImageError
from engine.images import Record
from engine.schema import InputError
from engine.tasks import build_task
from engine.tasks.accuracy import accuracy
from engine.tasks.augment import mix
from engine.verbs import ClassifyOptions, EmbedOptions

NONE = {"boxes": np.zeros((0, 4), np.float32), "box_labels": np.zeros(0, np.int64), "crowd": np.zeros(0, bool)}


def picture(width=40, height=36, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def record_of(label=1, image=None, row=0):
    file = io.BytesIO()
    (image or picture(seed=row)).save(file, "PNG")
    return Record(row, f"image-{row}", file.getvalue(), label, **NONE)


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def started(model="test_resnet", pretrained=False, **given):
    """Return a task and its model in training mode, built at seed 0."""
    task = build_task(setup_of(model, **given))
    torch.manual_seed(0)
    built = task.build(pretrained)
    task.train_mode(built)
    return task, built


def step(task, model):
    """Take one step of SGD as the trainer does, by the task's rates; return the names of what changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rates = task.rates(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in rates)
    seed_all(0)
    batch = task.collate([task.example(record_of(label=row % 3, row=row)) for row in range(4)])
    groups = [{"params": [p], "lr": 0.1 * rates[name]} for name, p in model.named_parameters() if name in rates]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    task.loss(model, batch).backward()
    optimizer.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# --- modes


def test_finetune_trains_all():
    task, model = started("test_efficientnet")
    changed = step(task, model)
    assert set(task.rates(model)) == set(dict(model.named_parameters()))
    assert set(dict(model.named_parameters())) <= changed
    assert any(name.endswith("running_mean") for name in changed)


def test_linear_trains_the_head_alone_and_leaves_running_statistics():
    task, model = started(mode="linear", drop_path=0.5)
    assert set(task.rates(model)) == step(task, model) == {"head.weight", "head.bias"}
    assert not any(module.training for module in model.backbone.modules())
    assert model.head.training


def test_scratch_reads_no_weights():
    task, model = started(mode="scratch", weights="nowhere.pth", pretrained=True)
    assert set(task.rates(model)) == set(dict(model.named_parameters()))


def test_frozen_norms_stay_as_they_are():
    task, model = started(freeze_norm=True)
    changed = step(task, model)
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert not [name for name in changed if name.rpartition(".")[0] in norms]
    assert set(task.rates(model)) == {n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in norms}
    assert model.training


def test_layer_norms_are_no_batch_norms():
    task, model = started("test_vit", freeze_norm=True)
    assert set(task.rates(model)) == set(dict(model.named_parameters()))


def test_rates_of_backbone_and_head():
    task, model = started(lr=0.01, backbone_lr=0.0001)
    rates = task.rates(model)
    assert {rate for name, rate in rates.items() if name.startswith("head.")} == {1.0}
    assert {round(rate, 9) for name, rate in rates.items() if name.startswith("backbone.")} == {0.01}


def test_layer_decay_by_hand():
    task, model = started("test_vit", layer_decay=0.5, lr=0.1, backbone_lr=0.02)
    depth = len(model.backbone.blocks)
    rates = task.rates(model)
    assert rates["head.weight"] == 1.0
    assert rates["backbone.norm.weight"] == pytest.approx(0.2 * 0.5)
    for block in range(depth):
        assert rates[f"backbone.blocks.{block}.mlp.fc1.weight"] == pytest.approx(0.2 * 0.5 ** (depth - block))
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(0.2 * 0.5 ** (depth + 1))
    assert rates["backbone.cls_token"] == rates["backbone.pos_embed"] == rates["backbone.patch_embed.proj.weight"]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_layer_decay_is_timms_own(name):
    from timm.optim import param_groups_layer_decay

    task, model = started(name, layer_decay=0.7)
    whole = timm.create_model(name, num_classes=3, **({"img_size": 32} if name == "test_vit" else {}))
    groups = param_groups_layer_decay(whole, layer_decay=0.7)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    wanted = {key: scales[id(p)] for key, p in whole.named_parameters()}
    rates = {key.removeprefix("backbone."): rate for key, rate in task.rates(model).items() if key.startswith("backbone.")}
    assert rates.keys() <= wanted.keys()
    assert rates == pytest.approx({key: wanted[key] for key in rates})


def test_the_small_stem():
    _, plain = started("resnet18", mode="scratch")
    _, model = started("resnet18", mode="scratch", small_stem=True)
    stem = model.backbone.conv1
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
    sides = [net.backbone.layer1(net.backbone.maxpool(net.backbone.conv1(torch.zeros(1, 3, 32, 32)))) for net in (plain, model)]
    assert [side.shape[-1] for side in sides] == [8, 32]


def test_normalized_features_before_the_head():
    _, model = started(normalize=True)
    model.eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        features = model.backbone(images)
        expected = model.head(features / features.norm(dim=1, keepdim=True))
        torch.testing.assert_close(model(images), expected)


def test_drop_path_reaches_the_model():
    _, model = started("test_vit", drop_path=0.2)
    assert max(getattr(module, "drop_prob", 0) or 0 for module in model.modules()) == pytest.approx(0.2)


def test_the_head_is_drawn_from_the_global_generator():
    task = build_task(setup_of())
    heads = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        heads.append(task.build(False).head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# --- transforms


@pytest.mark.parametrize(
    "given",
    [
        {"color_jitter": 0.4},
        {"rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.9},
        {"crop": "pad"},
        {"crop": "none", "rand_augment": "rand-m9-n3-mstd0.5", "erasing": 1.0},
    ],
    ids=["jitter", "rand", "pad", "none"],
)
def test_augmentation_is_a_function_of_the_global_seed(given):
    task = build_task(setup_of(**given))
    made = []
    for seed in (5, 5, 6):
        seed_all(seed)
        made.append([task.example(record_of(row=row)) for row in range(3)])
    assert all(label == 1 and image.shape == (3, 32, 32) and image.dtype == torch.float32 for image, label in made[0])
    first, again, other = (torch.stack([image for image, _ in images]) for images in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_augmentation_training_sees_what_evaluation_sees():
    task = build_task(setup_of(crop="none", flip=False, mean=(0.5,), std=(0.25,)))
    image, _ = task.example(record_of())
    pixels = task.input.prepare(picture())
    np.testing.assert_allclose(image.numpy(), (pixels / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)


def test_a_padded_crop_is_a_shift_of_the_image_by_four_px():
    task = build_task(setup_of(crop="pad", flip=False, mean=(0.0,), std=(1.0,), crop_pct=1.0))
    image = picture(32, 32)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0))).transpose(2, 0, 1)
    places = set()
    for seed in range(60):
        seed_all(seed)
        found = np.rint(task.example(record_of(image=image))[0].numpy() * 255).astype(np.uint8)
        at = [(y, x) for y in range(9) for x in range(9) if np.array_equal(found, padded[:, y : y + 32, x : x + 32])]
        assert len(at) == 1
        places.update(at)
    assert len(places) > 30


def test_a_resized_crop_of_all_of_the_image_is_the_image_resized():
    task = build_task(setup_of(crop_scale=(1.0, 1.0), flip=False, mean=(0.0,), std=(1.0,), interpolation="bilinear"))
    seed_all(0)
    found = task.example(record_of(image=picture(36, 36)))[0].numpy() * 255
    np.testing.assert_allclose(found, np.asarray(picture(36, 36).resize((32, 32), 2)).transpose(2, 0, 1), atol=1.01)


def test_half_of_the_images_are_flipped():
    task = build_task(setup_of(crop="none"))
    plain = build_task(setup_of(crop="none", flip=False)).example(record_of())[0]
    flipped = 0
    for seed in range(40):
        seed_all(seed)
        image, _ = task.example(record_of())
        assert torch.equal(image, plain) or torch.equal(image, plain.flip(2))
        flipped += torch.equal(image, plain.flip(2))
    assert 10 < flipped < 30


def test_an_image_that_cannot_be_decoded_says_so():
    with pytest.raises(BadImageError, match="not an image file"):
        build_task(setup_of()).example(Record(0, "a", b"words", 0, **NONE))


# --- mixtures and the loss


@pytest.mark.parametrize("count", [4, 5, 1])
def test_mixup_targets_are_what_the_pixels_are(count):
    training = ClassifyOptions(mixup=1.0, label_smoothing=0.1)
    values = torch.arange(1.0, count + 1)
    images = values.view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
    labels = torch.arange(count)
    seed_all(2)
    targets = mix(images, labels, training, 5)
    even, mixed = count // 2 * 2, images[:, 0, 0, 0]
    plain = torch.full((count, 5), 0.02) + 0.9 * torch.nn.functional.one_hot(labels, 5)
    for i in range(count):
        j = even - 1 - i if i < even else i
        share = 1.0 if i == j else float((mixed[i] - values[j]) / (values[i] - values[j]))
        torch.testing.assert_close(targets[i], share * plain[i] + (1 - share) * plain[j])
        assert i == j or 0 < share < 1


def test_cutmix_targets_are_shares_of_the_area():
    areas = []
    for seed in range(4):
        images = torch.tensor([0.0, 1.0]).view(-1, 1, 1, 1).repeat(1, 3, 16, 16)
        seed_all(seed)
        targets = mix(images, torch.tensor([0, 1]), ClassifyOptions(cutmix=1.0), 2)
        area = images[0, 0].mean()
        torch.testing.assert_close(targets, torch.stack([torch.stack([1 - area, area]), torch.stack([area, 1 - area])]))
        areas.append(float(area))
    assert any(0 < area < 1 for area in areas)


def test_a_batch_is_mixed_in_collate_and_only_then():
    examples = [(torch.full((3, 32, 32), float(value)), value) for value in range(3)]
    images, labels = build_task(setup_of()).collate(examples)
    assert labels.tolist() == [0, 1, 2]
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]
    seed_all(0)
    mixed, soft = build_task(setup_of(mixup=0.8, cutmix=1.0)).collate(examples)
    assert soft.shape == (3, 3)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(3))
    assert not torch.equal(mixed, images)


def test_the_loss_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return images

    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    log = logits.log_softmax(dim=1)
    smoothed = torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3], [0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3]])
    task = build_task(setup_of(label_smoothing=0.1))
    expected = -(smoothed * log).sum(dim=1).mean()
    torch.testing.assert_close(task.loss(Fixed(), (logits, torch.tensor([0, 1]))), expected)
    torch.testing.assert_close(task.loss(Fixed(), (logits, smoothed)), expected)  # mixed labels have it in them


# --- prediction and metrics


def test_predictions_are_those_of_the_bare_network():
    task, model = started(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    model.eval()
    pixels = np.stack([task.input.prepare(picture(seed=seed)) for seed in range(3)])
    found = task.predict(model, pixels, np.full((3, 2), 40))
    images = (torch.from_numpy(pixels) / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    with torch.inference_mode():
        expected = model.head(model.backbone(images)).softmax(dim=1).numpy()
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-6)
    assert {row.dtype for row in found} == {np.dtype(np.float32)}


def test_accuracies_by_hand():
    names = ("a", "b", "c", "d", "e", "f", "g")
    table = np.zeros((5, 7), np.float32)
    table[0, 0] = 1  # right
    table[1] = [0.1, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1]  # b is second
    table[2, 1] = 1  # right
    table[3] = [0.2, 0.2, 0.2, 0.2, 0.2, 0.0, 0.0]  # f is sixth: ties go to the smaller class
    table[4] = [0.5, 0.5, 0, 0, 0, 0, 0]  # a before b
    found = {name: (value, note) for name, value, note in accuracy(table, np.array([0, 1, 1, 5, 1]), names)}
    assert list(found)[:3] == ["top1", "mean_class_top1", "top5"]
    assert found["top1"] == (40.0, "% of 5 images")
    assert found["top5"][0] == 80.0
    assert found["top1/a"] == (100.0, "% of 1 images")
    assert found["top1/b"][0] == pytest.approx(100 / 3)
    assert found["top1/f"][0] == 0.0
    assert found["top1/c"] == (None, "no image of this class")
    assert found["mean_class_top1"] == (pytest.approx((100 + 100 / 3 + 0) / 3), "%, mean of 3 of 7 classes")


def test_no_top5_of_five_classes_and_no_figures_without_images():
    names = ("a", "b", "c", "d", "e")
    assert "top5" not in [name for name, _, _ in accuracy(np.eye(5, dtype=np.float32), np.arange(5), names)]
    task = build_task(setup_of())
    assert task.measure([], []) == [("top1", None, "no image with a label")]
    assert task.criterion in [name for name, _, _ in task.measure([np.ones(3, np.float32)], [record_of()])]


def test_labels_that_cannot_be_used():
    task = build_task(setup_of())
    assert task.check(record_of(2)) is None
    assert task.check(record_of(-1)) == "no label"
    assert task.check(record_of(3)) == "label 3, and the head knows classes 0 to 2"


# --- weights


def test_weights_of_a_file(tmp_path):
    torch.manual_seed(7)
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    _, model = started(weights=str(tmp_path / "whole.safetensors"), pretrained=True)
    found = model.backbone.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in found)
    assert model.head.weight.shape[0] == 3
    first = next(iter(found))
    state["odd.weight"] = state.pop(first)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=rf"1 missing: {first}; 1 unexpected: odd.weight"):
        started(weights=str(tmp_path / "odd.safetensors"), pretrained=True)


def test_the_shared_weights_with_frozen_norms(shared):
    given = {"weights": str(shared / "weights" / "mobilenetv2_100.safetensors"), "model_option": ("pad_type=same",)}
    _, model = started("mobilenetv2_100", pretrained=True, freeze_norm=True, **given)
    plain = build_backbone(EmbedOptions(pool="", out="", backbone="mobilenetv2_100", **given)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():  # in training mode: dropout is the head's alone, norms do not move
        torch.testing.assert_close(model.backbone(images), plain(images))


def test_a_checkpoint_gives_its_backbone_and_for_the_same_classes_its_head(tmp_path):
    folder = make_checkpoint(tmp_path / "c", seed=11)
    state = load_file(f"{folder}/model.safetensors")
    _, same = started(weights=folder, pretrained=True)
    assert all(torch.equal(value, state[key]) for key, value in same.state_dict().items())
    _, other = started(weights=folder, pretrained=True, class_names=("dog", "cat", "owl"))
    assert torch.equal(other.backbone.state_dict()["conv1.0.weight"], state["backbone.conv1.0.weight"])
    assert not torch.equal(other.head.weight, state["head.weight"])


def test_a_transformer_goes_on_at_another_size(tmp_path):
    folder = make_checkpoint(tmp_path / "c", setup_of("test_vit"))
    _, model = started("test_vit", weights=folder, pretrained=True, image_size=64)
    assert (
        model.backbone.pos_embed.shape[1]
        == 4 * (load_file(f"{folder}/model.safetensors")["backbone.pos_embed"].shape[1] - 1) + 1
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "test_vit"}, "holds a model with model 'test_resnet', not 'test_vit'"),
        ({"model_option": ("drop_rate=0.1",)}, r"model_option \[\], not \['drop_rate=0.1'\]"),
    ],
    ids=["model", "arguments"],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, given, words):
    folder = make_checkpoint(tmp_path / "c")
    with pytest.raises(InputError, match=words):
        started(**{"weights": folder, "pretrained": True, **given})


def test_a_checkpoint_with_the_other_stem_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "c", setup_of("resnet18", small_stem=True))
    with pytest.raises(InputError, match="was trained with small_stem True"):
        started("resnet18", weights=folder, pretrained=True)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "c", finished=False)
    with pytest.raises(InputError, match="not a finished checkpoint"):
        started(weights=folder, pretrained=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "test_resnt"}, "did you mean 'test_resnet"),
        ({"crop_scale": (0.5,)}, "crop_scale is 0.5: give the least and the largest"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale is 0.9,0.5"),
        ({"color_jitter": 0.4, "rand_augment": "rand-m9"}, "color_jitter and rand_augment"),
        ({"rand_augment": "sand-m9"}, "rand_augment is 'sand-m9', which timm does not know"),
        ({"lr": 0.0, "backbone_lr": 0.1}, "lr is 0 and backbone_lr 0.1"),
        ({"mean": (0.1, 0.2)}, "has 2 values"),
        ({"small_stem": True}, "small_stem is for ResNets .* not 'test_resnet'"),
        ({"model": "vgg11", "drop_path": 0.1}, "cannot be built with {'num_classes': 0, 'drop_path_rate': 0.1}"),
        ({"model": "test_vit", "image_size": 40}, "does not take images of 40 px"),
        ({"weights": "nowhere.pth"}, "nowhere.pth' does not exist"),
    ],
)
def test_bad_options_are_named(given, words):
    with pytest.raises(InputError, match=words):
        started(**{"pretrained": True, **given})
