"""A run of fused blocks in one operator call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .. import backends, stack_plan
from .block import Block
from .foreign_block import FixedWindowBlock, MaskedBlock
from .packed_weights import PACKABLE, PackedWeights
from .partial_gelu_ffn import PartialGELUFFN
from .rep_attention import RepAttention
from .window_rep_attention import WindowRepAttention

STEPS = (PartialGELUFFN, RepAttention, WindowRepAttention)
BLOCKS = (Block, MaskedBlock, FixedWindowBlock)  # mlp(attn(x)), called with x alone


def steps_of(block: nn.Module) -> list[Any] | None:
    """The sub-blocks that a child of a stack consists of, in order; None if it is anything else."""
    parts = [block.attn, block.mlp] if type(block) in BLOCKS else [block]
    return parts if all(type(part) in STEPS for part in parts) else None


Segment = nn.Module | stack_plan.Plan  # a block by itself, or a run of blocks in one call


@dataclass(frozen=True)
class _Route:
    """How a stack runs on inputs of one kind, and what must still be as it was for that to hold."""

    segments: list[Segment]
    entries: tuple[tuple[dict[str, Any], str, Any], ...]  # dict[key] is value: children, parameters, packed copies
    sizes: tuple[tuple[dict[str, Any], int], ...]  # len(dict): no parameter where there was none
    versions: tuple[tuple[Tensor, int], ...]
    hooks: tuple[dict[int, Any], ...]  # all empty

    def holds(self) -> bool:
        return (
            all(d.get(key) is value for d, key, value in self.entries)
            and all(len(d) == size for d, size in self.sizes)
            and all(tensor._version == version for tensor, version in self.versions)
            and not any(self.hooks)
        )


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
        self._routes: dict[tuple[Any, ...], _Route] = {}

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
        if any(_hooks(self)):
            return "a block has forward hooks"
        if any(part.backend not in ("auto", "cpp") for part in steps) or backends.why_unavailable("cpp") is not None:
            return "its blocks do not run on the C++ kernels"
        tensor = steps[0].get_parameter(steps[0].packed_names[0]) if x is None else x
        if tensor.device.type != "cpu":
            return f"one call is for the CPU; on {tensor.device.type} every sub-block is called by itself"
        if tensor.dtype not in PACKABLE:
            return f"there is no kernel for {tensor.dtype}"
        return None if x is None else self._why_not_now(x)

    def has_no_run(self) -> bool:
        """Whether no two fused blocks follow each other, so that there is nothing to do in one call."""
        return all(parts is None for _, parts in self._runs())

    def forward(self, x: Tensor) -> Tensor:
        route = self._route(x)
        if route is None or self._why_not_now(x) is not None:
            return super().forward(x)
        for segment in route.segments:
            if isinstance(segment, nn.Module):
                x = segment(x)
            else:
                weights, plan, scalars = segment
                x = torch.ops.repavit_ops.fused_blocks(x, weights, plan=plan, scalars=scalars)
        return x

    def _why_not_now(self, x: Tensor) -> str | None:
        """What can change from call to call and is not of the stack itself."""
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return "there are global forward hooks"
        if torch.jit.is_tracing():
            return "the model is traced"
        if torch.is_autocast_enabled("cpu"):
            return "autocast chooses the dtype of each operator"
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return "gradients are wanted: call it under torch.no_grad() or torch.inference_mode()"
        if backends.in_forward_mode():
            return "forward-mode derivatives are wanted"
        return None

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

    def _route(self, x: Tensor) -> _Route | None:
        if torch.compiler.is_compiling():
            return None if self.why_apart(x) else _Route(self._segments(x), (), (), (), ())
        key = (x.device, x.dtype, *x.shape[1:-1])
        route = self._routes.get(key)
        if route is None or not route.holds():
            if self.why_apart(x) is not None:
                return None
            segments = self._segments(x)
            self._routes[key] = route = _Route(segments, _entries(self), _sizes(self), _versions(self), _hooks(self))
        return route

    def _segments(self, x: Tensor) -> list[Segment]:
        size = x.shape[1:-1]
        return [
            block if parts is None else stack_plan.encode(part.step(size) for part in parts)
            for block, parts in self._runs()
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_routes": {}}


def _entries(stack: nn.Module) -> tuple[tuple[dict[str, Any], str, Any], ...]:
    entries: list[tuple[dict[str, Any], str, Any]] = []
    for module in stack.modules():
        entries += [(module._modules, name, child) for name, child in module._modules.items()]
        entries += [(module._parameters, name, value) for name, value in module._parameters.items()]
        if isinstance(module, PackedWeights):
            entries += [(module.__dict__, name, module.__dict__[name]) for name in ("_packed", "backend")]
    return tuple(entries)


def _sizes(stack: nn.Module) -> tuple[tuple[dict[str, Any], int], ...]:
    return tuple((module._parameters, len(module._parameters)) for module in stack.modules())


def _versions(stack: nn.Module) -> tuple[tuple[Tensor, int], ...]:
    return tuple((p, p._version) for p in stack.parameters() if not p.is_inference())


def _hooks(stack: nn.Module) -> tuple[dict[int, Any], ...]:
    below = [module for module in stack.modules() if module is not stack]
    return tuple(hooks for module in below for hooks in (module._forward_hooks, module._forward_pre_hooks))
