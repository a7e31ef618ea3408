"""The three models of RePaViT's Table 6 around a Swin of this library: RetinaNet, Mask R-CNN, UperNet.

Heads and feature pyramid are torchvision's and transformers' own. Their weights are random ones of a seed, as wide as
trained ones are: nothing here is trained, so what they detect means nothing, and only who computes it is compared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import plain_operators
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repavit_ops

CLASSES = {"retinanet": 91, "mask_rcnn": 91, "upernet": 150}  # COCO's with the background, ADE20K's
SIZES = {"retinanet": (800, 1333), "mask_rcnn": (800, 1333), "upernet": (512, 2048)}  # of the paper
FPN_CHANNELS, HEAD_CHANNELS = 256, 512


class SwinMaps(nn.Module):
    """A Swin's maps in front of each merging, each through a LayerNorm of its own, as Swin's detectors have them.

    Shapes:
        x        [B, 3, H, W]
        returns  a map [B, C · 2^s, ⌈H/(4 · 2^s)⌉, ⌈W/(4 · 2^s)⌉] for each stage s asked for, by its number
    """

    def __init__(self, body: nn.Module, stages: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.body, self.stages = body, tuple(stages)
        info: Any = body.feature_info
        self.channels = [info[stage]["num_chs"] for stage in self.stages]
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        body: Any = self.body
        maps = body.forward_intermediates(x, self.stages, output_fmt="NHWC", intermediates_only=True)
        normed = (norm(each).permute(0, 3, 1, 2) for norm, each in zip(self.norms, maps, strict=True))
        return OrderedDict((str(stage), each) for stage, each in zip(self.stages, normed, strict=True))


class Pyramid(nn.Module):
    """A Swin's maps through torchvision's feature pyramid, with one or two levels more on top."""

    def __init__(self, maps: SwinMaps, extra: nn.Module) -> None:
        super().__init__()
        ops = plain_operators.torchvision().ops
        self.out_channels = FPN_CHANNELS
        self.maps = maps
        self.fpn = ops.FeaturePyramidNetwork(maps.channels, FPN_CHANNELS, extra_blocks=extra)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        out: OrderedDict[str, Tensor] = self.fpn(self.maps(x))
        return out


class UperNet(nn.Module):
    """transformers' UperNet head over a Swin's maps: class logits [B, classes, H, W] of every pixel."""

    def __init__(self, maps: SwinMaps, classes: int) -> None:
        super().__init__()
        plain_operators.torchvision()  # transformers imports it
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetHead

        self.maps = maps
        self.head = UperNetHead(UperNetConfig(hidden_size=HEAD_CHANNELS, num_labels=classes), maps.channels)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(list(self.maps(x).values()))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


def build(name: str, body: nn.Module, classes: int | None = None, **arguments: Any) -> nn.Module:
    """One of the three models, untrained and in evaluation mode, around a Swin without a classifier.

    Args:
        name: "retinanet", "mask_rcnn" or "upernet".
        body: the Swin.
        classes: default COCO's or ADE20K's.
        arguments: of torchvision's RetinaNet or MaskRCNN.

    Raises:
        ValueError: another name.
    """
    if name not in CLASSES:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(CLASSES)}")
    count = CLASSES[name] if classes is None else classes
    if name == "upernet":
        return untrained(UperNet(SwinMaps(body), count))
    vision = plain_operators.torchvision()
    detection, pyramids = vision.models.detection, vision.ops.feature_pyramid_network
    arguments = {"_skip_resize": True, **arguments}  # images come in the size that they are given in
    if name == "mask_rcnn":
        backbone = Pyramid(SwinMaps(body), pyramids.LastLevelMaxPool())
        return untrained(detection.MaskRCNN(backbone, count, **arguments))
    top = pyramids.LastLevelP6P7(FPN_CHANNELS, FPN_CHANNELS)
    backbone = Pyramid(SwinMaps(body, (1, 2, 3)), top)
    sizes = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in (32, 64, 128, 256, 512))
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return untrained(detection.RetinaNet(backbone, count, anchor_generator=anchors, **arguments))


def maps_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the heads of a model are given: the maps of its feature pyramid, or of its Swin for UperNet."""
    source: Any = model.maps if isinstance(model, UperNet) else model.backbone
    return list(source(images).values())


@torch.no_grad()
def untrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that keep the scale of what passes, and BatchNorm statistics as training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def backbone(name: str, **arguments: Any) -> nn.Module:
    """A Swin of this library without its classifier."""
    return repavit_ops.create_model(name, num_classes=0, **arguments)
