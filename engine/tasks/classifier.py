"""A timm backbone with a linear head: how it is built, what of it is trained, and at which rates."""

from __future__ import annotations

from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from torch.nn.modules.batchnorm import _BatchNorm

from engine.backbones import NO_FILE, create_network, resize
from engine.places import Place
from engine.schema import InputError
from engine.tasks.setup import WEIGHTS, Setup, starting_checkpoint
from engine.verbs import ClassifyOptions
from engine.weights import load_backbone, read_state


class Classifier(torch.nn.Module):
    """Images -> logits: a backbone without its classifier, its features L2-normalised if asked for, one linear layer.

    The layer starts as torch's own, uniform within the root of 1 / d.
    """

    def __init__(self, backbone: torch.nn.Module, num_features: int, num_classes: int, normalize: bool) -> None:
        super().__init__()
        self.backbone, self.normalize = backbone, normalize
        self.head = torch.nn.Linear(num_features, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (r, classes) logits of images (r, 3, height, width)."""
        features: torch.Tensor = self.backbone(images)
        if self.normalize:
            features = torch.nn.functional.normalize(features.float())
        logits: torch.Tensor = self.head(features)
        return logits


def build_classifier(setup: Setup, training: ClassifyOptions, input_size: tuple[int, int, int], pretrained: bool) -> Classifier:
    """Return the classifier of a setup, on the CPU, its backbone with the weights asked for if `pretrained`.

    Raises InputError for a model or weights that can't be had, and for images of a size that the model does not take.
    """
    pretrained = pretrained and training.mode != "scratch"
    fixed: dict[str, Any] = {"drop_path_rate": training.drop_path} if training.drop_path else {}
    backbone = create_network(setup.model, pretrained and setup.weights == "hub", setup.model_option, num_classes=0, **fixed)
    if training.small_stem:
        _shrink_stem(backbone, setup.model)
    theirs = None
    side_px = setup.image_size
    if pretrained and setup.weights not in NO_FILE:
        theirs = _checkpoint(setup, training)
        if theirs and theirs["image_size"]:
            resize(backbone, theirs["image_size"])
            side_px = input_size[-1]  # back to the model's own, where this setup has none
        load_backbone(backbone, Place(setup.weights).at(WEIGHTS).address if theirs else setup.weights)
    resize(backbone, side_px)
    num_features = _num_features(backbone, setup.model, input_size)
    model = Classifier(backbone, num_features, len(setup.class_names), training.normalize)
    if theirs and theirs["class_names"] == list(setup.class_names):
        state = read_state(Place(setup.weights).at(WEIGHTS).address)
        model.head.load_state_dict({name: state[f"head.{name}"] for name in ("weight", "bias")})
    return model


def _checkpoint(setup: Setup, training: ClassifyOptions) -> dict[str, Any] | None:
    """Return the setup of the checkpoint folder that the weights are, or None where they are a file.

    Raises InputError that says what differs where the folder holds another model, or is no finished checkpoint.
    """
    theirs = starting_checkpoint(setup, ("task", "model", "model_option"))
    if theirs is not None and theirs["training"]["small_stem"] != training.small_stem:
        raise InputError(f"checkpoint {setup.weights!r} was trained with small_stem {theirs['training']['small_stem']}")
    return theirs


def _shrink_stem(backbone: Any, name: str) -> None:
    """Give a ResNet the stem for images of 32 px (He et al. 2016, section 4.2): 3x3, stride 1, and no pooling.

    Its first convolution is new, so pretrained weights of the hub lose theirs; a weights file must have been saved with
    this stem.
    """
    first = getattr(backbone, "conv1", None)
    if not isinstance(first, torch.nn.Conv2d) or not hasattr(backbone, "maxpool"):
        raise InputError(f"option small_stem is for ResNets whose stem is one convolution and a pooling, not {name!r}")
    backbone.conv1 = torch.nn.Conv2d(first.in_channels, first.out_channels, 3, stride=1, padding=1, bias=False)
    torch.nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = torch.nn.Identity()


def _num_features(backbone: torch.nn.Module, name: str, input_size: tuple[int, int, int]) -> int:
    """Return the length of the backbone's features; it is left in eval mode.

    Raises InputError for a size that it does not take, and where model options make it give maps or several tensors.
    """
    try:
        with torch.inference_mode():
            features = backbone.eval()(torch.zeros(1, *input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"model {name!r} does not take images of {input_size[1]} px: {error}") from error
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise InputError(f"model {name!r} gives no vector an image: leave out the --model-option that changes what it returns")
    return int(features.shape[1])


def norms_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the batch norms of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def rates_of(model: Classifier, training: ClassifyOptions) -> dict[str, float]:
    """Return each trained parameter's rate relative to `lr`, by its name.

    The head's is 1, the backbone's `backbone_lr` over `lr`, times `layer_decay` for each layer that a parameter lies below
    the head (BEiT, Bao et al. 2022), layers counted as timm does.
    """
    head = {f"head.{name}": 1.0 for name, _ in model.head.named_parameters()}
    if training.mode == "linear":
        return head
    frozen = {id(p) for norm in norms_of(model) for p in norm.parameters()} if training.freeze_norm else set()
    ratio = 1.0 if training.backbone_lr is None else training.backbone_lr / training.lr
    below = layers_below_head(model.backbone) if training.layer_decay != 1 else {}
    trained = {
        f"backbone.{name}": ratio * training.layer_decay ** below.get(name, 0)
        for name, parameter in model.backbone.named_parameters()
        if id(parameter) not in frozen
    }
    return trained | head


def layers_below_head(backbone: Any) -> dict[str, int]:
    """Return how many layers each parameter lies below the classifier, by timm's own grouping of the network.

    What timm can't place (a last convolution, a neck) is in the classifier's layer: 0. Raises InputError for a network
    whose layers timm does not know.
    """
    if not hasattr(backbone, "group_matcher"):
        raise InputError("option layer_decay: timm does not know the layers of this model; leave it out")
    classifier = backbone.pretrained_cfg.get("classifier") or "head"
    top = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    names = [*(name for name, _ in backbone.named_parameters()), top]
    layers = group_with_matcher(((name, name) for name in names), backbone.group_matcher(coarse=False), reverse=True)
    highest = max(layers.values())
    return {name: highest - layers[name] for name in names[:-1]}
