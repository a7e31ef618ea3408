"""Norms as per-channel affine maps, and the two ways an affine map folds into a neighbouring Linear.

A norm in eval mode is ``y = x * scale + shift`` per channel (BatchNorm wholly; LayerNorm after its mean/variance
core). Before a Linear it scales the *columns* of W, after a Linear the *rows*. RePaViT needs the first kind, which
PyTorch's ``fuse_linear_bn_eval`` does not do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import as_float64, bias_as_float64, scale_as_float64


class Affine(NamedTuple):
    """Per-channel map ``y = x * scale + shift``. Shapes: scale [C], shift [C]."""

    scale: Tensor
    shift: Tensor


def affine_as_float64(affine: Affine, name: str, dim: int | None = None) -> Affine:
    """Return ``affine`` in float64 after checking that it maps ``dim`` channels (any number when None)."""
    scale = as_float64(affine.scale, f"{name}.scale", C=dim)
    return Affine(scale, as_float64(affine.shift, f"{name}.shift", C=scale.shape[0]))


def batchnorm_affine(
    weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, eps: float
) -> Affine:
    """BatchNorm in eval mode: ``scale = g / sqrt(var + eps)``, ``shift = beta - mean * scale``.

    Shapes:
        weight, bias [C] or None (affine=False); running_mean, running_var [C]

    Raises:
        ValueError: a shape disagrees, the statistics are missing (track_running_stats=False), or running_var is
            not finite or var + eps not positive. An infinite variance would fold to a silent scale of 0.
    """
    if running_mean is None or running_var is None:
        name = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{name}: got None, wanted [C]: a BatchNorm without running statistics normalises by the batch it sees "
            "and is no affine map; train it with track_running_stats=True"
        )
    var = as_float64(running_var, "running_var", C=None)
    mean = as_float64(running_mean, "running_mean", C=var.shape[0])
    if not var.is_meta and not bool((torch.isfinite(var) & (var + eps > 0)).all()):
        raise ValueError(
            f"running_var: got values in [{float(var.min()):g}, {float(var.max()):g}] with eps {eps:g}, wanted finite "
            "ones with running_var + eps > 0; fold before casting the model to fp16, or recalibrate the BatchNorm"
        )
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * as_float64(weight, "weight", C=var.shape[0])
    shift = -mean * scale
    if bias is not None:
        shift = shift + as_float64(bias, "bias", C=var.shape[0])
    return Affine(scale, shift)


def layernorm_affine(weight: Tensor | None, bias: Tensor | None, dim: int | None = None) -> Affine:
    """LayerNorm after its core: ``scale = gamma`` (None: ones), ``shift = beta`` (None: zeros).

    Shapes:
        weight, bias [C] or None; ``dim`` is C, needed only when both are None

    Raises:
        ValueError: a shape disagrees, or nothing tells C.
    """
    given = weight if weight is not None else bias
    if given is None and dim is None:
        raise ValueError("dim: got None with weight and bias None, wanted the number of channels")
    if given is None:
        given = torch.ones(dim or 0, dtype=torch.float64)
    scale = as_float64(torch.ones_like(given) if weight is None else weight, "weight", C=dim)
    shift = as_float64(torch.zeros_like(given) if bias is None else bias, "bias", C=scale.shape[0])
    return Affine(scale, shift)


def repbn_affine(bn: Affine, alpha: Tensor | float) -> Affine:
    """SLAB's RepBN, ``y = BN(x) + alpha * x``: the same map with ``scale + alpha`` (Guo et al., 2024).

    Shapes:
        bn.scale, bn.shift [C]; alpha a number, a one-element tensor or [C]
    """
    bn = affine_as_float64(bn, "bn")
    return Affine(bn.scale + scale_as_float64(alpha, "alpha", bn.scale), bn.shift)


def compose(first: Affine, second: Affine) -> Affine:
    """``second`` after ``first``: ``scale = s1 * s2``, ``shift = t1 * s2 + t2``. Shapes: all [C]."""
    first = affine_as_float64(first, "first")
    second = affine_as_float64(second, "second", first.scale.shape[0])
    return Affine(first.scale * second.scale, first.shift * second.scale + second.shift)


def fold_affine_into_input(w: Tensor, b: Tensor | None, affine: Affine) -> tuple[Tensor, Tensor]:
    """Norm → Linear: ``W (s * x + t) + b = (W diag(s)) x + (b + W t)``. Scales columns.

    Shapes:
        w [out, in]; b [out] or None (zeros); affine maps [in]

    Raises:
        ValueError: a shape disagrees; names the argument.
    """
    w = as_float64(w, "w", out=None, C=None)
    b = bias_as_float64(b, "b", w)
    scale, shift = affine_as_float64(affine, "affine", w.shape[1])
    return w * scale, b + w @ shift


def fold_affine_into_output(w: Tensor, b: Tensor | None, affine: Affine) -> tuple[Tensor, Tensor]:
    """Linear → norm: ``s * (W x + b) + t = (diag(s) W) x + (s * b + t)``. Scales rows, and the bias with them.

    Shapes:
        w [out, in]; b [out] or None (zeros); affine maps [out]

    Raises:
        ValueError: a shape disagrees; names the argument.
    """
    w = as_float64(w, "w", out=None, C=None)
    b = bias_as_float64(b, "b", w)
    scale, shift = affine_as_float64(affine, "affine", w.shape[0])
    return w * scale[:, None], b * scale + shift


def fold_output_scale(w: Tensor, b: Tensor | None, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Linear → scale, ``s * (W x + b)``: LayerScale, or LV-ViT's ``1 / lambda``. The bias is scaled too.

    Shapes:
        w [out, in]; b [out] or None (zeros); scale a number, a one-element tensor or [out]

    Raises:
        ValueError: a shape disagrees; names the argument.
    """
    w = as_float64(w, "w", out=None, C=None)
    scale = scale_as_float64(scale, "scale", w)
    return fold_affine_into_output(w, b, Affine(scale, torch.zeros_like(scale)))
