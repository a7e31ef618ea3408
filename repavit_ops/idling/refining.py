"""A few gradient steps on one solved block: on the rows of W2 too, which no least squares reaches."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn import PartialGELUFFN
from .rates import adam, set_rates

TOKENS = 65_536  # of a sample behind a closed form
ROWS = 1_024  # tokens of a step
LR = 0.03  # behind a closed form
WARMUP = 0.1  # share of the steps until then


class Sample:
    """Tokens of one block, as many of every image: what its FFN is given, and what it should make of that.

    Args:
        images: how many will come. tokens: kept in memory at most, while there are fewer images than that.
    """

    def __init__(self, images: int, tokens: int = TOKENS) -> None:
        self.per_image = max(1, tokens // images)
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
def refine(ffn: PartialGELUFFN, sample: Sample, root: Tensor, steps: int, seed: int, lr: float = LR) -> Refined:
    """Adam on every weight of a deployed FFN, towards the goal of ``sample``. The module that is given stays.

    Args:
        ffn: of :func:`repavit_ops.idling.solving.solve_ffn`, in plain PyTorch. root: R [C, C]; an error δ costs |δ R|².
        steps: 0 changes nothing; neither does any number where no hidden channel is active, for the closed form is the
            optimum then.
        seed: of the tokens that each step sees.
        lr: the highest learning rate, as a share of a weight's root mean square.
    """
    if steps == 0 or ffn.act_channels == 0:
        return Refined(ffn, float("nan"))
    dtype = torch.promote_types(ffn.w_in.dtype, torch.float32)
    x, goal = (torch.cat(parts).to(dtype) for parts in (sample.inside, sample.goal))
    root = root.to(x)
    energy = ((goal - x) @ root).square().sum(dim=1).mean().clamp_min(1e-30)
    student = copy.deepcopy(ffn).to(dtype)
    optimizer = adam(student.requires_grad_().parameters())
    generator, losses = torch.Generator().manual_seed(seed), list[float]()
    for step in range(steps):
        set_rates(optimizer, lr, step / steps, WARMUP)
        rows = torch.randint(len(x), (min(ROWS, len(x)),), generator=generator).to(x.device)
        loss = ((student(x[rows]) - goal[rows]) @ root).square().sum(dim=1).mean() / energy
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return Refined(student.to(ffn.w_in.dtype).requires_grad_(ffn.w_in.requires_grad), sum(last) / len(last))
