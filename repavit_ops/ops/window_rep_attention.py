"""Functional form of the reparameterized window attention block (Swin)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..backends import Backend
from . import _check, _direct


def window_rep_attention(
    x: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    *,
    num_heads: int,
    scale: float,
    window: int | tuple[int, int],
    shift: int | tuple[int, int],
    rel_bias: Tensor,
    pad_kv: Tensor | None = None,
    norm_eps: float | None = None,
    residual: bool = False,
    norm: str = "layer",
    roll_first: bool = False,
    quantize: str = "none",
    packed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Window attention block in one call: ``proj(softmax(scale · q kᵀ + rel_bias + mask) v) [+ x]`` per window.

    As :func:`rep_attention` over windows of wh x ww tokens of a map rolled by ``shift``; the mask of -100 between
    tokens that the roll brought together is computed inside. A map that the window does not divide is padded at
    the right and the bottom with tokens that are zero AFTER the norm's affine.

    Shapes:
        x         [B, H, W, C]                  fp32 | bf16 | fp16 | fp64; any strides
        w_qkv     [h·d_qk + h·d_qk + h·d_v, C]  rows q | k | v, head-major in each; b_qkv of that length or None
        w_proj    [C_out, h·d_v]                b_proj [C_out] or None
        rel_bias  [h, wh·ww, wh·ww]             already gathered from the table
        pad_kv    [h·d_qk + h·d_v] or None      K | V of a padded token; None: those of a zero row, i.e. b_qkv
        returns   [B, H, W, C_out]              dtype of x, accumulated in fp32 (fp64 for fp64)

    Args:
        num_heads: h.
        scale: factor of q kᵀ (1/√d of the source model, or 1.0 when folded into W_q).
        window, shift: tokens, one number or (height, width); 0 ≤ shift < window.
        pad_kv: needed when a norm's affine is folded into w_qkv, b_qkv: see ``reparam.attention.pad_kv_vector``.
        residual: add x (needs C_out = C).
        norm: "layer": ``(x - mean) / sqrt(var + norm_eps)``, or "rms": ``x / sqrt(mean(x²) + norm_eps)``.
        roll_first: roll before padding, as timm does; False pads first, as Swin's detection code does.
        quantize: "int8": weights as whole numbers per output channel, z and o per token and call; q kᵀ, softmax and the
            product with v stay in floats (:mod:`repavit_ops.reference_int8`). Not differentiable, not for fp64.
        packed: the weights packed by :meth:`WindowRepAttention.repack` for the C++ backend; others ignore it.
        backend: "auto" takes the device's kernels; any other name is used or raises, never replaced.

    Raises:
        ValueError: a shape, dtype, device or option disagrees; names the argument, what came, what was wanted.
        RuntimeError: a forced backend is not available; says why.
    """
    window, shift = _check.pair("window", window), _check.pair("shift", shift)
    tensors = (x, w_qkv, b_qkv, w_proj, b_proj, rel_bias, pad_kv)
    static: dict[str, Any] = {
        "num_heads": num_heads,
        "scale": scale,
        "window": list(window),
        "shift": list(shift),
        "residual": residual,
        "norm": norm,
        "roll_first": roll_first,
        "quantize": quantize,
    }
    operator = torch.ops.repavit_ops.window_rep_attention
    if (y := _direct.call(operator, backend, norm_eps, (*tensors, packed), **static)) is not None:
        return y
    if min(window) < 1 or any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift: got {shift} with window {window}, wanted 0 <= shift < window in both directions")
    if w_proj.dim() != 2 or w_qkv.dim() != 2:
        raise ValueError(f"w_qkv, w_proj: got shapes {list(w_qkv.shape)}, {list(w_proj.shape)}, wanted matrices")
    d_qk = (w_qkv.shape[0] - w_proj.shape[1]) // (2 * max(num_heads, 1))
    d_v = _check.heads(num_heads, d_qk, w_qkv, w_proj)
    _check.shape("x", x, "B", "H", "W", w_qkv.shape[1])
    tokens = window[0] * window[1]
    if tuple(rel_bias.shape) != (num_heads, tokens, tokens):
        wanted = [num_heads, tokens, tokens]
        raise ValueError(f"rel_bias: got shape {list(rel_bias.shape)}, wanted {wanted} for {num_heads=}, {window=}")
    if b_qkv is not None:
        _check.shape("b_qkv", b_qkv, num_heads * (2 * d_qk + d_v))
    if b_proj is not None:
        _check.shape("b_proj", b_proj, w_proj.shape[0])
    if pad_kv is not None:
        _check.shape("pad_kv", pad_kv, num_heads * (d_qk + d_v))
    if residual and w_proj.shape[0] != x.shape[3]:
        raise ValueError(f"residual: x has {x.shape[3]} channels but w_proj gives {w_proj.shape[0]}; they must agree")
    _check.norm(norm_eps, norm)
    _check.quantized(x, quantize, w_qkv, w_proj)
    _check.same_kind(x, w_qkv=w_qkv, b_qkv=b_qkv, w_proj=w_proj, b_proj=b_proj, rel_bias=rel_bias, pad_kv=pad_kv)
    _check.packed(x, packed)

    if backends.wants_formula(backend):
        return reference.window_rep_attention(*tensors, norm_eps=norm_eps, **static)
    backends.select(backend, x, "window_rep_attention")
    return operator(*tensors, packed, norm_eps=norm_eps, **static)
