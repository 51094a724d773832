"""How a classifier is built: image sizes of checkpoints, backbones that give no vector, rates that can't be had."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.folders import begin, publish
from engine.places import Place
from engine.schema import InputError
from engine.tasks import Setup, build_task
from engine.verbs import ClassifyOptions

VIT = ("patch_size=8", "depth=2", "embed_dim=32", "num_heads=2")


def setup_of(model, image_size, model_option=(), weights="random", **training):
    options = ClassifyOptions(**training)
    return Setup("classify", model, ("cat", "dog"), options, weights, model_option, image_size)


def checkpoint(folder, setup):
    """Publish a checkpoint of random weights; return its folder."""
    torch.manual_seed(9)
    model = build_task(setup).build(False)
    begin(Place(str(folder)), "checkpoint", {}, {}, False)
    save_file(model.state_dict(), folder / "model.safetensors")
    publish(Place(str(folder)), {"model": setup.to_json()})
    return str(folder)


@pytest.mark.parametrize(("theirs", "ours"), [(32, 64), (64, 32), (64, None), (None, 32), (None, None)])
def test_a_checkpoint_goes_on_at_the_size_of_the_new_setup(tmp_path, theirs, ours):
    """The model's own, 224 px, where that names none; whatever size it was trained at."""
    folder = checkpoint(tmp_path / "trained", setup_of("vit_tiny_patch16_224", theirs, VIT))
    task = build_task(setup_of("vit_tiny_patch16_224", ours, VIT, folder))
    model = task.build(True).eval()
    assert model.backbone.patch_embed.img_size == (ours or 224, ours or 224)
    pixels = np.zeros((1, *task.input.input_size), np.uint8)
    (probabilities,) = task.predict(model, pixels, np.array([[40, 40]]))
    assert probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize("option", ["features_only=True", "global_pool="])
def test_a_backbone_that_gives_no_vector_is_refused(option):
    with pytest.raises(InputError, match="'resnet18' gives no vector an image"):
        build_task(setup_of("resnet18", 32, (option,))).build(False)


@pytest.mark.parametrize("backbone_lr", [0.1, 0.0])
def test_a_rate_relative_to_none_is_refused(backbone_lr):
    with pytest.raises(InputError, match=f"lr is 0 and backbone_lr {backbone_lr}"):
        build_task(setup_of("test_resnet", 32, lr=0.0, backbone_lr=backbone_lr))
