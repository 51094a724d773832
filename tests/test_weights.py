"""Weights from files in the layouts of the papers' authors."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from engine.backbones import build_backbone
from engine.schema import InputError
from engine.verbs import EmbedOptions
from engine.weights import load_backbone, read_state, unwrap

MODELS = {
    "resnet18": {"head": "fc.", "arguments": {}},
    "vit_tiny_patch16_224": {"head": "head.", "arguments": {"img_size": 32, "depth": 2}},
}


def create(name, num_classes, seed):
    """A model with random weights, and running statistics that are not those of a fresh one."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, num_classes=num_classes, **MODELS[name]["arguments"]).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif key.endswith(("running_mean", "bias", "cls_token")):
                value.normal_(0.0, 0.1)
    return model


def features(model):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model.forward_head(model.forward_features(images), pre_logits=True)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def zeros(state):
    return {key: torch.zeros_like(value) for key, value in state.items()}


def body(name, state):
    return {key: value for key, value in state.items() if not key.startswith(MODELS[name]["head"])}


def plain(name, state):
    return state


def dino(name, state):
    teacher = prefixed(body(name, state), "backbone.") | {
        "head.mlp.0.weight": torch.ones(3, 4),
        "head.last_layer.bias": torch.ones(3),
    }
    student = prefixed(zeros(body(name, state)), "module.backbone.") | {"module.head.mlp.0.weight": torch.ones(3, 4)}
    return {"student": student, "teacher": teacher, "epoch": 300, "args": argparse.Namespace(arch=name, lr=0.1, out_dim=65536)}


def dino_parallel(name, state):
    return {"teacher": prefixed(body(name, state), "module.backbone.") | {"module.head.mlp.0.weight": torch.ones(3, 4)}}


def deit(name, state):
    return {"model": state}


def moco(name, state):
    query = prefixed(body(name, state), "module.encoder_q.")
    heads = {"module.encoder_q.fc.0.weight": torch.ones(4, 4), "module.encoder_q.fc.2.bias": torch.ones(2)}
    key_encoder = prefixed(zeros(body(name, state)), "module.encoder_k.") | {"module.encoder_k.fc.0.weight": torch.ones(4, 4)}
    queue = {"module.queue": torch.ones(2, 8), "module.queue_ptr": torch.zeros(1)}
    return {"epoch": 200, "arch": name, "state_dict": {**queue, **key_encoder, **query, **heads}, "optimizer": {"lr": 0.03}}


def compress(wrapper):
    def layout(name, state):
        return {"opt": argparse.Namespace(teacher="simclr"), wrapper: prefixed(state, "module."), "epoch": 130}

    return layout


LAYOUTS = {
    "plain": plain,
    "dino": dino,
    "dino-parallel": dino_parallel,
    "deit": deit,
    "moco-v2": moco,
    "compress-state_dict": compress("state_dict"),
    "compress-model": compress("model"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_exactly_the_original_features(tmp_path, layout, name):
    source, target = create(name, 7, seed=1), create(name, 0, seed=2)
    torch.save(LAYOUTS[layout](name, source.state_dict()), tmp_path / "weights.pth")
    assert not torch.equal(features(target), features(source))
    load_backbone(target, str(tmp_path / "weights.pth"))
    assert torch.equal(features(target), features(source))


@pytest.mark.parametrize("name", MODELS)
def test_safetensors(tmp_path, name):
    source, target = create(name, 7, seed=1), create(name, 0, seed=2)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_backbone(target, str(tmp_path / "weights.safetensors"))
    assert torch.equal(features(target), features(source))


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "pth.tar"])
def test_the_backbone_of_the_options_gets_the_file(tmp_path, suffix):
    name = "vit_tiny_patch16_224"
    source = create(name, 7, seed=1)
    file = tmp_path / f"weights.{suffix}"
    torch.save({"model": source.state_dict()}, file)
    options = EmbedOptions(pool="", out="", backbone=name, weights=str(file), model_option=("img_size=32", "depth=2"))
    assert torch.equal(features(build_backbone(options).eval()), features(source))


