"""Where a model projects patches, and the fused modules that take the place: patch embeddings, LV-ViT's stem and Swin's
mergings.

They are no sub-blocks and cannot fail to be exact, so they have no rule and no entry among the skipped.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from . import reparam
from .backends import Backend
from .models.lvvit import ConvStem, FusedConvStem
from .models.patch_embed import PatchEmbed
from .models.swin import PatchMerging, SwinPatchEmbed
from .nn import ConvReLU2d, PatchConv2d, PatchProjection
from .nn.patch_conv import is_patch_conv


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
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        return module
    if type(module) is ConvStem:
        return FusedConvStem.folding(module, backend) if module.as_built() else module
    if type(module) in (PatchEmbed, SwinPatchEmbed, _timm("timm.layers.patch_embed", "PatchEmbed")):
        if is_patch_conv(module.get_submodule("proj")):
            module.proj = PatchConv2d.replacing(module.get_submodule("proj"), backend)  # type: ignore[arg-type]
        return module
    if type(module) in (PatchMerging, _timm("timm.models.swin_transformer", "PatchMerging")):
        return _fold_merging(module, backend)
    return module


def _fold_merging(merging: Any, backend: Backend) -> nn.Module:
    """``reduction(norm(2x2 neighbours))`` the norm's affine in the matrix, neighbours in row-major order."""
    norm, reduction = merging.norm, merging.reduction
    if type(norm) is not nn.LayerNorm or norm.weight is None or type(reduction) is not nn.Linear:
        return merging
    w, b = reparam.fold_affine_into_input(
        reduction.weight, reduction.bias, reparam.layernorm_affine(norm.weight, norm.bias)
    )
    n, depth = w.shape
    w = w.view(n, 2, 2, depth // 4).transpose(1, 2).reshape(n, depth)  # published: the column outer, the row inner
    fused = PatchProjection(
        depth // 4, n, 2, channels_last=True, norm_eps=norm.eps, pad=True, backend=backend, device="meta"
    )
    fused.weight = nn.Parameter(reparam.cast(w, reduction.weight.dtype, "reduction.weight"))
    fused.bias = nn.Parameter(reparam.cast(b, reduction.weight.dtype, "reduction.bias"))
    return fused


def _timm(module: str, name: str) -> type[nn.Module] | None:
    """A class of timm's where that part of timm is loaded already; nothing here imports it."""
    return getattr(sys.modules.get(module), name, None)
