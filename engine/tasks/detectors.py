"""Detectors: torchvision's heads on torchvision's own networks, or on any of timm's that gives feature maps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from engine.schema import InputError, first_line, nearest
from engine.tasks.bodies import freeze_below, timm_body, torchvision_body
from engine.tasks.canvas import CanvasInput
from engine.tasks.necks import LITE_NORM, STRIDES, TimmBackbone, known_backbone
from engine.tasks.setup import Setup
from engine.verbs import DetectOptions

SQUARE = ("ssd", "ssdlite")
"""Heads whose images are squeezed into a square."""

FROM_ZERO = ("fcos", "retinanet")
"""Heads whose classes count from 0; the others keep class 0 for the background."""

SSD_SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
SSD_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
SSD_STEPS = [8, 16, 32, 64, 100, 300]
"""Default boxes of SSD300 (Liu et al., 2016): shares of the side, aspect ratios beside 1, px between two at 300 px."""

PRETRAINED = re.compile(r"backbone\.((body|features)\.|extra\.0\.\d+\.(weight|bias)$)")
"""Names of what comes from a classification network; all else is new. SSD300 keeps VGG's last block in `extra.0`."""


@dataclass(frozen=True)
class Known:
    """A detector of torchvision's: head, network, the last module of each of its stages, and how many of these train."""

    head: str
    network: str
    stages: tuple[str, ...]
    trained: int
    image_size: int = 800
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


RESNET = ("bn1", "layer1", "layer2", "layer3", "layer4")
MOBILENET = ("1", "3", "6", "12", "15", "16")
VGG = ("3", "8", "15", "22", "30")
KNOWN = {
    "fcos_resnet50_fpn": Known("fcos", "resnet50", RESNET, 3),
    "retinanet_resnet50_fpn": Known("retinanet", "resnet50", RESNET, 3),
    "fasterrcnn_resnet50_fpn": Known("fasterrcnn", "resnet50", RESNET, 3),
    "fasterrcnn_mobilenet_v3_large_fpn": Known("fasterrcnn", "mobilenet_v3_large", MOBILENET, 3),
    "ssd300_vgg16": Known("ssd", "vgg16", VGG, 4, 300, (0.48235, 0.45882, 0.40784), (1 / 255,) * 3),
    "ssdlite320_mobilenet_v3_large": Known("ssdlite", "mobilenet_v3_large", MOBILENET, 6, 320, (0.5,) * 3, (0.5,) * 3),
}


@dataclass(frozen=True)
class Kind:
    """What a model's name says: its head, its backbone, and what torchvision knows of it (None: the backbone is timm's)."""

    head: str
    backbone: str
    known: Known | None

    @property
    def offset(self) -> int:
        """Return the head's own number of our class 0."""
        return 0 if self.head in FROM_ZERO else 1


def kind_of(model: str) -> Kind:
    """Return what a model's name says; raises InputError for one that is not known, with those that are."""
    if model in KNOWN:
        return Kind(KNOWN[model].head, KNOWN[model].network, KNOWN[model])
    head, _, backbone = model.partition(":")
    if head not in STRIDES or not backbone:
        raise InputError(
            f"unknown detector {model!r}{nearest(model, [*KNOWN, *STRIDES])} (one of: {', '.join(KNOWN)}; or HEAD:BACKBONE "
            f"with a head of {', '.join(STRIDES)} and a backbone of timm's that gives feature maps, e.g. fcos:resnet50)"
        )
    return Kind(head, backbone, None)


def canvas_of(setup: Setup) -> CanvasInput:
    """Return how a model's images are prepared: torchvision's own sizes; 320 px with a backbone of timm's.

    A long side is at most 5/3 of `image_size`, as torchvision's 1333 is of 800, unless `max_size` says another.
    """
    kind, training = kind_of(setup.model), setup.training
    assert isinstance(training, DetectOptions)
    square = kind.head in SQUARE
    short = setup.image_size or (kind.known.image_size if kind.known else 320)
    if square and training.max_size is not None:
        raise InputError(f"option max_size is {training.max_size}: {kind.head} squeezes images into a square of image_size")
    long = short if square else training.max_size or short * 5 // 3
    if long < short:
        raise InputError(f"option max_size is {long}: it must be at least image_size, {short}")
    for name in ("crop_pct", "crop_mode"):
        if getattr(setup, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} {getattr(setup, name)}: a detector sees whole images")
    return CanvasInput(short, long, square, setup.interpolation or "bilinear")


