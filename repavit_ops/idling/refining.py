"""A few gradient steps on one solved block: on the rows of W2 too, which no least squares reaches."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn import PartialGELUFFN
from .distillation import BETAS, rate

TOKENS = 65_536  # kept in memory at most, while there are fewer images than that
ROWS = 1_024  # tokens of a step
STEP = 0.03  # the highest learning rate, as a share of a weight's root mean square
WARMUP = 0.1  # share of the steps until then


class Sample:
    """Tokens of one block, as many of every image: what its FFN is given, and what it should make of that.

    Args:
        images: how many will come.
    """

    def __init__(self, images: int) -> None:
        self.per_image = max(1, TOKENS // images)
        self.inside, self.goal = list[Tensor](), list[Tensor]()

    def add(self, inside: Tensor, goal: Tensor) -> None:
        """Take evenly spaced tokens of every image; both are [B, t, C]."""
        count = min(self.per_image, inside.shape[1])
        chosen = torch.linspace(0, inside.shape[1] - 1, count, device=inside.device).round().long()
        self.inside.append(inside[:, chosen].flatten(0, 1))
        self.goal.append(goal[:, chosen].flatten(0, 1))


class Refined(NamedTuple):
    """The module after the steps, and what share of the targets' energy it left unexplained in the last tenth."""

    ffn: PartialGELUFFN
    loss: float


@torch.enable_grad()
def refine(ffn: PartialGELUFFN, sample: Sample, steps: int, seed: int) -> Refined:
    """Adam on every weight of a deployed FFN, towards the goal of ``sample``. The module that is given stays.

    The learning rate of a weight is a share of its root mean square, so that no model needs rates of its own; it rises
    linearly, then falls as a cosine.

    Args:
        ffn: of :func:`repavit_ops.idling.solving.solve_ffn`, in plain PyTorch. steps: 0 changes nothing; neither does
            any number where no hidden channel is active, for the closed form is the optimum then.
        seed: of the tokens that each step sees.
    """
    if steps == 0 or ffn.act_channels == 0:
        return Refined(ffn, float("nan"))
    dtype = torch.promote_types(ffn.w_in.dtype, torch.float32)
    x, goal = (torch.cat(parts).to(dtype) for parts in (sample.inside, sample.goal))
    energy = (goal - x).square().sum(dim=1).mean().clamp_min(1e-30)
    student = copy.deepcopy(ffn).to(dtype)
    weights = [p.requires_grad_() for p in student.parameters() if p.numel()]
    scales = [STEP * w.detach().square().mean().sqrt().item() for w in weights]
    optimizer = torch.optim.Adam([{"params": [w]} for w in weights], betas=BETAS)
    generator, losses = torch.Generator().manual_seed(seed), list[float]()
    for step in range(steps):
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = scale * rate(step / steps, WARMUP)
        rows = torch.randint(len(x), (min(ROWS, len(x)),), generator=generator).to(x.device)
        loss = (student(x[rows]) - goal[rows]).square().sum(dim=1).mean() / energy
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return Refined(student.to(ffn.w_in.dtype).requires_grad_(ffn.w_in.requires_grad), sum(last) / len(last))
