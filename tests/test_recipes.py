"""Recipes: what their files may say, what a command says over them, and each of them, at full size, against the papers."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import publish_set

from engine.images import ImageSet, Record
from engine.recipes import (
    Recipe,
    describe_options,
    describe_recipes,
    lookup_recipe,
    option_text,
    parse_recipe,
    recipe_names,
    resolve,
)
from engine.schema import MAX_PIXELS, InputError, build_options, fields_of
from engine.tasks.setup import TRAINING, setup_from
from engine.training.job import Job
from engine.training.loop import Training
from engine.training.order import order_of
from engine.training.rates import rate_of
from engine.training.seeds import kept
from engine.verbs import ClassifyOptions, FinetuneOptions

SAID = b"""
summary = "a small one"
task = "classify"
model = "resnet18"
image_size = 64
model_option = ["pad_type=same", "drop_rate=0.1"]

[options]
epochs = 30
schedule = "step"
milestones = [10, 20]
"""
"""A recipe of a user's own."""


def asked(recipe=None, **given):
    return FinetuneOptions(pool="pool", out="out", selection="all", recipe=recipe and str(recipe), **given)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(SAID)
    return path


# --- files


def test_published_recipes_say_where_they_come_from():
    assert recipe_names() == [
        "activeft-deit",
        "freesel-resnet18",
        "freesel-ssd300",
        "isal-fasterrcnn",
        "isal-fcos",
        "isal-resnet18",
        "lowbudget-finetune",
        "lowbudget-linear",
        "lowbudget-scratch",
    ]
    for name in recipe_names():
        recipe = lookup_recipe(name)
        assert isinstance(recipe, Recipe)
        assert re.search(r"20\d\d, arXiv \d{4}\.\d{5}$", recipe.head.source), name
        assert recipe.head.notes, name
        assert name.partition("-")[0] in {"activeft", "freesel", "isal", "lowbudget"}


def test_a_file_of_ones_own(mine):
    setup = resolve(asked(mine))
    assert (setup.task, setup.model, setup.weights, setup.image_size) == ("classify", "resnet18", "hub", 64)
    assert setup.model_option == ("pad_type=same", "drop_rate=0.1")
    assert setup.training == ClassifyOptions(epochs=30, schedule="step", milestones=(10.0, 20.0))
    assert setup.class_names == ()
    assert setup_from(setup.to_json()) == setup


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("epochs = 30", "epoch = 30", ["'epoch'", "did you mean 'epochs'", "its options: mode,", "classify"]),
        ("epochs = 30", 'epochs = "30"', ["epochs is '30'", "a whole number"]),
        ("epochs = 30", "epochs = true", ["epochs is true", "a whole number"]),
        ("epochs = 30", "epochs = 30.0", ["epochs is 30.0", "a whole number"]),
        ("epochs = 30", "epochs = 0", ["epochs is 0", "at least 1"]),
        ("epochs = 30", "lr = true", ["lr is true", "a number"]),
        ("epochs = 30", "flip = 1", ["flip is 1", "true or false"]),
        ("epochs = 30", "max_size = 30", ["'max_size'", "task classify"]),
        ("epochs = 30", "clip_grad = []", ["clip_grad is []", "a number"]),
        ("[10, 20]", "10", ["milestones is 10", "a list of numbers"]),
        ("[10, 20]", '[10, "20"]', ["milestones is '20'", "a list of numbers"]),
        ("[10, 20]", "[10, -1]", ["milestones is -1.0", "at least 0"]),
        ('"step"', '"steps"', ["schedule is 'steps'", "did you mean 'step'", "constant, step, cosine"]),
        ('"resnet18"', "18", ["model is 18", "text"]),
        ('"classify"', '"segment"', ["task is 'segment'", "classify, detect"]),
        ('task = "classify"', "", ["needs task"]),
        ("image_size = 64", "image-side = 64", ["'image-side'", "did you mean 'image_size'", "under [options]"]),
        ("image_size = 64", "lr = 0.1", ["'lr'", "training options go under [options]"]),
        ("image_size = 64", "image_size = [64]", ["image_size is [64]", "a whole number"]),
        ("image_size = 64", "mean = [0.5, true]", ["mean is true", "a list of numbers"]),
        ('["pad_type=same", "drop_rate=0.1"]', "[1]", ["model_option is 1", "a list of texts"]),
        ("[options]\n", "[options\n", ["not a TOML file", "line"]),
        ("[options]\n", "[options.more]\n", ["'more'", "its options"]),
    ],
)
def test_what_a_file_cannot_say(mine, old, new, said):
    text = SAID.decode()
    assert old in text
    mine.write_text(text.replace(old, new))
    with pytest.raises(InputError) as error:
        lookup_recipe(str(mine))
    for words in (str(mine), *said):
        assert words in str(error.value)


