"""Functional form of the reparameterized attention block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..backends import Backend
from . import _check, _direct


def rep_attention(
    x: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    d_qk: int,
    attn_bias: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float | None = None,
    residual: bool = False,
    norm: str = "layer",
    qk_norm_eps: float | None = None,
    qk_norm: str = "layer",
    rotary_layout: str = "half",
    inner_norm_eps: float | None = None,
    quantize: str = "none",
    packed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention block in one call: ``proj(o) [+ x]``, ``o = softmax(scale · q kᵀ + attn_bias) v``.

    q, k, v come from z W_qkvᵀ + b_qkv, where z is x or its LayerNorm or RMSNorm core (no affine) when
    ``norm_eps`` is given. o of all heads is replaced by its own LayerNorm core when ``inner_norm_eps`` is given
    (EVA02's CLIP towers).
    Norm affines, scale, K and V bias, LayerScale and 1/λ are folded into the weights beforehand
    (:mod:`repavit_ops.reparam.attention`).

    Shapes:
        x          [B, T, C]                     fp32 | bf16 | fp16 | fp64; any strides
        w_qkv      [h·d_qk + h·d_qk + h·d_v, C]  rows q | k | v, head-major in each; b_qkv of that length or None
        w_proj     [C_out, h·d_v]                d_v is read from it; b_proj [C_out] or None
        attn_bias  broadcastable to [B, h, T, T] float, added before softmax
        rotary_cos, rotary_sin                   broadcastable to [B, h, tokens, width], as x or fp32; both or none
        q_norm, k_norm                           [2, d_qk], weight and bias; both or none
        returns    [B, T, C_out]                 dtype of x, accumulated in fp32 (fp64 for fp64)

    QK-norm: with ``qk_norm_eps`` each head's q and k go through a norm's core and then its affine, q_norm[0] as weight
    and q_norm[1] as bias, k_norm alike.

    Rotary embedding, behind that: pairs (a, b) of the first ``width`` channels of a head's q and k become
    (a cos - b sin, b cos + a sin), for the last ``tokens`` tokens of an image; class and register tokens in front of
    them, and the other channels, stay (Su et al. 2021, RoFormer).

    Values of attn_bias may be any finite number or -inf, for some keys or all: no mask overflows on the way to the
    softmax. A row wholly -inf gives 0 (before the projection), as PyTorch's SDPA does. A row wholly
    ``torch.finfo(dtype).min`` is a row like another. Beside that number of float32, bfloat16 or float64 every score
    vanishes by rounding, so all tokens weigh the same and the mean of v comes out; beside float16's, -65504, scores
    keep two decimal places, and ordinary attention comes out. So have it the formula in float64 and SDPA on the CPU.
    NaN and +inf make their row NaN.

    Args:
        num_heads: h.
        scale: factor of q kᵀ (1/√d of the source model, or 1.0 when folded into W_q).
        d_qk: width of one query or key head; may differ from d_v.
        residual: add x (needs C_out = C).
        norm: "layer": ``(x - mean) / sqrt(var + norm_eps)``, or "rms": ``x / sqrt(mean(x²) + norm_eps)``.
        qk_norm: "layer" or "rms", as ``norm``.
        rotary_layout: pairs are (i, i + width / 2) of "half" (DINOv3), (2 i, 2 i + 1) of "interleaved" (EVA02).
        inner_norm_eps: eps of the LayerNorm core over the h·d_v numbers of o; None for no norm.
        quantize: "int8": weights as whole numbers per output channel, z and o per token and call; q kᵀ, softmax and the
            product with v stay in floats (:mod:`repavit_ops.reference_int8`). Not differentiable, not for fp64.
        packed: the weights packed by :meth:`RepAttention.repack` for the C++ backend; others ignore it.
        backend: "auto" takes the device's kernels; any other name is used or raises, never replaced.

    Raises:
        ValueError: a shape, dtype, device or option disagrees (a bool mask too); names the argument and the fix.
        RuntimeError: a forced backend is not available; says why.
    """
    tensors = (x, w_qkv, b_qkv, w_proj, b_proj, attn_bias, rotary_cos, rotary_sin, q_norm, k_norm)
    operator = torch.ops.repavit_ops.rep_attention
    static: dict[str, Any] = {
        "num_heads": num_heads,
        "scale": scale,
        "d_qk": d_qk,
        "residual": residual,
        "norm": norm,
        "qk_norm_eps": qk_norm_eps,
        "qk_norm": qk_norm,
        "rotary_layout": rotary_layout,
        "inner_norm_eps": inner_norm_eps,
        "quantize": quantize,
    }
    if (y := _direct.call(operator, backend, norm_eps, (*tensors, packed), **static)) is not None:
        return y
    d_v = _check.heads(num_heads, d_qk, w_qkv, w_proj)
    _check.shape("x", x, "B", "T", w_qkv.shape[1])
    if b_qkv is not None:
        _check.shape("b_qkv", b_qkv, num_heads * (2 * d_qk + d_v))
    if b_proj is not None:
        _check.shape("b_proj", b_proj, w_proj.shape[0])
    if residual and w_proj.shape[0] != x.shape[2]:
        raise ValueError(f"residual: x has {x.shape[2]} channels but w_proj gives {w_proj.shape[0]}; they must agree")
    if attn_bias is not None:
        _check_bias(attn_bias, (x.shape[0], num_heads, x.shape[1], x.shape[1]))
    _check.rotary(x, rotary_cos, rotary_sin, rotary_layout, num_heads, d_qk)
    _check.qk_norm(qk_norm_eps, qk_norm, q_norm, k_norm, d_qk)
    _check.norm(norm_eps, norm)
    _check.norm(inner_norm_eps, name="inner_norm")
    _check.quantized(x, quantize, w_qkv, w_proj)
    _check.same_kind(
        x,
        w_qkv=w_qkv,
        b_qkv=b_qkv,
        w_proj=w_proj,
        b_proj=b_proj,
        attn_bias=attn_bias,
        q_norm=q_norm,
        k_norm=k_norm,
    )
    _check.packed(x, packed)

    if backends.wants_formula(backend):
        return reference.rep_attention(*tensors, norm_eps=norm_eps, **static)
    backends.select(backend, x, "rep_attention")
    return operator(*tensors, packed, norm_eps=norm_eps, **static)


def _check_bias(attn_bias: Tensor, wanted: tuple[int, int, int, int]) -> None:
    if attn_bias.dtype == torch.bool:
        raise ValueError(
            "attn_bias: got a bool mask, wanted a float one that is added to the scores; "
            "convert it with torch.zeros(mask.shape).masked_fill(~mask, float('-inf'))"
        )
    sizes = (1,) * (4 - attn_bias.dim()) + tuple(attn_bias.shape)
    if len(sizes) != 4 or any(s not in (1, w) for s, w in zip(sizes, wanted, strict=True)):
        raise ValueError(
            f"attn_bias: got shape {list(attn_bias.shape)}, wanted one that broadcasts to [B, h, T, T] = {list(wanted)}"
        )
