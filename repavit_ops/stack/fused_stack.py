"""A sequence of fused blocks in one operator call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.plain_call import why_not_plain
from ..nn.symbolic import is_proxy
from .block_runs import BlockRuns
from .route import run_traced


class FusedStack(BlockRuns, nn.Sequential):
    """The ``nn.Sequential`` of a model's blocks, in which runs of fused blocks go through one operator call each.

    Keys, indexing, iteration and every single block stay what they were: ``stack[i](x)``, hooks, gradients and autocast
    take the blocks one by one, as does any other device than the CPU (:meth:`why_apart` says why). The result is the
    same, bit for bit.

    Shapes:
        x, returns  [B, T, C]   or [B, H, W, C] for windowed blocks
    """

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        self._routes = {}

    @classmethod
    def replacing(cls, blocks: nn.Sequential) -> FusedStack:
        """A stack of the very children of ``blocks``, under their names and with the container's own hooks."""
        stack = cls()
        stack.__dict__.update(blocks.__dict__)
        return stack

    def forward(self, x: Tensor) -> Tensor:
        if is_proxy(x):
            return super().forward(x)
        if torch.compiler.is_compiling():
            return super().forward(x) if self.why_apart(x) else run_traced(x, self._segments(x))
        route = self._route(x)
        if route is None or why_not_plain(self, x) is not None:
            return super().forward(x)
        return route.run(x)
