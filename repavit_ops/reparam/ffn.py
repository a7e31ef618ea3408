"""The RePaViT merge: the idle channels of an FFN, both its BatchNorms and its shortcut become one C x C matrix.

With the norms folded (A1, c1 in front; A2, c2 behind) a channel-idle FFN is

    A2 · [GELU(h_active); h_idle] + c2 + x,    h = A1 x + c1

and everything that passes no GELU is linear in x, so it collapses (RePaViT, eq. 6):

    W_out GELU(W_in x + b_in) + W_merged x + bias
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .affine import Affine, affine_as_float64, fold_affine_into_input, fold_output_scale
from .precision import as_float64, bias_as_float64, plus_identity


class MergedFFN(NamedTuple):
    """``y = act(x W_inᵀ + b_in) W_outᵀ [+ x W_mergedᵀ] + bias [+ x if residual]``, the operands of `partial_gelu_ffn`.

    Shapes:
        w_in [m, C], b_in [m], w_out [C, m]; m = 0 is tensors of size 0
        w_merged [C, C], or None where there is no linear path
        bias [C]
        residual: the shortcut is not in w_merged and still has to be added
    """

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    w_merged: Tensor | None
    bias: Tensor
    residual: bool = False


def merge_channel_idle_ffn(
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act_channels: int,
    *,
    input_affine: Affine | None = None,
    hidden_affine: Affine | None = None,
    output_scale: Tensor | float | None = None,
    shortcut: bool = True,
    fold_identity: bool = True,
) -> MergedFFN:
    """Merge ``s * fc2(hidden_norm(partial_act(fc1(input_norm(x))))) [+ x]``, exactly (RePaViT, eq. 3 to 6).

    The first ``act_channels`` = m hidden channels are activated, the others are idle.

    Shapes:
        w1 [hidden, C], b1 [hidden] or None; w2 [C, hidden], b2 [C] or None
        returns MergedFFN in float64

    Args:
        input_affine: norm in front of fc1, [C]. For a LayerNorm its gamma and beta; the core stays with the caller,
            and so does the shortcut, which reads raw x: pass ``fold_identity=False``.
        hidden_affine: norm AFTER the partial activation and before fc2, [hidden].
        output_scale: LayerScale [C] or a number (LV-ViT's 1 / lambda). Scales the bias too, never the shortcut.
        shortcut: the FFN adds its input.
        fold_identity: put the shortcut into w_merged as + I; False leaves it to ``residual``. In bf16 and fp16 keep
            it explicit: rounding 1 + w loses w.

    With m = hidden there is no idle path: w_merged is None and the shortcut is a plain residual, not a C x C GEMM.

    Raises:
        ValueError: a shape disagrees or act_channels lies outside 0..hidden; names the argument.
    """
    w1 = as_float64(w1, "w1", hidden=None, C=None)
    hidden, dim = w1.shape
    b1 = bias_as_float64(b1, "b1", w1)
    w2 = as_float64(w2, "w2", C=dim, hidden=hidden)
    b2 = bias_as_float64(b2, "b2", w2)
    m = _checked_act_channels(act_channels, hidden)

    if input_affine is not None:
        w1, b1 = fold_affine_into_input(w1, b1, affine_as_float64(input_affine, "input_affine", dim))
    if hidden_affine is not None:
        w2, b2 = fold_affine_into_input(w2, b2, affine_as_float64(hidden_affine, "hidden_affine", hidden))
    if output_scale is not None:
        w2, b2 = fold_output_scale(w2, b2, output_scale)

    bias = w2[:, m:] @ b1[m:] + b2
    if m == hidden:
        return MergedFFN(w1, b1, w2, None, bias, residual=shortcut)
    w_merged = w2[:, m:] @ w1[m:]
    folds = shortcut and fold_identity
    if folds:
        w_merged = plus_identity(w_merged)
    return MergedFFN(w1[:m], b1[:m], w2[:, :m], w_merged, bias, residual=shortcut and not folds)


def merge_ffn_bypass(merged: MergedFFN, w_bypass: Tensor, b_bypass: Tensor | None = None) -> MergedFFN:
    """Add a linear bypass ``x W_bypassᵀ + b_bypass`` parallel to the FFN into its w_merged and bias.

    The bypass reads what w_merged reads: fold the affine of a norm in front of it first. ``residual`` stays as it was.

    Shapes:
        w_bypass [C, C], b_bypass [C] or None

    Raises:
        ValueError: a shape disagrees; names the argument.
    """
    dim = merged.bias.shape[0]
    w_bypass = as_float64(w_bypass, "w_bypass", C_out=dim, C=dim)
    bias = as_float64(merged.bias, "merged.bias", C=dim) + bias_as_float64(b_bypass, "b_bypass", w_bypass)
    if merged.w_merged is not None:
        w_bypass = as_float64(merged.w_merged, "merged.w_merged", C_out=dim, C=dim) + w_bypass
    return merged._replace(w_merged=w_bypass, bias=bias)


def fold_identity(w_merged: Tensor) -> Tensor:
    """``W + I`` in float64: put the shortcut into the merged matrix. Shapes: w_merged [C, C]."""
    return plus_identity(_square(w_merged))


def unfold_identity(w_merged: Tensor) -> Tensor:
    """``W - I`` in float64: take the shortcut out again, before a cast to low precision. Shapes: w_merged [C, C]."""
    return plus_identity(_square(w_merged), -1)


def is_identity(w: Tensor) -> bool:
    """Whether ``w`` is exactly I, as the authors store the merged matrix of an FFN without idle channels."""
    return w.dim() == 2 and w.shape[0] == w.shape[1] and torch.equal(w, torch.eye(w.shape[0]).to(w))


def active_channels(hidden: int, idle_ratio: float) -> int:
    """Active channels ``m = ceil(hidden * (1 - theta))`` in Python floats, rounding and all, as the authors count them.

    ``active_channels(1152, 2 / 3)`` is therefore 385, not 384: pass the count itself where it matters.

    Raises:
        ValueError: theta lies outside [0, 1], or hidden is negative.
    """
    if hidden < 0:
        raise ValueError(f"hidden: got {hidden}, wanted a number of channels")
    if not 0.0 <= idle_ratio <= 1.0:
        raise ValueError(f"idle_ratio: got {idle_ratio}, wanted the idle share of the hidden channels, in [0, 1]")
    return math.ceil(hidden * (1 - idle_ratio))


def merging_adds_work(hidden: int, act_channels: int, dim: int) -> bool:
    """Whether the C x C matrix costs at least what it replaces: ``0 < idle <= C / 2`` (at equality the MACs tie).

    MACs per token: 2·idle·C before the merge, C² after it; none where there is no idle channel to merge.

    Raises:
        ValueError: act_channels lies outside 0..hidden.
    """
    idle = hidden - _checked_act_channels(act_channels, hidden)
    return 0 < 2 * idle <= dim


def _square(w_merged: Tensor) -> Tensor:
    w_merged = as_float64(w_merged, "w_merged", C_out=None, C=None)
    return as_float64(w_merged, "w_merged", C_out=w_merged.shape[1], C=w_merged.shape[1])


def _checked_act_channels(act_channels: int, hidden: int) -> int:
    if not isinstance(act_channels, int) or not 0 <= act_channels <= hidden:
        raise ValueError(f"act_channels: got {act_channels!r}, wanted an integer in 0..{hidden} (hidden)")
    return act_channels
