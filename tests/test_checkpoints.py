"""Checkpoints: what is read of them, and what is said of those that can't be."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained import make_checkpoint, setup_of

from cli.main import run
from engine.checkpoints import Checkpoint
from engine.info import describe
from engine.schema import InputError
from engine.verify import verify


def test_the_weights_are_those_that_were_written(tmp_path):
    setup = setup_of(normalize=True, mode="linear", mean=(0.5,), model_option=("drop_rate=0.1",))
    folder = make_checkpoint(tmp_path / "c", setup, seed=1, best_seed=2)
    checkpoint = Checkpoint(folder)
    assert checkpoint.setup == setup
    for best, name in ((False, "model"), (True, "best")):
        task, model = checkpoint.load(best)
        state = load_file(f"{folder}/{name}.safetensors")
        assert task.setup == setup
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not any(module.training for module in model.modules())


def test_a_detector(tmp_path):
    setup = setup_of("fcos:test_efficientnet", task="detect", image_size=64)
    task, model = Checkpoint(make_checkpoint(tmp_path / "c", setup)).load()
    assert task.column == "detections"
    assert not model.training


def test_the_digest_is_of_the_weights_and_not_of_the_place(tmp_path):
    folder = make_checkpoint(tmp_path / "c", seed=1, best_seed=2)
    shutil.copytree(folder, tmp_path / "copy")
    first = Checkpoint(folder)
    assert Checkpoint(str(tmp_path / "copy")).digest() == first.digest()
    others = [make_checkpoint(tmp_path / "seed", seed=3), make_checkpoint(tmp_path / "setup", setup_of(std=(0.5,)), seed=1)]
    digests = [first.digest(), first.digest(best=True), *(Checkpoint(other).digest() for other in others)]
    assert len(set(digests)) == 4


def test_folders_that_are_none(tmp_path, feature_store):
    unfinished = make_checkpoint(tmp_path / "unfinished", finished=False)
    (tmp_path / "empty").mkdir()
    for uri, words in (
        (str(tmp_path / "nowhere"), "does not exist: give the folder that `coresift finetune` wrote"),
        (unfinished, "is unfinished"),
        (str(tmp_path / "empty"), "is not a checkpoint"),
        (feature_store.place.uri, "is a features folder, not a checkpoint"),
    ):
        with pytest.raises(InputError, match=words):
            Checkpoint(uri)


def test_no_best_weights(tmp_path):
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "c"))
    for ask in (checkpoint.digest, checkpoint.load):
        with pytest.raises(InputError, match=r"no weights of a best evaluation.*without --test"):
            ask(best=True)


def test_weights_that_do_not_fit_are_named(tmp_path):
    folder = make_checkpoint(tmp_path / "c")
    state = load_file(f"{folder}/model.safetensors")
    state["extra"] = state.pop("head.bias")
    state["head.weight"] = torch.zeros(7, 3)
    save_file(state, f"{folder}/model.safetensors")
    with pytest.raises(InputError, match=r"1 missing: head.bias; 1 unexpected: extra; 1 of another shape: head.weight"):
        Checkpoint(folder).load()


def test_info_and_verify(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "c", best_seed=2)
    facts = describe(folder)
    assert (facts["kind"], facts["state"], facts["num_images"], facts["steps"]) == ("checkpoint", "published", 6, 2)
    assert facts["model"]["model"] == "test_resnet"
    assert facts["metrics"][0]["value"] == 50.0
    assert verify(folder)["num_files"] == 2
    assert run(["info", folder]) == 0
    assert "test_resnet" in capsys.readouterr().out
    with open(f"{folder}/best.safetensors", "ab") as file:
        file.write(b"more")
    assert [entry["file"] for entry in verify(folder)["bad"]] == ["best.safetensors"]