def test_options_must_be_a_table_and_a_file_text(mine):
    with pytest.raises(InputError, match=r"'mine': options is 3: it takes a table, \[options\]"):
        parse_recipe("mine", b"options = 3")
    with pytest.raises(InputError, match="'mine' is not a TOML file"):
        parse_recipe("mine", b"\xff\xfe")


def test_a_name_that_is_no_recipe(tmp_path):
    with pytest.raises(
        InputError, match=r"unknown recipe 'isal-fco', did you mean 'isal-fcos'\? \(one of: activeft-deit, .*toml"
    ):
        lookup_recipe("isal-fco")
    with pytest.raises(InputError, match=r"none\.toml' does not exist: give a file, or one of activeft-deit"):
        lookup_recipe(str(tmp_path / "none.toml"))


# --- what a command says


def test_flags_go_over_the_recipe_and_option_over_both(mine):
    setup = resolve(asked(mine, image_size=96, weights="random", mean=(0.5,), option=("epochs=3", "decay-1d=no", "mixup=0.2")))
    assert (setup.image_size, setup.weights, setup.mean) == (96, "random", (0.5,))
    assert setup.training == ClassifyOptions(epochs=3, decay_1d=False, mixup=0.2, schedule="step", milestones=(10.0, 20.0))


def test_model_options_are_the_recipes_models(mine):
    assert resolve(asked(mine, model_option=("drop_rate=0.3", "zero=1"))).model_option == (
        "pad_type=same",
        "drop_rate=0.3",
        "zero=1",
    )
    assert resolve(asked(mine, model="resnet34", model_option=("zero=1",))).model_option == ("zero=1",)
    assert resolve(asked(mine, model="resnet18")).model_option == ("pad_type=same", "drop_rate=0.1")


def test_none_takes_an_optional_value_back():
    assert resolve(asked("activeft-deit")).training.clip_grad == 2.0
    training = resolve(asked("activeft-deit", option=("clip_grad=none", "lr-batch-size=None"))).training
    assert (training.clip_grad, training.lr_batch_size) == (None, None)
    with pytest.raises(InputError, match="lr is 'none': it takes a number"):
        resolve(asked("activeft-deit", option=("lr=none",)))


def test_without_a_recipe():
    setup = resolve(asked(task="detect", model="ssd300_vgg16", option=("steps=600",)))
    assert (setup.task, setup.weights, setup.image_size, setup.training.steps) == ("detect", "hub", None, 600)
    for given, lacking in (({}, "--task and --model"), ({"task": "detect"}, "--model"), ({"model": "resnet18"}, "--task")):
        with pytest.raises(InputError, match=f"^{lacking} not given.*activeft-deit, .*lowbudget-scratch.*coresift recipes"):
            resolve(asked(**given))


def test_from_scratch_there_are_no_weights():
    assert resolve(asked("lowbudget-scratch", weights="random")).weights == "random"
    assert resolve(asked(task="classify", model="resnet18", option=("mode=scratch",))).weights == "random"
    assert resolve(asked("lowbudget-scratch", weights="hub", option=("mode=finetune",))).weights == "hub"
    with pytest.raises(
        InputError, match=r"--weights hub: option mode is scratch, .*leave --weights out, or pass .*mode=finetune"
    ):
        resolve(asked("lowbudget-scratch", weights="hub"))


def test_a_task_is_the_recipes():
    assert resolve(asked("isal-fcos", task="detect")).task == "detect"
    with pytest.raises(InputError, match="--task classify: recipe 'isal-fcos' is for detect"):
        resolve(asked("isal-fcos", task="classify"))


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["max_boxs=3"], "unknown option 'max_boxs' for task 'detect', did you mean 'max_boxes'.*epochs"),
        (["mixup=0.1"], "unknown option 'mixup' for task 'detect'"),
        (["epochs=many"], "epochs is 'many': it takes a whole number"),
        (["epochs"], "--option 'epochs' is not of the form name=value"),
        (["epochs=1", "epochs=2"], "'epochs' is given twice"),
    ],
)
def test_options_that_are_none(pairs, said):
    with pytest.raises(InputError, match=said):
        resolve(asked("isal-fcos", option=tuple(pairs)))


