"""Adam whose learning rates are shares of each weight's size: up linearly, then down as a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

BETAS = (0.9, 0.98)
SMALLEST = 1e-3  # a weight of a lower root mean square, a bias of zeros, say, steps as if it had this one


def adam(weights: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW without weight decay; each group is one weight, and its ``scale`` that weight's root mean square."""
    sizes = [(w, w.detach().float().square().mean().sqrt().item()) for w in weights if w.numel()]
    groups = [{"params": [w], "scale": max(size, SMALLEST)} for w, size in sizes]
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)


def set_rates(optimizer: torch.optim.Optimizer, share: float, done: float, warmup: float) -> None:
    """The rates of :func:`adam`'s weights when ``done`` of the training lies behind; ``share`` is the highest."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["scale"] * rate(done, warmup)


def rate(done: float, warmup: float) -> float:
    """Share of the highest learning rate when ``done`` of the training lies behind: linear, then a cosine to 0."""
    if done < warmup:
        return (done + 0.01) / (warmup + 0.01)
    return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / max(1 - warmup, 1e-9))
