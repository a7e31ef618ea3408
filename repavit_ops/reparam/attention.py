"""Folds around softmax attention: what moves out of it without changing its output.

    y = proj([inner_norm] (softmax(scale · q kᵀ + attn_bias) v)),    q | k | v = W_qkv norm(x) + b_qkv

Softmax ignores a constant added to a row of scores (so the K bias goes), its rows sum to 1 (so the V bias moves into
the projection), and everything before q, k, v and after proj is affine (so norms and scales fold). The shortcut
cannot pass the softmax: it stays an epilogue of proj.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .affine import Affine, affine_as_float64, fold_affine_into_input, fold_affine_into_output
from .affine import fold_output_scale as fold_linear_output_scale
from .precision import as_float64, bias_as_float64, plus_identity


class AttentionWeights(NamedTuple):
    """The weights of one attention, as `rep_attention` takes them. Make them with `attention_weights`, which checks.

    Shapes:
        w_qkv [h·d_qk + h·d_qk + h·d_v, C], b_qkv [the same rows]: rows q | k | v, head-major in each
        w_proj [C_out, h·d_v], b_proj [C_out]
    """

    w_qkv: Tensor
    b_qkv: Tensor
    w_proj: Tensor
    b_proj: Tensor
    num_heads: int
    d_qk: int
    scale: float

    @property
    def d_v(self) -> int:
        """Size of one value head."""
        return self.w_proj.shape[1] // self.num_heads

    @property
    def q(self) -> slice:
        """Rows of w_qkv and b_qkv that make the queries."""
        return slice(0, self.num_heads * self.d_qk)

    @property
    def k(self) -> slice:
        """Rows that make the keys."""
        return slice(self.num_heads * self.d_qk, 2 * self.num_heads * self.d_qk)

    @property
    def v(self) -> slice:
        """Rows that make the values."""
        return slice(2 * self.num_heads * self.d_qk, None)


class MergedAttention(NamedTuple):
    """Attention with a linear path beside it: ``y = attn(x) + x W_mergedᵀ [+ x if residual]``.

    Shapes: w_merged [C_out, C]; its bias is already in weights.b_proj.
    """

    weights: AttentionWeights
    w_merged: Tensor
    residual: bool


def attention_weights(
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    num_heads: int,
    d_qk: int | None = None,
    scale: float | None = None,
) -> AttentionWeights:
    """Check the weights of one attention and return them in float64; a bias None becomes zeros.

    Shapes:
        w_qkv [h·(2·d_qk + d_v), C], b_qkv [rows] or None; w_proj [C_out, h·d_v], b_proj [C_out] or None

    Args:
        d_qk: size of a query and key head; None takes what w_qkv's rows leave after the values.
        scale: factor of the scores; None is 1 / sqrt(d_qk).

    Raises:
        ValueError: a shape disagrees, or the rows do not split into heads; names the argument.
    """
    w_qkv = as_float64(w_qkv, "w_qkv", rows=None, C=None)
    w_proj = as_float64(w_proj, "w_proj", C_out=None, h_d_v=None)
    rows, values = w_qkv.shape[0], w_proj.shape[1]
    if num_heads < 1 or values % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, wanted a divisor of the {values} columns of w_proj")
    if d_qk is None:
        d_qk = max(1, (rows - values) // (2 * num_heads))
    wanted = 2 * num_heads * d_qk + values
    if d_qk < 1 or rows != wanted:
        raise ValueError(
            f"w_qkv: got {rows} rows, wanted {wanted} = 2·{num_heads} heads·{d_qk} (q and k) + {values} (v, the "
            "columns of w_proj)"
        )
    b_qkv, b_proj = bias_as_float64(b_qkv, "b_qkv", w_qkv), bias_as_float64(b_proj, "b_proj", w_proj)
    return AttentionWeights(w_qkv, b_qkv, w_proj, b_proj, num_heads, d_qk, d_qk**-0.5 if scale is None else scale)


def fold_input_affine(weights: AttentionWeights, affine: Affine) -> AttentionWeights:
    """Norm → qkv: ``W_qkv diag(s)``, ``b_qkv + W_qkv t``.

    A BatchNorm (or RepBN) folds wholly; of a LayerNorm its gamma and beta fold and the core stays with the caller.
    Fold it before `drop_k_bias` and `move_v_bias`, since it makes new biases. Shapes: affine maps [C].
    """
    weights = attention_weights(*weights)
    affine = affine_as_float64(affine, "affine", weights.w_qkv.shape[1])
    w_qkv, b_qkv = fold_affine_into_input(weights.w_qkv, weights.b_qkv, affine)
    return weights._replace(w_qkv=w_qkv, b_qkv=b_qkv)


def fold_inner_affine(weights: AttentionWeights, affine: Affine) -> AttentionWeights:
    """inner norm → proj: ``W_proj diag(s)``, ``b_proj + W_proj t``; the norm's core stays with the caller.

    Nothing linear passes that core: with one, `move_v_bias` is not exact. Shapes: affine maps [h·d_v].
    """
    weights = attention_weights(*weights)
    affine = affine_as_float64(affine, "affine", weights.w_proj.shape[1])
    w_proj, b_proj = fold_affine_into_input(weights.w_proj, weights.b_proj, affine)
    return weights._replace(w_proj=w_proj, b_proj=b_proj)


def drop_k_bias(weights: AttentionWeights) -> AttentionWeights:
    """Zero the K bias: ``q · b_k`` is the same for every key of a row, and softmax ignores it.

    Exact with any attn_bias or mask. Not exact when something stands between k and the scores (QK-norm, RoPE).
    """
    weights = attention_weights(*weights)
    b_qkv = weights.b_qkv.clone()
    b_qkv[weights.k] = 0
    return weights._replace(b_qkv=b_qkv)


def move_v_bias(weights: AttentionWeights) -> AttentionWeights:
    """Move the V bias behind the softmax, whose rows sum to 1: ``b_proj += W_proj b_v``, ``b_v = 0``.

    Exact unless a row is wholly masked (its output is 0, not b_v), or a norm stands in front of the projection.
    """
    weights = attention_weights(*weights)
    b_qkv = weights.b_qkv.clone()
    b_qkv[weights.v] = 0
    b_proj = weights.b_proj + weights.w_proj @ weights.b_qkv[weights.v]
    return weights._replace(b_qkv=b_qkv, b_proj=b_proj)


def fold_scale(weights: AttentionWeights) -> AttentionWeights:
    """Fold the factor of the scores into W_q and b_q; the scale left is 1."""
    weights = attention_weights(*weights)
    factor = torch.ones_like(weights.b_qkv)
    factor[weights.q] = weights.scale
    return weights._replace(w_qkv=weights.w_qkv * factor[:, None], b_qkv=weights.b_qkv * factor, scale=1.0)


def fold_output_affine(weights: AttentionWeights, affine: Affine) -> AttentionWeights:
    """proj → norm, a BatchNorm behind the projection: scales W_proj's rows and b_proj. Shapes: affine maps [C_out]."""
    weights = attention_weights(*weights)
    affine = affine_as_float64(affine, "affine", weights.w_proj.shape[0])
    w_proj, b_proj = fold_affine_into_output(weights.w_proj, weights.b_proj, affine)
    return weights._replace(w_proj=w_proj, b_proj=b_proj)


