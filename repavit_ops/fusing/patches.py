"""Where a model projects patches, and the fused modules that take the place: patch embeddings and mergings of patches.

They are no sub-blocks and cannot fail to be exact, so none is ever skipped: what has another form stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .. import reparam
from ..backends import Backend
from ..nn import ConvReLU2d, PatchConv2d, PatchProjection
from ..nn.given import reason_against_weights
from ..nn.patch_conv import is_patch_conv
from .rules import projection_of


@dataclass(frozen=True)
class MergingParts:
    """``linear(norm(the 2x2 neighbours of a position, one after the other))``.

    ``outer``: which of a neighbour's two coordinates changes more slowly in that order. The published Swin stacks
    [0, 0], [1, 0], [0, 1], [1, 1] in (row, column): the column is the outer one. ``wrap``: what callers call, where
    that takes no map.
    """

    norm: nn.Module
    linear: nn.Module
    outer: Literal["row", "column"] = "column"
    wrap: Callable[[PatchProjection], nn.Module] | None = None


def fuse_patches(module: nn.Module, backend: Backend) -> nn.Module:
    """The module with its convolution over patches, or all of it, as one projection; itself where there is neither."""
    if isinstance(module, PatchConv2d | PatchProjection):
        if backend == "reference":
            module.restore_unpacked()
        module.backend = backend
        return module
    if isinstance(module, ConvReLU2d):
        module.backend = backend
        return module
    projection = projection_of(module)
    if projection is None or any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        return module
    if reason_against_weights(module) is not None:
        return module
    return projection(module, backend)


def fuse_convolution(module: nn.Module, backend: Backend, name: str = "proj") -> nn.Module:
    """The module, its convolution over patches replaced by a projection of the same weights and key."""
    if is_patch_conv(conv := module.get_submodule(name)):
        module.set_submodule(name, PatchConv2d.replacing(conv, backend))  # type: ignore[arg-type]
    return module


def fold_merging(parts: MergingParts, backend: Backend) -> nn.Module | None:
    """The merging with the norm's affine in the matrix and neighbours in row-major order; None if it has no fold."""
    norm, linear = parts.norm, parts.linear
    if type(norm) is not nn.LayerNorm or norm.weight is None or type(linear) is not nn.Linear:
        return None
    w, b = reparam.fold_affine_into_input(linear.weight, linear.bias, reparam.layernorm_affine(norm.weight, norm.bias))
    n, depth = w.shape
    if parts.outer == "column":
        w = w.view(n, 2, 2, depth // 4).transpose(1, 2).reshape(n, depth)
    options: dict[str, Any] = {"channels_last": True, "norm_eps": norm.eps, "pad": True}
    fused = PatchProjection(depth // 4, n, 2, **options, backend=backend, device="meta")
    fused.weight = nn.Parameter(reparam.cast(w, linear.weight.dtype, "reduction.weight"))
    fused.bias = nn.Parameter(reparam.cast(b, linear.weight.dtype, "reduction.bias"))
    return fused if parts.wrap is None else parts.wrap(fused)
