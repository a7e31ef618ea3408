"""Runs of fused blocks in a container: which children form one, and the route by which they go through one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .. import cpu_tuning
from ..nn import Block, GatedFFN, PartialGELUFFN, RepAttention, WindowRepAttention
from ..nn.foreign_block import FixedWindowBlock, MaskedBlock
from ..nn.foreign_signatures import SignatureBlock
from ..nn.plain_call import why_not_plain
from ..nn.recorders import acts
from ..nn.stand_in import own_class
from .pytorch_run import runs
from .route import Route, Routed, Segment, hooks_below, keep, why_not_for, why_not_here

STEPS = (PartialGELUFFN, GatedFFN, RepAttention, WindowRepAttention)
# called with x alone these are mlp(attn(x))
BLOCKS = (Block, MaskedBlock, FixedWindowBlock)


def steps_of(block: nn.Module) -> list[Any] | None:
    """The sub-blocks that a child of a stack consists of, in order; None if it is anything else."""
    halves = own_class(block) in BLOCKS or isinstance(block, SignatureBlock)
    parts: list[Any] = [block.attn, block.mlp] if halves else [block]
    return parts if all(type(part) in STEPS for part in parts) else None


class BlockRuns(Routed):
    """Base of the containers whose blocks run in few calls; a subclass is one of PyTorch's containers, too."""

    def why_apart(self, x: Tensor | None = None) -> str | None:
        """Why the blocks run one by one (for input ``x``, where given), in one line; None if in one call."""
        steps = [part for _, parts in self._runs() if parts is not None for part in parts]
        if not steps:
            return "no two of its blocks are fused and follow each other"
        if any(map(acts, hooks_below(self))):
            return "a block has forward hooks"
        if all(part.choice is not None and part.choice.kernel_never for part in steps):
            return "its blocks are left to PyTorch on this CPU"
        like = getattr(steps[0], steps[0].packed_names[0]) if x is None else x
        if (reason := why_not_here(steps, like)) is not None or x is None:
            return reason
        return why_not_plain(self, x)

    def has_no_run(self) -> bool:
        """Whether no two fused blocks follow each other, so that there is nothing to do in one call."""
        return all(parts is None for _, parts in self._runs())

    def _runs(self) -> Iterator[tuple[nn.Module, list[Any] | None]]:
        """Children in order: of a run of at least two fused ones the first and all their steps, else one and None."""
        run: list[tuple[Any, list[Any]]] = []
        for child in [*self._modules.values(), None]:
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
        key = (x.device, x.dtype, cpu_tuning.batch_class(x.shape[0]), *x.shape[1:-1])
        route = self._routes.get(key)
        if route is None or not route.holds():
            if self.why_apart(x) is not None:
                return None
            route = keep(self._routes, key, Route.of(self, self._segments(x)))
        return route

    def _segments(self, x: Tensor) -> list[Segment]:
        size = x.shape[1:-1]
        segments: list[Segment] = []
        for block, parts in self._runs():
            segments += [block] if parts is None else runs((part.step(size) for part in parts), x)
        return segments
