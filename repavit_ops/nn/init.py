"""Weight initialisation of parameters that stand outside an ``nn.Linear``."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def linear_init_(weight: Tensor, bias: Tensor | None) -> None:
    """Fill weight [..., out, in] and bias as ``nn.Linear`` does: uniform in ±1/√in. Sizes of 0 are left as they are."""
    bound = 1 / math.sqrt(weight.shape[-1]) if weight.shape[-1] else 0.0
    weight.uniform_(-bound, bound)
    if bias is not None:
        bias.uniform_(-bound, bound)
