"""A whole classifier in one operator call: what its parts are as steps of ``fused_blocks``, and why they may not be.

At batch 1 a small model's blocks take a few milliseconds, in which its weights push everything else out of the caches;
each call from Python behind them then costs about 0.1 ms, ten times what it costs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..nn import PatchConv2d, PatchProjection
from ..nn.fused_stack import steps_of
from ..stack_plan import Step


class Apart(Exception):
    """Why a part cannot be a step, in one line."""


def patch_grid(patch_embed: nn.Module, kind: type[nn.Module], x: Tensor, patch: int) -> tuple[int, int]:
    """Patches down and across in images like ``x``."""
    height, width = x.shape[2:]
    if type(patch_embed) is not kind or height % patch or width % patch or not height or not width:
        raise Apart("the patch embedding is more than a projection of whole patches")
    return height // patch, width // patch


def embedding(
    conv: nn.Module,
    *,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    norm: nn.Module | None = None,
    as_map: bool = False,
) -> Step:
    """Patches, prefix tokens, position [P + h·w, C] and the norm behind them."""
    if type(conv) is not PatchConv2d:
        raise Apart(f"the patch embedding is a {type(conv).__name__}, no projection of patches")
    weight, bias, eps = _layer_norm(norm)
    return Step(
        "token_embedding",
        (conv.weight.flatten(1), conv.bias, prefix, position, weight, bias),
        {"patch": (conv.kernel_size[0], conv.kernel_size[1]), "as_map": as_map, "norm_eps": eps},
        conv.packed(),
    )


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
    static = {"patch": module.patch, "channels_last": module.channels_last, "norm_eps": module.norm_eps}
    step = Step("patch_projection", (module.weight, module.bias), static, module.packed())
    return step, (size[0] // module.patch[0], size[1] // module.patch[1])


def head(norm: nn.Module, linear: nn.Module, *, first: int, count: int) -> Step:
    """The mean of ``count`` normed tokens (0: all the rest) from ``first`` on, and the head."""
    if type(linear) not in (nn.Linear, nn.Identity):
        raise Apart(f"the head is a {type(linear).__name__}")
    weight, bias, eps = _layer_norm(norm)
    tensors = (getattr(linear, "weight", None), getattr(linear, "bias", None), weight, bias)
    return Step("pooled_head", tensors, {"first": first, "count": count, "norm_eps": eps})


def _layer_norm(norm: nn.Module | None) -> tuple[Any, Any, float | None]:
    if norm is None or type(norm) is nn.Identity:
        return None, None, None
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        raise Apart(f"a norm outside the blocks is a {type(norm).__name__}, no LayerNorm with weight and bias")
    return norm.weight, norm.bias, norm.eps
