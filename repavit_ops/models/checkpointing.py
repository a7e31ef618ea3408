"""Blocks that keep no activations for the backward pass but compute them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_blocks(blocks: nn.Sequential, x: Tensor, again: bool) -> Tensor:
    """``blocks(x)``; with ``again``, where gradients are wanted, each block keeps its input alone."""
    if not (again and torch.is_grad_enabled()):
        return blocks(x)
    for block in blocks:
        x = run_block(block, x, again)
    return x


def run_block(block: nn.Module, x: Tensor, again: bool) -> Tensor:
    """``block(x)``, checkpointed like those of :func:`run_blocks`."""
    if not (again and torch.is_grad_enabled()):
        return block(x)
    out: Any = checkpoint(block, x, use_reentrant=False)
    return out
