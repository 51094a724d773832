"""The verb from end to end: what it publishes, going on after a kill, and what it refuses before it claims a folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from trainings import CLASSES, TINY_VIT, lines_of, picture

from cli.main import run
from engine.chosen import HELD_OUT
from engine.draws import random_keys
from engine.finetune import finetune
from engine.folders import sha256_of
from engine.images import ImageSet
from engine.info import describe
from engine.places import Place
from engine.schema import InputError, build_options
from engine.verbs import FinetuneOptions
from engine.verify import verify

OPTIONS = ("epochs=3", "batch_size=8", "eval_epochs=1", "lr=0.02")


def colour_folder(folder, count, seed):
    rng = np.random.default_rng(seed)
    for row in range(count):
        file = folder / CLASSES[row % 3] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(row % 3, rng))
    return str(folder)


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    return colour_folder(folder / "train", 30, 0), colour_folder(folder / "test", 12, 1)


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    """21 rows of the 30."""
    file = tmp_path_factory.mktemp("selection") / "rows.json"
    file.write_text(json.dumps([row for row in range(30) if row % 10 < 7]))
    return str(file)


def over(options, more):
    """Return NAME=VALUE options with `more` in the place of those of the same name."""
    return tuple({pair.partition("=")[0]: pair for pair in (*options, *more)}.values())


def told(pools, selection, out, *more, **given):
    values = {
        "pool": pools[0],
        "selection": selection,
        "out": str(out),
        "test": pools[1],
        "task": "classify",
        "model": "vit_tiny_patch16_224",
        "weights": "random",
        "model_option": TINY_VIT,
        "image_size": 32,
        "option": over(OPTIONS, more),
        "checkpoint_steps": 2,
    }
    return build_options(
        FinetuneOptions, {key: value for key, value in (values | given).items() if value is not None}, "finetune"
    )


def as_command(options):
    """Return the command line that says the same."""
    words = ["finetune", options.pool]
    for name in ("selection", "out", "test", "task", "model", "weights", "image_size", "checkpoint_steps"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("option", "model_option"):
        words += [word for value in getattr(options, name) for word in (f"--{name.replace('_', '-')}", value)]
    return words


@pytest.fixture(scope="module")
def published(pools, selection, tmp_path_factory):
    out = tmp_path_factory.mktemp("published") / "out"
    return out, finetune(told(pools, selection, out))


def test_what_is_published(published):
    out, manifest = published
    assert manifest["kind"] == "checkpoint"
    assert sorted(manifest["files"]) == ["best.safetensors", "metrics.jsonl", "model.safetensors"]
    assert (manifest["steps"], manifest["epochs"], manifest["num_images"]) == (9, 3.0, 21)
    names = [entry["metric"] for entry in manifest["metrics"]]
    assert (names[0], names[-1]) == ("top1", "best_top1")
    last, best = manifest["metrics"][0], manifest["metrics"][-1]
    tested = lines_of(out, "test")
    assert last["value"] == tested[-1]["top1"]
    assert best["value"] == max(line["top1"] for line in tested) == manifest["best"]["metrics"][0]["value"]
    assert f"after epoch {manifest['best']['epoch']:g}" in best["note"]
    assert manifest["model"]["class_names"] == sorted(CLASSES)
    assert sorted(os.listdir(out)) == sorted([*manifest["files"], "images", "manifest.json", "run.json", "tensorboard", "test"])
    assert verify(str(out))["bad"] == []


def test_the_trainer_sees_the_selection_alone(published):
    out, _ = published
    assert [record.row for record in ImageSet(str(out / "images")).records()] == [row for row in range(30) if row % 10 < 7]


def test_run_again_it_does_nothing(published, pools, selection, capsys):
    out, manifest = published
    assert finetune(told(pools, selection, out)) == manifest
    assert run([*as_command(told(pools, selection, out)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["already_done"] is True
    assert facts["metrics"] == manifest["metrics"]


def test_the_command_says_the_last_metric_first(published, pools, selection, capsys):
    out, _ = published
    assert run([*as_command(told(pools, selection, out)), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("top1") < shown.index("best_top1")
    assert "done before, 9 steps (3 epochs) on 21 images" in shown


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_stopped_training_goes_on_to_the_same_files(published, pools, selection, tmp_path, stop):
    def progress(stage, done, total, note):
        if stage == "train" and done == stop:
            raise StopError

    options = told(pools, selection, tmp_path / "out")
    with pytest.raises(StopError):
        finetune(options, progress)
    manifest = finetune(options)
    for name in ("model.safetensors", "best.safetensors"):
        assert manifest["files"][name] == published[1]["files"][name]
    assert manifest["metrics"] == published[1]["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("after", ["step-000000002", "step-000000006", "manifest"])
def test_killed_in_mid_epoch_it_gives_the_weights_of_the_unbroken_run(published, pools, selection, tmp_path, after):
    """Must-show 4: epochs have three steps, checkpoints two; `manifest`: killed while it tidies up."""
    out = tmp_path / "out"
    command = as_command(told(pools, selection, out))
    process = subprocess.Popen([sys.executable, "-m", "cli", *command, "--quiet"], cwd=Path(__file__).parents[1])
    awaited = out / "manifest.json" if after == "manifest" else out / "steps" / after / "step.json"
    deadline = time.monotonic() + 120
    while not awaited.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    manifest = finetune(told(pools, selection, out))
    assert manifest["files"]["model.safetensors"] == published[1]["files"]["model.safetensors"]
    assert manifest["metrics"] == published[1]["metrics"]
    assert not (out / "steps").exists()


def test_the_average_is_what_is_published(pools, selection, tmp_path):
    manifest = finetune(told(pools, selection, tmp_path / "out", "ema_decay=0.9", test=None))
    plain = finetune(told(pools, selection, tmp_path / "plain", test=None))
    assert manifest["metrics"] == []
    assert manifest["best"] is None
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert ours.keys() == theirs.keys()
    assert manifest["files"]["model.safetensors"]["sha256"] != plain["files"]["model.safetensors"]["sha256"]
    assert "best.safetensors" not in manifest["files"]


def test_another_option_is_refused_and_one_of_the_how_is_not(published, pools, selection):
    out, manifest = published
    with pytest.raises(InputError, match=r"is published with other inputs \(options.setup.training.lr 0.02 -> 0.5\)"):
        finetune(told(pools, selection, out, "lr=0.5"))
    with pytest.raises(InputError, match=r"inputs.train.chosen"):
        finetune(told(pools, "all", out))
    assert finetune(told(pools, selection, out, checkpoint_steps=7, loaders=3, max_failures=0)) == manifest


def held_rows(out):
    return [record.row for record in ImageSet(str(out / "heldout")).records()]


def test_images_may_be_held_out(published, pools, selection, tmp_path):
    out = tmp_path / "out"
    manifest = finetune(told(pools, selection, out, hold_out="20%"))
    assert (manifest["num_images"], manifest["num_held_out"], published[1]["num_held_out"]) == (17, 4, 0)
    held, trained = held_rows(out), [record.row for record in ImageSet(str(out / "images")).records()]
    assert sorted(held + trained) == [row for row in range(30) if row % 10 < 7]
    for record in ImageSet(str(out / "heldout")).records():
        assert sorted(CLASSES)[record.label] == record.id.split("/")[0]
    assert verify(str(out))["bad"] == []
    assert describe(str(out))["num_held_out"] == 4
    assert describe(str(out / "heldout"))["num_images"] == 4
    assert finetune(told(pools, selection, out, hold_out="4")) == manifest  # the same draw in other words
    with pytest.raises(InputError, match=r"inputs.train.chosen"):
        finetune(told(pools, selection, out, hold_out="5"))
    with pytest.raises(InputError, match=r"inputs.train.held_out"):
        finetune(told(pools, selection, out))


def test_a_class_that_only_a_held_out_image_has_is_known(tmp_path):
    """Labels are numbers, so that classes are counted: the largest is that of the one image held out."""
    rng = np.random.default_rng(0)
    (tmp_path / "pool").mkdir()
    rows = np.arange(8)
    held = int(rows[np.argsort(random_keys(0, (HELD_OUT,), rows))[0]])
    lines = ["path,label"]
    for row in rows.tolist():
        (tmp_path / "pool" / f"{row}.png").write_bytes(picture(row % 3, rng))
        lines.append(f"{row}.png,{5 if row == held else row % 2}")
    (tmp_path / "pool" / "list.csv").write_text("\n".join(lines) + "\n")
    options = told((str(tmp_path / "pool" / "list.csv"), None), "all", tmp_path / "out", test=None, hold_out="1")
    assert len(finetune(options)["model"]["class_names"]) == 6
    assert held_rows(tmp_path / "out") == [held]


def test_a_class_that_only_the_test_pool_has_is_known_where_classes_are_numbers(tmp_path):
    rng = np.random.default_rng(0)
    for name, labels in (("train", [0, 1] * 4), ("test", [0, 1, 2, 4])):
        (tmp_path / name).mkdir()
        for row in range(len(labels)):
            (tmp_path / name / f"{row}.png").write_bytes(picture(row % 3, rng))
        (tmp_path / name / "list.txt").write_text("".join(f"{row}.png {label}\n" for row, label in enumerate(labels)))
    options = told((str(tmp_path / "train" / "list.txt"), str(tmp_path / "test" / "list.txt")), "all", tmp_path / "out")
    manifest = finetune(options)
    assert manifest["model"]["class_names"] == ["0", "1", "2", "3", "4"]
    assert next(entry["note"] for entry in manifest["metrics"] if entry["metric"] == "top1") == "% of 4 images"


@pytest.mark.parametrize(
    ("more", "given", "words"),
    [
        ((), {"hold_out": "100%"}, "--hold-out '100%' is 21 of 21 chosen images: one at least must be left to train on"),
        ((), {"hold_out": "21"}, "one at least must be left"),
        ((), {"hold_out": "0"}, "neither a count .100. nor a percentage .10%. above 0"),
        ((), {"hold_out": "some"}, "--hold-out 'some' is neither"),
        ((), {"hold_out": "1.5"}, "--hold-out '1.5' is neither"),
        (("batch_size=9",), {"workers": 2}, "batch_size 9 can't be split over 2 workers x accumulate 1"),
        ((), {"deepspeed": "zero1"}, "--workers 1 or more"),
        (("ema_decay=0.9",), {"deepspeed": "zero3", "workers": 2}, "ema_decay can't average one"),
        (("warmup=3",), {}, "warmup 3 is as long as the training"),
        (("nesterov=true", "momentum=0"), {}, "nesterov needs a momentum"),
        ((), {"model": "vit_tinny"}, "vit_tinny"),
        ((), {"weights": "nowhere.safetensors"}, "nowhere.safetensors' does not exist"),
        ((), {"test": None, "test_split": "test"}, "give it, too"),
        ((), {"selection": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_wrong_input_claims_no_folder(pools, selection, tmp_path, more, given, words):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=words):
        finetune(told(pools, given.pop("selection", selection), out, *more, **given))
    assert not out.exists()


def test_the_pool_itself_is_no_test(pools, selection, tmp_path):
    with pytest.raises(InputError, match="would be of images trained on"):
        finetune(told(pools, selection, tmp_path / "out", test=pools[0]))


def test_images_without_a_label_leave_no_folder(pools, selection, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    rng = np.random.default_rng(0)
    for row in range(30):
        (flat / f"{row}.png").write_bytes(picture(row % 3, rng))
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no label"):
        finetune(told((str(flat), pools[1]), selection, out))
    assert not out.exists()


def test_deepspeed_that_is_not_installed(pools, selection, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="DeepSpeed is not installed"):
        finetune(told(pools, selection, tmp_path / "out", deepspeed="zero2", workers=2))


@pytest.mark.slow
def test_on_workers_it_publishes_the_same(ray_session, published, pools, selection, tmp_path):
    manifest = finetune(told(pools, selection, tmp_path / "out", workers=1))
    assert manifest["files"]["model.safetensors"] == published[1]["files"]["model.safetensors"]
    assert sha256_of(Place(str(tmp_path / "out" / "model.safetensors"))) == manifest["files"]["model.safetensors"]["sha256"]
    assert "ray" not in os.listdir(tmp_path / "out")
