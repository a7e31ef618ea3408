"""A run of fused blocks in one operator call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import stack_plan
from ..nn import Block, PartialGELUFFN, RepAttention, WindowRepAttention
from ..nn.foreign_block import FixedWindowBlock, MaskedBlock
from ..nn.plain_call import why_not_plain
from .route import Route, Routes, Segment, hooks_below, keep, run_traced, why_not_for, why_not_here

STEPS = (PartialGELUFFN, RepAttention, WindowRepAttention)
BLOCKS = (Block, MaskedBlock, FixedWindowBlock)  # mlp(attn(x)), called with x alone


def steps_of(block: nn.Module) -> list[Any] | None:
    """The sub-blocks that a child of a stack consists of, in order; None if it is anything else."""
    parts = [block.attn, block.mlp] if type(block) in BLOCKS else [block]
    return parts if all(type(part) in STEPS for part in parts) else None


class FusedStack(nn.Sequential):
    """The ``nn.Sequential`` of a model's blocks, in which runs of fused blocks go through one operator call each.

    Keys, indexing, iteration and every single block stay what they were: ``stack[i](x)``, hooks, gradients and autocast
    take the blocks one by one, as does any other device than the CPU (:meth:`why_apart` says why). The result is the
    same, bit for bit.

    Shapes:
        x, returns  [B, T, C]   or [B, H, W, C] for windowed blocks
    """

    def __init__(self, *blocks: Any) -> None:
        super().__init__(*blocks)
        self._routes: Routes = {}

    @classmethod
    def replacing(cls, blocks: nn.Sequential) -> FusedStack:
        """A stack of the very children of ``blocks``, under their names and with the container's own hooks."""
        stack = cls()
        stack.__dict__.update(blocks.__dict__)
        return stack

    def why_apart(self, x: Tensor | None = None) -> str | None:
        """Why the blocks run one by one (for input ``x``, where given), in one line; None if in one call."""
        steps = [part for _, parts in self._runs() if parts is not None for part in parts]
        if not steps:
            return "no two of its blocks are fused and follow each other"
        if any(hooks_below(self)):
            return "a block has forward hooks"
        like = getattr(steps[0], steps[0].packed_names[0]) if x is None else x
        if (reason := why_not_here(steps, like)) is not None or x is None:
            return reason
        return why_not_plain(self, x)

    def has_no_run(self) -> bool:
        """Whether no two fused blocks follow each other, so that there is nothing to do in one call."""
        return all(parts is None for _, parts in self._runs())

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x) if self.why_apart(x) else run_traced(x, self._segments(x))
        route = self._route(x)
        if route is None or why_not_plain(self, x) is not None:
            return super().forward(x)
        return route.run(x)

    def _runs(self) -> Iterator[tuple[nn.Module, list[Any] | None]]:
        """Children in order: of a run of at least two fused ones the first and all their steps, else one and None."""
        run: list[tuple[nn.Module, list[Any]]] = []
        for child in [*self, None]:
            parts = None if child is None else steps_of(child)
            if parts is not None:
                run.append((child, parts))
                continue
            if len(run) > 1:
                yield run[0][0], [part for _, parts in run for part in parts]
            elif run:
                yield run[0][0], None
            if child is not None:
                yield child, None
            run = []

    def _route(self, x: Tensor) -> Route | None:
        if why_not_for(x) is not None:
            return None
        key = (x.device, x.dtype, *x.shape[1:-1])
        route = self._routes.get(key)
        if route is None or not route.holds():
            if self.why_apart(x) is not None:
                return None
            route = keep(self._routes, key, Route.of(self, self._segments(x)))
        return route

    def _segments(self, x: Tensor) -> list[Segment]:
        size = x.shape[1:-1]
        return [
            block if parts is None else stack_plan.encode(part.step(size) for part in parts)
            for block, parts in self._runs()
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_routes": {}}