class Prepared(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's transform for images that have their size already: mean, std and padding only."""

    def resize(self, image: torch.Tensor, target: Any = None) -> tuple[torch.Tensor, Any]:
        """Return both as they are."""
        return image, target


def build_detector(setup: Setup, pretrained: bool) -> Any:
    """Return a detector with what is frozen frozen, on the CPU; see `Task.build`."""
    kind, training = kind_of(setup.model), setup.training
    assert isinstance(training, DetectOptions)
    backbone, mean, std = _known(kind, setup, pretrained) if kind.known else _timm(kind, setup, pretrained)
    if training.freeze_norm or (kind.known and "fpn" in setup.model and setup.weights != "random"):
        for name, module in backbone.named_modules():
            if PRETRAINED.match(f"backbone.{name}.") and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
    given = canvas_of(setup)
    model = _with_head(kind, backbone, len(setup.class_names) + kind.offset, given, training)
    mean, std = _three("mean", setup.mean or mean), _three("std", setup.std or std)
    model.transform = Prepared(given.short_px, given.long_px, list(mean), list(std), size_divisible=1 if given.square else 32)
    for module in _float32_after(model):
        module.register_forward_hook(_float32)
    return model


def _three(name: str, value: tuple[float, ...]) -> tuple[float, ...]:
    """Return a mean or std with a value for each channel; raises InputError for one that can't be."""
    if len(value) not in (1, 3):
        raise InputError(f"--{name} {','.join(map(str, value))} has {len(value)} values: give one, or one a channel")
    if not all(0 <= one <= 1 for one in value) or (name == "std" and 0 in value):
        raise InputError(f"--{name} {','.join(map(str, value))} must lie in 0..1{', above 0' if name == 'std' else ''}")
    return value * (3 // len(value))


def _known(kind: Kind, setup: Setup, pretrained: bool) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """Return torchvision's backbone of a detector, its mean and std."""
    known, training = kind.known, setup.training
    assert known is not None
    assert isinstance(training, DetectOptions)
    if setup.model_option:
        raise InputError(f"--model-option {setup.model_option[0]}: {setup.model} takes none (HEAD:BACKBONE does)")
    arguments = {"norm_layer": LITE_NORM} if known.head == "ssdlite" else {}
    body = torchvision_body(known.network, setup, pretrained, **arguments)
    trained = training.trainable_layers
    if trained is None:
        trained = len(known.stages) if setup.weights == "random" else known.trained
    freeze_below(body, known.stages, trained)
    return known_backbone(body, known.head, known.network), known.mean, known.std


def _timm(kind: Kind, setup: Setup, pretrained: bool) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """Return timm's backbone of a detector, its mean and std.

    `fpn_channels=64` among the model options is ours: a narrower feature pyramid, and head, than torchvision's 256, whose
    four convolutions a branch would cost many times what a small backbone does.
    """
    training = setup.training
    assert isinstance(training, DetectOptions)
    width = [option for option in setup.model_option if option.startswith("fpn_channels=")]
    channels = _channels(kind, width[-1]) if width else 256
    body = timm_body(kind.backbone, setup, pretrained, [option for option in setup.model_option if option not in width])
    stages: list[str] = body.feature_info.module_name()
    if training.trainable_layers is not None:
        freeze_below(body, stages, training.trainable_layers)
    backbone = TimmBackbone(body, kind.head, kind.backbone, channels)
    config = body.pretrained_cfg
    side = canvas_of(setup).short_px if kind.head in SQUARE else 128
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, side, side if kind.head in SQUARE else 160))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"backbone {kind.backbone!r} does not take images of any size, as {kind.head} gives: {error}"
        ) from error
    return backbone.train(), tuple(config["mean"]), tuple(config["std"])


def _channels(kind: Kind, option: str) -> int:
    """Return the width of a feature pyramid from `fpn_channels=N`."""
    value = option.partition("=")[2]
    if kind.head in SQUARE:
        raise InputError(f"--model-option {option}: {kind.head} has no feature pyramid")
    if not value.isdecimal() or int(value) == 0 or int(value) % 32:
        raise InputError(f"--model-option {option}: it takes a multiple of 32")
    return int(value)


def _with_head(kind: Kind, backbone: Any, classes: int, given: CanvasInput, training: DetectOptions) -> Any:
    """Return the detector, its thresholds set; `classes` counts the background where the head has one."""
    settings: dict[str, Any] = {
        "score_thresh": training.score_threshold,
        "nms_thresh": training.nms_threshold,
        "detections_per_img": training.max_boxes,
    }
    if kind.head == "fasterrcnn":
        settings = {f"box_{name}": value for name, value in settings.items()}
        if kind.backbone == "mobilenet_v3_large" and kind.known:  # torchvision's own: every size on each of three maps
            sizes = ((32, 64, 128, 256, 512),) * 3
            settings |= {
                "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
                "rpn_score_thresh": 0.05,
            }
        return FasterRCNN(backbone, classes, **settings)
    if kind.head == "fcos":
        return FCOS(backbone, classes, **settings)
    if kind.head == "retinanet":
        return RetinaNet(backbone, classes, **settings)
    size = (given.short_px, given.short_px)
    if kind.head == "ssd":
        steps = SSD_STEPS if kind.known and size == (300, 300) else None
        boxes = DefaultBoxGenerator(SSD_RATIOS, scales=SSD_SCALES, steps=steps)
        try:
            return SSD(backbone, boxes, size, classes, **settings)
        except RuntimeError as error:
            raise InputError(f"ssd300_vgg16 does not take images of {given.short_px} px: {first_line(error)}") from error
    boxes = DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
    widths = backbone.out_channels if isinstance(backbone, TimmBackbone) else [672, 960, 512, 256, 256, 128]
    head = SSDLiteHead(widths, boxes.num_anchors_per_location(), classes, LITE_NORM)
    return SSD(backbone, boxes, size, classes, head=head, topk_candidates=300, **settings)


def _float32_after(model: Any) -> list[nn.Module]:
    """Return the modules after which autocast ends: anchors and boxes would take the type of the maps and of the heads."""
    heads = [model.head] if hasattr(model, "head") else [model.rpn.head, model.roi_heads.box_predictor]
    return [model.backbone, *heads]


def _float32(module: nn.Module, given: Any, value: Any) -> Any:
    """Return a module's tensors, in whatever holds them, as float32."""
    if isinstance(value, torch.Tensor):
        return value.float()
    if isinstance(value, dict):
        return type(value)((name, _float32(module, given, inner)) for name, inner in value.items())
    return type(value)(_float32(module, given, inner) for inner in value)
