"""A whole classifier in one operator call: what its parts are as steps of ``fused_blocks``, and why they may not be.

At batch 1 a small model's blocks take a few milliseconds, in which its weights push everything else out of the caches;
each call from Python behind them then costs about 0.1 ms, ten times what it costs alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import cpu_tuning, reference
from ..nn import PatchConv2d, PatchProjection
from ..nn.packed_weights import PackedWeights
from ..nn.plain_call import why_not_plain
from ..nn.recorders import acts
from ..nn.symbolic import is_proxy
from ..stack_plan import Step
from .block_runs import steps_of
from .pytorch_run import PyTorchRun, runs
from .route import Route, Routed, Segment, hooks_below, keep, why_not_for, why_not_here

SPOKEN_FOR = ("embed", "forward_features", "pool", "forward_head")  # what steps() does in a forward's place


class Apart(Exception):
    """Why a part cannot be a step, in one line."""


class OneCall(Routed):
    """A model that knows its :meth:`steps`, and when a forward must not take them.

    Attributes:
        in_one_call: whether to try; :func:`repavit_ops.fuse` sets it.
    """

    global_pool: str

    def __init__(self) -> None:
        super().__init__()
        self.in_one_call = False
        self._routes = {}

    def steps(self, x: Tensor) -> list[Step]:
        """The model on images like ``x`` as steps of one call.

        Raises:
            Apart: some part cannot be one; says which.
        """
        raise Apart(f"{type(self).__name__} knows no steps")

    def own_image(self) -> Tensor:
        """An image of the size that the model was built for, its values of no matter."""
        raise Apart(f"{type(self).__name__} does not say for which images it was built")

    def why_apart(self, x: Tensor | None = None) -> str | None:
        """Why a fused model takes more than one call (for images like ``x``, where given), in one line; None if one."""
        try:
            self._segments(self.own_image() if x is None else x)
        except Apart as apart:
            return str(apart)
        return None if x is None else self._why_not_now(x)

    def route(self, x: Tensor) -> Route | None:
        """How to run on ``x`` in one call; None where it must be part by part."""
        if not self.in_one_call or is_proxy(x) or torch.compiler.is_compiling():
            return None
        if why_not_for(x) is not None or self._why_not_now(x) is not None:
            return None
        key = (x.dtype, cpu_tuning.batch_class(x.shape[0]), x.shape[1:], self.global_pool)
        route = self._routes.get(key)
        if route is None or not route.holds():
            try:
                segments = self._segments(x)
            except Apart:
                segments = []  # part by part, as long as nothing changes
            route = keep(self._routes, key, Route.of(self, segments))
        return route if route.calls else None

    def _segments(self, x: Tensor) -> list[Segment]:
        fused = [module for module in self.modules() if isinstance(module, PackedWeights)]
        if not fused:
            raise Apart("no block is fused")
        if any(map(acts, hooks_below(self))):
            raise Apart("a part has forward hooks")
        if (reason := self._overridden() or why_not_here(fused, x)) is not None:
            raise Apart(reason)
        if x.dim() != 4 or x.dtype != next(self.parameters()).dtype:
            raise Apart(f"x is {x.dtype} {list(x.shape)}, wanted images in the weights' dtype")
        with torch.no_grad():
            steps = self.steps(x)
        if not any(module.backend == "auto" for module in fused):
            steps = [replace(step, pytorch=()) for step in steps]
        segments: list[Segment] = [*runs(steps, x)]
        if len(segments) == 1 and isinstance(segments[0], PyTorchRun):
            raise Apart("all of it is left to PyTorch on this CPU")
        return segments

    def _overridden(self) -> str | None:
        owner = next(c for c in type(self).__mro__ if "steps" in c.__dict__)
        for name in SPOKEN_FOR:
            if getattr(type(self), name, None) is not getattr(owner, name, None):
                return f"{type(self).__name__} has a {name} of its own"
        return None

    def _why_not_now(self, x: Tensor) -> str | None:
        """What can change from call to call."""
        for name in SPOKEN_FOR:
            if name in self.__dict__:
                return f"it has a {name} of its own"
        return why_not_plain(self, x)


def patch_grid(patch_embed: nn.Module, kind: type[nn.Module], x: Tensor, patch: int) -> tuple[int, int]:
    """Patches down and across in images like ``x``."""
    height, width = x.shape[2:]
    if type(patch_embed) is not kind or height % patch or width % patch or not height or not width:
        raise Apart("the patch embedding is more than a projection of whole patches")
    return height // patch, width // patch


def embedding(
    conv: nn.Module,
    images: Tensor,
    *,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    norm: nn.Module | None = None,
    as_map: bool = False,
) -> Step:
    """Patches of images like these, prefix tokens [.., P, C], position [.., P + h·w, C] and the norm behind them.

    They are parameters as the model has them, not views, which would not follow a parameter to other memory.
    """
    if type(conv) is not PatchConv2d:
        raise Apart(f"the patch embedding is a {type(conv).__name__}, no projection of patches")
    weight, bias, eps = _layer_norm(norm)
    packed, (matrix,) = conv.current()
    static = {"patch": (conv.kernel_size[0], conv.kernel_size[1]), "as_map": as_map, "norm_eps": eps}
    step = Step("token_embedding", (matrix, conv.bias, prefix, position, weight, bias), static, packed)
    return _chosen(step, images.shape[1:]) if conv.backend == "auto" and not conv.stands_alone else step


def blocks(parts: nn.Module, size: Sequence[int]) -> list[Step]:
    """All blocks of a container on tokens or maps of ``size``."""
    steps: list[Step] = []
    for name, block in parts.named_children():
        if (halves := steps_of(block)) is None:
            raise Apart(f"block {name} is not fused")
        steps += [half.step(size) for half in halves]
    return steps


def merging(module: nn.Module, size: tuple[int, int]) -> tuple[Step, tuple[int, int]]:
    """A patch merging of maps of ``size``, and the size of its result."""
    if type(module) is not PatchProjection:
        raise Apart("a patch merging is not fused")
    if any(side % edge for side, edge in zip(size, module.patch, strict=True)):
        raise Apart(f"maps of {size[0]}x{size[1]} are padded before they are merged")
    return module.step(size), (size[0] // module.patch[0], size[1] // module.patch[1])


def head(norm: nn.Module, linear: nn.Module, size: Sequence[int], *, first: int, count: int) -> Step:
    """The mean of ``count`` normed tokens (0: all the rest) from ``first`` on, and the head; tokens of ``size``."""
    if type(linear) not in (nn.Linear, nn.Identity):
        raise Apart(f"the head is a {type(linear).__name__}")
    weight, bias, eps = _layer_norm(norm)
    tensors = (getattr(linear, "weight", None), getattr(linear, "bias", None), weight, bias)
    return _chosen(Step("pooled_head", tensors, {"first": first, "count": count, "norm_eps": eps}), size)


def operation_of(step: Step) -> cpu_tuning.Operation:
    """What a step of a whole model does, as the table of this CPU knows it."""
    names = [*inspect.signature(reference.OPERATORS[step.operator]).parameters][1:]
    dtype = next(t.dtype for t in step.tensors if t is not None)
    return cpu_tuning.Operation.of(step.operator, dtype, zip(names, step.tensors, strict=False), step.static)


def _chosen(step: Step, size: Sequence[int]) -> Step:
    """A step of no module of its own on tensors of this size, with the choice of this CPU's table."""
    choice = cpu_tuning.choose(operation_of(step)) if any(t is not None for t in step.tensors) else None
    return step if choice is None else replace(step, pytorch=choice.batches(size))


def _layer_norm(norm: nn.Module | None) -> tuple[Any, Any, float | None]:
    if norm is None or type(norm) is nn.Identity:
        return None, None, None
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise Apart(f"a norm outside the blocks is a {type(norm).__name__}, no LayerNorm with weight and bias")
    return norm.weight, norm.bias, norm.eps
