"""From a network's maps to those that a detector's head takes: feature pyramids, and SSD's further maps."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import Conv2dNormActivation

from engine.schema import InputError

LITE_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
"""Batch norm of SSDlite, as torchvision has it."""

STRIDES = {
    "fcos": (8, 16, 32),
    "retinanet": (8, 16, 32),
    "fasterrcnn": (4, 8, 16, 32),
    "ssd": (8, 16, 32),
    "ssdlite": (16, 32),
}
"""Strides of the network's maps that each head takes."""

FURTHER = {"ssd": (512, 256, 256), "ssdlite": (512, 256, 256, 128)}
"""Channels of the maps that SSDs put on top, each of half the side of the one below: six maps in all."""


class TimmBackbone(nn.Module):
    """timm's network with a feature pyramid or SSD's further maps: images -> maps by name, finest first."""

    def __init__(self, body: Any, head: str, name: str, channels: int) -> None:
        super().__init__()
        self.body = body
        self.last = getattr(body, "output_fmt", None) == "NHWC"
        strides: list[int] = body.feature_info.reduction()
        wanted = STRIDES[head]
        if not set(wanted) <= set(strides):
            raise InputError(
                f"backbone {name!r} gives maps of strides {', '.join(map(str, strides))}: {head} takes "
                f"{', '.join(map(str, wanted))}"
            )
        self.taken = [strides.index(stride) for stride in wanted]
        widths = [body.feature_info.channels()[at] for at in self.taken]
        self.out_channels: Any
        if head in FURTHER:
            block = _lite_block if head == "ssdlite" else _plain_block
            self.out_channels = [*widths, *FURTHER[head]]
            below = self.out_channels[len(widths) - 1 : -1]
            self.further = nn.ModuleList(block(low, high) for low, high in zip(below, FURTHER[head], strict=True))
            self.fpn = None
        else:
            self.out_channels = channels
            self.further = nn.ModuleList()
            self.fpn = FeaturePyramidNetwork(widths, channels, _top(head, channels))

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Return the maps of (r, 3, height, width) images."""
        maps = self.body(images)
        taken = [maps[at].permute(0, 3, 1, 2) if self.last else maps[at] for at in self.taken]
        for block in self.further:
            taken.append(block(taken[-1]))
        named = OrderedDict((str(at), found) for at, found in enumerate(taken))
        return named if self.fpn is None else self.fpn(named)


def _top(head: str, channels: int) -> Any:
    """Return what a pyramid has above its coarsest map."""
    return LastLevelMaxPool() if head == "fasterrcnn" else LastLevelP6P7(channels, channels)


def _lite_block(low: int, high: int) -> nn.Module:
    """Return a block of SSDlite (Sandler et al., 2018, section 6.2): 1x1, 3x3 depthwise of stride 2, 1x1."""
    middle = high // 2
    layer = partial(Conv2dNormActivation, norm_layer=LITE_NORM, activation_layer=nn.ReLU6)
    block = nn.Sequential(
        layer(low, middle, kernel_size=1),
        layer(middle, middle, kernel_size=3, stride=2, groups=middle),
        layer(middle, high, kernel_size=1),
    )
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.03)
    return block


def _plain_block(low: int, high: int) -> nn.Module:
    """Return a block of SSD (Liu et al., 2016): 1x1, 3x3 of stride 2."""
    block = nn.Sequential(
        nn.Conv2d(low, high // 2, kernel_size=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(high // 2, high, kernel_size=3, padding=1, stride=2),
        nn.ReLU(inplace=True),
    )
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return block


def known_backbone(body: Any, head: str, network: str) -> Any:
    """Return torchvision's own network with the maps that its detector of that name takes."""
    if head == "ssd":
        return SSDFeatureExtractorVGG(body, highres=False)
    if head == "ssdlite":
        return SSDLiteFeatureExtractorMobileNet(body, 13, LITE_NORM)  # the last block of stride 2
    if network == "mobilenet_v3_large":
        return BackboneWithFPN(body, {"13": "0", "16": "1"}, [160, 960], 256, LastLevelMaxPool())
    levels = (1, 2, 3, 4) if head == "fasterrcnn" else (2, 3, 4)
    layers = {f"layer{level}": str(at) for at, level in enumerate(levels)}
    return BackboneWithFPN(body, layers, [128 << level for level in levels], 256, _top(head, 256))