def test_steps_do_not_make_steps_of_epochs(mine):
    with pytest.raises(InputError, match=r"steps=600 makes steps of .*epochs: milestones=8,11, warmup=0.8. Give .*warmup= in"):
        resolve(asked("isal-fcos", option=("steps=600",)))
    with pytest.raises(InputError, match=r"counts in epochs: warmup=0.8"):
        resolve(asked("isal-fcos", option=("steps=600", "milestones=400,550")))
    training = resolve(asked("isal-fcos", option=("steps=600", "milestones=400,550", "warmup=50"))).training
    assert (training.steps, training.milestones, training.warmup) == (600, (400.0, 550.0), 50.0)
    mine.write_bytes(SAID.replace(b"epochs = 30", b"steps = 30"))
    assert resolve(asked(mine, option=("steps=60",))).training.steps == 60
    with pytest.raises(InputError, match=r"steps=none makes epochs of .* counts in steps: milestones=10,20"):
        resolve(asked(mine, option=("steps=none",)))


# --- what is told of them


def test_what_is_told_of_a_recipe_makes_it_again():
    for told in describe_recipes():
        recipe = lookup_recipe(told["name"])
        declared = TRAINING[told["task"]]
        assert build_options(declared, told["options"], "") == recipe.training
        over = tuple(f"{name}={option_text(value)}" for name, value in told["options"].items())
        bare = asked(task=told["task"], model=told["model"], option=over)
        assert resolve(bare).training == recipe.training


def test_every_training_option_is_told_once():
    told = describe_options()
    for task, declared in TRAINING.items():
        names = [option["name"] for group in ("all", task) for option in told[group]]
        assert sorted(names) == sorted(field.name for field in fields_of(declared))
    assert all(option["help"] for group in told.values() for option in group)


# --- against the papers: each number, by hand