def fold_output_scale(weights: AttentionWeights, scale: Tensor | float) -> AttentionWeights:
    """proj → scale: LayerScale [C_out] or a number (1 / lambda) into W_proj and b_proj. The shortcut is not scaled."""
    weights = attention_weights(*weights)
    w_proj, b_proj = fold_linear_output_scale(weights.w_proj, weights.b_proj, scale)
    return weights._replace(w_proj=w_proj, b_proj=b_proj)


def pad_kv_vector(original: AttentionWeights, affine: Affine, folded: AttentionWeights) -> Tensor:
    """Key and value of a padded window token, one that is zero AFTER the norm's affine: ``b_folded - W t``.

    Before any fold a real token has ``W (s * n + t) + b`` and a padded one ``b``: it lacks ``W t``. Dropping the K
    bias and moving the V bias subtract one vector from *every* key and value, padded ones included, so the difference
    stays. With both moved, b_folded is 0 and the padded token's key and value are ``-W t``.

    Shapes:
        returns [h·d_qk + h·d_v] float64, k | v, head-major in each, the same for all padded tokens

    Args:
        original: the weights before any fold.
        affine: the norm in front of qkv (for a LayerNorm its gamma and beta), [C].
        folded: ``fold_input_affine(original, affine)`` after any of the other folds of this file.

    Raises:
        ValueError: a shape disagrees; names the argument.
    """
    original, folded = attention_weights(*original), attention_weights(*folded)
    affine = affine_as_float64(affine, "affine", original.w_qkv.shape[1])
    as_float64(folded.w_qkv, "folded.w_qkv", rows=original.w_qkv.shape[0], C=original.w_qkv.shape[1])
    kv = slice(original.k.start, None)
    return folded.b_qkv[kv] - original.w_qkv[kv] @ affine.shift


def merge_attention_bypass(
    weights: AttentionWeights,
    w_bypass: Tensor,
    b_bypass: Tensor | None = None,
    *,
    affine: Affine | None = None,
    shortcut: bool = True,
    fold_identity: bool = True,
) -> MergedAttention:
    """Merge ``attn(norm(x)) + norm(x) W_bypassᵀ + b_bypass [+ x]`` into attention plus one C x C map of x.

    Under a BatchNorm, or without a norm, the map reads raw x as the shortcut does, so it swallows the shortcut. Under
    a LayerNorm it reads the core's output: pass gamma and beta as ``affine`` and ``fold_identity=False``.

    Shapes:
        w_bypass [C_out, C], b_bypass [C_out] or None; affine maps [C]

    Args:
        weights: the attention; its own input affine is folded by `fold_input_affine`, not here.
        affine: the norm the bypass reads through, None when it reads x itself.
        shortcut: the block adds its input.
        fold_identity: put the shortcut into w_merged as + I; False leaves it to ``residual``.

    Raises:
        ValueError: a shape disagrees; names the argument.
    """
    weights = attention_weights(*weights)
    c_out, dim = weights.w_proj.shape[0], weights.w_qkv.shape[1]
    w_merged = as_float64(w_bypass, "w_bypass", C_out=c_out, C=dim)
    b_merged = bias_as_float64(b_bypass, "b_bypass", w_merged)
    if affine is not None:
        w_merged, b_merged = fold_affine_into_input(w_merged, b_merged, affine_as_float64(affine, "affine", dim))
    folds = shortcut and fold_identity
    if folds:
        w_merged = plus_identity(as_float64(w_merged, "w_bypass", C_out=dim, C=dim))
    weights = weights._replace(b_proj=weights.b_proj + b_merged)
    return MergedAttention(weights, w_merged, residual=shortcut and not folds)
