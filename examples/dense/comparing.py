"""How far two models agree: the tolerance rule for what is computed, pairs of boxes for what is then chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Detections = dict[str, Tensor]
PIXELS, SCORE, MASK = 0.05, 1e-3, 1e-2  # within which two boxes are one: corners, score, mask


class Agreement(NamedTuple):
    """Boxes of the reference, those that the other has too, and how far these are apart at most."""

    boxes: int
    found: int
    pixels: float
    score: float
    mask: float


def error_over_eager(ours: list[Tensor], eager: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error of ours over that of eager PyTorch, both against float64; at most 2 is equal."""
    errors = [
        max((a.double() - t).abs().max().item() for a, t in zip(found, truth, strict=True)) for found in (ours, eager)
    ]
    return errors[0] / max(errors[1], 1e-12)


def agreement(reference: Detections, other: Detections) -> Agreement:
    """Pair the boxes of two lists: each with the nearest of its label, within ``PIXELS``, ``SCORE`` and ``MASK``.

    NMS chooses, so two boxes whose scores are closer than rounding may change places, or one take the other's: which is
    why boxes are paired, and why some may be missing where all scores are about the same, as an untrained head's are.
    """
    pixels, score, mask, taken = 0.0, 0.0, 0.0, set[int]()
    for index, box in enumerate(reference["boxes"]):
        apart = (other["boxes"] - box).abs().amax(1)
        apart[other["labels"] != reference["labels"][index]] = torch.inf
        apart[list(taken)] = torch.inf
        nearest = int(apart.argmin()) if len(apart) else -1
        if nearest < 0 or apart[nearest] > PIXELS:
            continue
        scores = (other["scores"][nearest] - reference["scores"][index]).abs().item()
        masks = (other["masks"][nearest] - reference["masks"][index]).abs().max().item() if "masks" in other else 0.0
        if scores > SCORE or masks > MASK:
            continue
        taken.add(nearest)
        pixels, score, mask = max(pixels, apart[nearest].item()), max(score, scores), max(mask, masks)
    return Agreement(len(reference["boxes"]), len(taken), pixels, score, mask)
