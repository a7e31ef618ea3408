"""Functional form of the projection of patches: patch embedding and Swin's patch merging."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, reference
from ..backends import Backend
from . import _check


def patch_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    patch: int | tuple[int, int],
    channels_last: bool = False,
    norm_eps: float | None = None,
    packed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Project every patch of an image or map: ``z Wᵀ + bias`` per patch, z its elements or their LayerNorm core.

    A convolution whose stride is its kernel (patch embedding), or with ``channels_last`` and ``norm_eps`` Swin's patch
    merging, without im2col in memory. Pixels beyond the last whole patch are left out, as a convolution does.

    Shapes:
        x        [B, C, H, W]              or [B, H, W, C] with channels_last; fp32 | bf16 | fp16 | fp64
        weight   [N, K]                    K = C·ph·pw, a patch in the order c, y, x; or y, x, c with channels_last
        bias     [N] or None
        returns  [B, H // ph, W // pw, N]  dtype of x, accumulated in fp32 (fp64 for fp64)

    Args:
        patch: pixels, one number or (height, width).
        channels_last: the layout of x and of a patch.
        norm_eps: variance offset of the LayerNorm core over a patch's K elements; None for no norm.
        packed: the weight packed by :meth:`PatchProjection.repack` for the C++ backend; others ignore it.
        backend: "auto" takes the device's kernels; any other name is used or raises, never replaced.

    Raises:
        ValueError: a shape, dtype, device or option disagrees; names the argument, what came, what was wanted.
        RuntimeError: a forced backend is not available; says why.
    """
    ph, pw = _check.pair("patch", patch)
    if ph < 1 or pw < 1:
        raise ValueError(f"patch: got {(ph, pw)}, wanted numbers >= 1")
    if x.dim() != 4:
        raise ValueError(f"x: got shape {list(x.shape)}, wanted {'[B, H, W, C]' if channels_last else '[B, C, H, W]'}")
    channels = x.shape[3 if channels_last else 1]
    k = channels * ph * pw
    if weight.dim() != 2 or weight.shape[1] != k:
        got = list(weight.shape)
        raise ValueError(f"weight: got shape {got}, wanted [N, {k}] for {channels} channels and patch {(ph, pw)}")
    if bias is not None:
        _check.shape("bias", bias, weight.shape[0])
    _check.norm(norm_eps)
    _check.same_kind(x, weight=weight, bias=bias)
    _check.packed(x, packed)
    if backends.wants_formula(backend):
        return reference.patch_projection(
            x, weight, bias, patch=(ph, pw), channels_last=channels_last, norm_eps=norm_eps
        )
    backends.select(backend, x, "patch_projection")
    return torch.ops.repavit_ops.patch_projection(
        x, weight, bias, packed, patch=[ph, pw], channels_last=channels_last, norm_eps=norm_eps
    )