def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    source, target = create("resnet18", 0, seed=1).half().float(), create("resnet18", 0, seed=2)
    torch.save({key: v.half() if v.is_floating_point() else v for key, v in source.state_dict().items()}, tmp_path / "w.pth")
    load_backbone(target, str(tmp_path / "w.pth"))
    assert target.conv1.weight.dtype == torch.float32
    assert torch.equal(features(target), features(source))


def test_counts_of_batches_may_be_missing(tmp_path):
    source, target = create("resnet18", 0, seed=1), create("resnet18", 0, seed=2)
    torch.save({k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.pth")
    load_backbone(target, str(tmp_path / "w.pth"))
    assert torch.equal(features(target), features(source))


def test_keys_that_do_not_fit_are_one_error_that_lists_them(tmp_path):
    target = create("resnet18", 0, seed=2)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    del state["conv1.weight"], state["layer1.0.bn1.bias"]
    state["projector.weight"] = torch.ones(2)
    state["bn1.weight"] = torch.ones(65)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(InputError) as caught:
        load_backbone(target, str(tmp_path / "odd.pth"))
    message = str(caught.value)
    assert "odd.pth" in message
    assert "2 missing: conv1.weight, layer1.0.bn1.bias;" in message
    assert "1 unexpected: projector.weight;" in message
    assert "1 of another shape: bn1.weight)" in message
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_long_lists_of_keys_are_cut(tmp_path):
    torch.save({f"extra.{i}": torch.ones(1) for i in range(8)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"8 unexpected: extra\.0, extra\.1, extra\.2, extra\.3, extra\.4 and 3 more"):
        load_backbone(create("resnet18", 0, seed=2), str(tmp_path / "w.pth"))


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(create("vit_tiny_patch16_224", 0, seed=1).state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="does not fit the backbone"):
        load_backbone(create("resnet18", 0, seed=2), str(tmp_path / "w.pth"))


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_refused(tmp_path, how):
    victim, file = tmp_path / "victim", tmp_path / "evil.pth"
    state = {"model": {"x": torch.ones(1)}, "note": Malicious(f"touch {victim}")}
    if how == "torch":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps({"note": Malicious(f"touch {victim}")}, protocol=2))
    with pytest.raises(InputError, match=r"evil\.pth.* cannot be read with weights_only"):
        read_state(str(file))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none.pth", None, "does not exist"),
        ("text.pth", b"no weights\n", "cannot be read"),
        ("empty.pth", b"", "cannot be read"),
        ("zip.pth", b"PK\x03\x04 cut", "cannot be read"),
        ("text.safetensors", b"no weights, and long enough", "not safetensors"),
        ("empty.safetensors", b"", "not safetensors"),
        ("weights.onnx", b"x", "neither .safetensors nor .pth"),
    ],
)
def test_files_that_are_no_weights_are_named(tmp_path, name, data, words):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_state(str(tmp_path / name))
    assert name in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_named(tmp_path):
    torch.save({"x": torch.ones(1000)}, tmp_path / "cut.pth")
    data = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut\.pth"):
        read_state(str(tmp_path / "cut.pth"))


def test_a_bare_tensor_is_no_state_dict(tmp_path):
    torch.save(torch.ones(3), tmp_path / "w.pth")
    with pytest.raises(InputError, match="holds a Tensor, not a state dict"):
        read_state(str(tmp_path / "w.pth"))


def test_unwrap_leaves_out_what_is_no_tensor():
    assert list(unwrap({"a": torch.ones(1), "epoch": 3, "name": "x"})) == ["a"]


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "resnet18"])
def test_hub_weights_without_a_network(monkeypatch, tmp_path, name):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as caught:
        build_backbone(EmbedOptions(pool="", out="", backbone=name))
    assert f"the weights of {name!r} cannot be fetched from the hub" in str(caught.value)
    assert "--weights FILE" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_real_weights_load(shared):
    options = EmbedOptions(
        pool="",
        out="",
        backbone="mobilenetv2_100",
        weights=str(Path(shared) / "weights" / "mobilenetv2_100.safetensors"),
        model_option=("pad_type=same",),
    )
    model = build_backbone(options)
    raw = safetensors.torch.load_file(options.weights)
    assert torch.equal(model.conv_stem.weight, raw["conv_stem.weight"])
    assert type(model.conv_stem).__name__ == "Conv2dSame"