IMAGENET = {"image_size": 224, "crop_pct": 0.875, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""Resize 256, centre crop 224."""
CROPS = {"crop": "resized", "flip": True}
NO_MORE = {"mixup": 0.0, "cutmix": 0.0, "color_jitter": 0.0, "rand_augment": None, "erasing": 0.0}
SGD = {"optimizer": "sgd", "momentum": 0.9, "clip_grad": None}
ADAM_100 = {"optimizer": "adam", "epochs": 100, "batch_size": 128, "milestones": (50.0, 75.0), "gamma": 0.1, "lr": 0.01}
RESNET_CIFAR = {
    **SGD,
    **NO_MORE,
    "mode": "scratch",
    "small_stem": True,
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "milestones": (160.0,),
    "gamma": 0.1,
    "crop": "pad",
    "flip": True,
}
ONE_X = {**SGD, "epochs": 12, "batch_size": 8, "lr": 0.01, "weight_decay": 1e-4, "milestones": (8.0, 11.0), "gamma": 0.1}

PUBLISHED = {
    "activeft-deit": (
        {"model": "vit_small_patch16_224.dino", "weights": "hub", "interpolation": "bicubic", **IMAGENET},
        {
            **CROPS,
            **NO_MORE,
            "mode": "finetune",
            "optimizer": "sgd",
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "lr": 0.01,
            "batch_size": 512,
            "lr_batch_size": 512,
            "schedule": "cosine",
            "min_lr": 1e-5,
            "warmup": 5.0,
            "warmup_lr": 1e-6,
            "epochs": 1000,
            "clip_grad": 2.0,
            "drop_path": 0.1,
            "label_smoothing": 0.1,
            "repeats": 3,
            "precision": "bf16",
        },
    ),
    "lowbudget-linear": (
        {"model": "resnet18", **IMAGENET},
        {**CROPS, **NO_MORE, **ADAM_100, "mode": "linear", "normalize": True},
    ),
    "lowbudget-finetune": ({"model": "resnet18", **IMAGENET}, {**ADAM_100, "mode": "finetune", "backbone_lr": 1e-4}),
    "lowbudget-scratch": (
        {"model": "resnet18", "weights": "random", **IMAGENET},
        {
            **SGD,
            "mode": "scratch",
            "epochs": 100,
            "batch_size": 128,
            "lr": 0.1,
            "weight_decay": 1e-4,
            "milestones": (30.0, 60.0, 90.0),
            "gamma": 0.1,
        },
    ),
    "freesel-resnet18": ({"model": "resnet18", "weights": "random", "image_size": 32, "crop_pct": 1.0}, RESNET_CIFAR),
    "isal-resnet18": ({"model": "resnet18", "weights": "random", "image_size": 32, "crop_pct": 1.0}, RESNET_CIFAR),
    "freesel-ssd300": (
        {"model": "ssd300_vgg16", "image_size": 300},
        {**SGD, "lr": 1e-3, "weight_decay": 5e-4, "batch_size": 32, "epochs": 300, "milestones": (240.0,), "gamma": 0.1},
    ),
    "isal-fcos": ({"model": "fcos_resnet50_fpn"}, ONE_X),
    "isal-fasterrcnn": ({"model": "fasterrcnn_resnet50_fpn"}, ONE_X),
}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_what_methods_says(name):
    model, training = PUBLISHED[name]
    setup = resolve(asked(name))
    assert {key: getattr(setup, key) for key in model} == model
    assert {key: getattr(setup.training, key) for key in training} == training
    if "milestones" in training:
        assert setup.training.schedule == "step"


RATES = {
    "activeft-deit": (1000, 2, {0: 1e-6, 1: 0.0020008, 4: 0.0080002, 5: 0.0099993837, 500: 0.005005, 999: 1.0024649e-5}),
    "lowbudget-linear": (1000, 8, {0: 0.01, 49: 0.01, 50: 0.001, 74: 0.001, 75: 1e-4, 99: 1e-4}),
    "lowbudget-finetune": (1000, 8, {0: 0.01, 49: 0.01, 50: 0.001, 74: 0.001, 75: 1e-4, 99: 1e-4}),
    "lowbudget-scratch": (1000, 8, {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001, 90: 1e-4, 99: 1e-4}),
    "freesel-resnet18": (1000, 8, {0: 0.1, 159: 0.1, 160: 0.01, 199: 0.01}),
    "isal-resnet18": (1000, 8, {0: 0.1, 159: 0.1, 160: 0.01, 199: 0.01}),
    "freesel-ssd300": (16551, 518, {0: 1e-3, 239: 1e-3, 240: 1e-4, 299: 1e-4}),
    "isal-fcos": (5000, 625, {0: 1e-5, 1: 0.01, 7: 0.01, 8: 1e-3, 10: 1e-3, 11: 1e-4}),
    "isal-fasterrcnn": (5000, 625, {0: 1e-5, 1: 0.01, 7: 0.01, 8: 1e-3, 10: 1e-3, 11: 1e-4}),
}
"""Images, steps of an epoch, and the rate with which an epoch (from 0) begins."""


def rates_of(name, images, **options):
    """Return a recipe's order and rate on some number of images."""
    training = resolve(asked(name, option=tuple(f"{key}={value}" for key, value in options.items()))).training
    order = order_of(training, images, 0)
    return order, rate_of(training, order.steps_per_epoch, order.total_steps)


@pytest.mark.parametrize("name", recipe_names())
def test_the_rate_at_the_beginning_of_epochs(name):
    images, steps, expected = RATES[name]
    order, rate = rates_of(name, images)
    assert order.steps_per_epoch == steps
    assert order.total_steps == steps * resolve(asked(name)).training.epochs
    assert {epoch: rate(epoch * steps) for epoch in expected} == pytest.approx(expected, rel=1e-6)
    last = max(epoch for epoch in expected if epoch)
    assert rate(last * steps - 1) == rate((last - 1) * steps)
    assert rate(order.total_steps - 1) == rate(last * steps)


@pytest.mark.parametrize(("batch", "lr"), [(512, 0.01), (256, 0.005), (1024, 0.02), (64, 0.00125)])
def test_activefts_rate_grows_with_the_batch_and_its_ends_do_not(batch, lr):
    order, rate = rates_of("activeft-deit", 2048, batch_size=batch)
    steps = order.steps_per_epoch
    assert steps == 2048 // batch
    assert rate(0) == 1e-6
    assert rate(4 * steps) == pytest.approx(1e-6 + (lr - 1e-6) * 4 / 5)
    assert rate(500 * steps) == pytest.approx((lr + 1e-5) / 2)
    assert rate(1000 * steps - 1) == pytest.approx(1e-5, rel=0.01)


@pytest.mark.parametrize("name", ["isal-fcos", "isal-fasterrcnn"])
def test_detectors_warm_up_over_500_steps_of_the_first_round(name):
    _, rate = rates_of(name, 5000)
    assert [rate(step) for step in (0, 1, 250, 499)] == pytest.approx([1e-5, 2.998e-5, 0.005005, 0.00998002])
    assert [rate(step) for step in (500, 4999, 5000, 6874, 6875, 7499)] == pytest.approx([0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


# --- at full size

PARAMETERS = {
    # patches 3*16*16*384 + 384, class token 384, positions 197*384, 12 blocks of 1,774,464, norm 768, head 384*1000 + 1000
    "activeft-deit": (1000, 22_050_664, 22_050_664),
    "lowbudget-finetune": (1000, 11_689_512, 11_689_512),
    "lowbudget-linear": (1000, 11_689_512, 513_000),
    "lowbudget-scratch": (1000, 11_689_512, 11_689_512),
    # a 3x3 stem has 3*64*(49 - 9) weights fewer, ten classes 990*513 fewer
    "freesel-resnet18": (10, 11_173_962, 11_173_962),
    "isal-resnet18": (100, 11_220_132, 11_220_132),
    # torchvision's own counts, for COCO's 91 classes, of which FCOS has no background
    "freesel-ssd300": (90, 35_641_826, 35_641_826),
    "isal-fcos": (91, 32_269_600, 32_269_600),
    "isal-fasterrcnn": (90, 41_755_286, 41_755_286),
}
"""Classes; parameters of the whole model, and those trained: of a detector without batch norms, which are constants in
torchvision's."""

GROUPS = {
    "activeft-deit": {(1.0, 1e-4), (1.0, 0.0)},
    "lowbudget-finetune": {(0.01, 0.0), (1.0, 0.0)},
    "lowbudget-linear": {(1.0, 0.0)},
    "lowbudget-scratch": {(1.0, 1e-4)},
    "freesel-resnet18": {(1.0, 5e-4)},
    "isal-resnet18": {(1.0, 5e-4)},
    "freesel-ssd300": {(1.0, 5e-4)},
    "isal-fcos": {(1.0, 1e-4)},
    "isal-fasterrcnn": {(1.0, 1e-4)},
}
"""Rate relative to the schedule's, and weight decay, of the groups of parameters."""

FIRST_RATE = {"activeft-deit": 1e-6, "isal-fcos": 1e-5, "isal-fasterrcnn": 1e-5}
"""Where warm-up begins."""


class StepDone(Exception):  # noqa: N818
    """One step is enough."""


def stop_after_one(stage, done, total, note):
    if done == 1:
        raise StepDone


def photos(place, count, num_classes):
    """Publish an images/ folder of noise, 640 x 480, with a class and two boxes each; return its path."""
    rng = np.random.default_rng(0)
    boxes = np.array([[40, 60, 200, 300], [300, 100, 250, 180]], dtype=np.float32)
    records = []
    for row in range(count):
        held = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (480, 640, 3)).astype(np.uint8)).save(held, format="JPEG")
        labels = np.array([0, num_classes - 1])
        records.append(Record(row, f"photo-{row}", held.getvalue(), row, boxes, labels, np.zeros(2, dtype=bool)))
    return publish_set(place, records, [f"class-{label}" for label in range(num_classes)])


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_a_step_at_full_size(name, tmp_path):
    num_classes, num_parameters, num_trained = PARAMETERS[name]
    setup = resolve(asked(name, weights="random"))
    batch = 2 if setup.task == "classify" else 1
    images = photos(tmp_path / "images", batch, num_classes)
    training_of_it = replace(setup.training, batch_size=batch)
    setup = replace(setup, class_names=ImageSet(images).class_names, training=training_of_it)
    (tmp_path / "out").mkdir()
    job = Job(setup, str(tmp_path / "out"), images, None, 0, 0, 2, 0.0, 0, None, None, MAX_PIXELS)
    with kept():
        training = Training(job, 0, torch.device("cpu"), None, stop_after_one)
        before = [parameter.detach().clone() for parameter in training.model.parameters()]
        with pytest.raises(StepDone):
            training.run()
    model, optimizer = training.model, training.machine.optimizer
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) and setup.task == "detect"]
    in_norms = {id(parameter) for norm in norms for parameter in norm.parameters()}
    counted = [parameter for parameter in model.parameters() if id(parameter) not in in_norms]
    assert sum(parameter.numel() for parameter in counted) == num_parameters
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sum(parameter.numel() for parameter in trained if id(parameter) not in in_norms) == num_trained
    assert {(group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups} == GROUPS[name]
    rate = FIRST_RATE.get(name, setup.training.lr)
    assert all(group["lr"] == pytest.approx(rate * group["lr_scale"]) for group in optimizer.param_groups)
    assert type(optimizer) is (torch.optim.Adam if setup.training.optimizer == "adam" else torch.optim.SGD)
    moved = {id(p) for p, old in zip(model.parameters(), before, strict=True) if not torch.equal(p, old)}
    assert moved <= {id(parameter) for parameter in trained}
    # the rest: what lies in a residual branch, which starts at nothing, and what 1e-6 times a gradient does not change
    assert len(moved) > len(trained) / 3
    assert {id(parameter) for parameter in optimizer.state} == {id(parameter) for parameter in trained}
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trained)
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert (line["step"], line["lr"]) == (1, pytest.approx(rate))
    assert line["loss"] > 0
    assert ("grad_norm" in line) == (name == "activeft-deit")
