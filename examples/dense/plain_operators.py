"""torchvision, with NMS and RoIAlign in plain PyTorch where its wheel and this PyTorch do not fit together.

torchvision's compiled operators belong to one build of PyTorch; beside another one (a PyTorch for CPUs, a torchvision
from PyPI) it neither finds them nor imports. What detectors need of them are these two.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STUB = "torchvision._meta_registrations"  # what asks for the compiled operators at import
ROIS_AT_ONCE = 128


def torchvision() -> Any:
    """torchvision, whole or with what stands here in the place of its compiled operators."""
    try:
        module = importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules[STUB] = types.ModuleType(STUB)
        module = importlib.import_module("torchvision")
    if not module.extension._has_ops():
        importlib.import_module("torchvision.ops.boxes").nms = nms
        importlib.import_module("torchvision.ops.poolers").roi_align = roi_align
    return module


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than a share of their union, best first.

    Shapes:
        boxes    [N, 4]  x1, y1, x2, y2
        scores   [N]
        returns  [kept]  int64
    """
    order = scores.argsort(descending=True, stable=True)
    corners = boxes[order]
    areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    left = torch.ones(len(corners), dtype=torch.bool, device=boxes.device)
    kept = []
    for index in range(len(corners)):
        if not left[index]:
            continue
        kept.append(index)
        rest = corners[index + 1 :]
        shared = (
            torch.minimum(corners[index, 2:], rest[:, 2:]) - torch.maximum(corners[index, :2], rest[:, :2])
        ).clamp(0)
        common = shared.prod(1)
        left[index + 1 :] &= common <= iou_threshold * (areas[index] + areas[index + 1 :] - common)
    return order[kept]


def roi_align(
    features: Tensor,
    boxes: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> Tensor:
    """Means of bilinear samples in each bin of each box (Mask R-CNN, section 3).

    Shapes:
        features  [B, C, H, W]
        boxes     [K, 5]  image, x1, y1, x2, y2 in pixels; times ``spatial_scale`` in those of the features
        returns   [K, C, *output_size]

    Raises:
        ValueError: ``sampling_ratio`` below 1, by which torchvision samples each box as densely as it is large.
    """
    if sampling_ratio < 1:
        raise ValueError(f"sampling_ratio: got {sampling_ratio}, wanted a number of samples along a bin")
    out = features.new_empty((len(boxes), features.shape[1], *output_size))
    for image in range(len(features)):
        for rows in (boxes[:, 0] == image).nonzero().flatten().split(ROIS_AT_ONCE):
            y, x = _samples(boxes[rows, 1:], output_size, spatial_scale, sampling_ratio, aligned)
            sampled = _bilinear(features[image], y, x)
            out[rows] = F.avg_pool2d(sampled.transpose(0, 1), sampling_ratio)
    return out


def _samples(
    boxes: Tensor, output_size: tuple[int, int], scale: float, ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Rows [K, ph · ratio] and columns [K, pw · ratio] at which boxes are sampled."""
    corners = boxes * scale - (0.5 if aligned else 0.0)
    sides = corners[:, 2:] - corners[:, :2]
    if not aligned:
        sides = sides.clamp(min=1.0)
    found = []
    for axis, bins in ((1, output_size[0]), (0, output_size[1])):
        steps = (torch.arange(bins * ratio, device=boxes.device) + 0.5) / (bins * ratio)
        found.append(corners[:, axis, None] + steps.to(boxes.dtype) * sides[:, axis, None])
    return found[0], found[1]


def _bilinear(features: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Features [C, H, W] where rows [K, h] and columns [K, w] cross: [C, K, h, w]; 0 more than a pixel outside."""
    height, width = features.shape[-2:]
    inside = ((y >= -1) & (y <= height)).unsqueeze(2) & ((x >= -1) & (x <= width)).unsqueeze(1)
    columns = x.unsqueeze(1).expand(-1, y.shape[1], -1) * (2 / max(width - 1, 1)) - 1
    rows = y.unsqueeze(2).expand(-1, -1, x.shape[1]) * (2 / max(height - 1, 1)) - 1
    grid = torch.stack((columns, rows), -1).flatten(0, 1).unsqueeze(0)
    sampled = F.grid_sample(features.unsqueeze(0), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return sampled[0].unflatten(1, y.shape) * inside
