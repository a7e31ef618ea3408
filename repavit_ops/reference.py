"""The definition of every operator in plain PyTorch.

One text, three uses: the fallback on any device, the truth of the tests (in float64) and the eager baseline of the
benchmarks. Nothing here is tuned; every line is the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import backends, reference_int8, stack_plan

SHIFT_MASK = -100.0  # what Swin adds between tokens of different regions, instead of -inf
_COMMON_GELU: ContextVar[bool] = ContextVar("whether gelu is F.gelu", default=False)


def layer_norm_core(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension without affine: ``(x - mean) / sqrt(var + eps)``."""
    width = (int(x.shape[-1]),) if torch.jit.is_tracing() else x.shape[-1:]  # ONNX's old exporter takes numbers alone
    return F.layer_norm(x, width, eps=eps)


def rms_norm_core(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension without weight: ``x / sqrt(mean(x²) + eps)``."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def normed(x: Tensor, norm_eps: float | None, norm: str = "layer") -> Tensor:
    """What stands in front of a sub-block: x itself, or its core under the norm of this form."""
    if norm_eps is None:
        return x
    return rms_norm_core(x, norm_eps) if norm == "rms" else layer_norm_core(x, norm_eps)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """``x Φ(x)``, its approximation by tanh, or "quick": ``x sigmoid(1.702 x)``.

    -0 gives -0, NaN gives NaN, +inf gives +inf, -inf NaN (-inf · 0).

    Φ is written out for the CPU's floats of at most 32 bits, where ``F.gelu`` of a contiguous tensor is oneDNN's. That
    differs from machine to machine: with AVX-512 it is 1.2e-6 off, +inf gives NaN and 1.8e38 inf; -0 gives +0
    everywhere. Compilers and exporters know F.gelu and have their own; :func:`common_gelu` takes it, too.
    """
    if approximate == "quick":
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x  # so that it is rounded once
        return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)
    narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if approximate != "none" or not x.is_cpu or not narrow or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.gelu(x, approximate=approximate)
    if _COMMON_GELU.get():
        return F.gelu(x)
    wide = x.float()
    return (wide * 0.5 * torch.erfc(wide * -math.sqrt(0.5))).to(x.dtype)


@contextmanager
def common_gelu() -> Iterator[None]:
    """F.gelu meanwhile, as people's models call it: the reference's own is more exact, and slower."""
    before = _COMMON_GELU.set(True)
    try:
        yield
    finally:
        _COMMON_GELU.reset(before)


def gate(x: Tensor, activation: str) -> Tensor:
    """What a gated FFN multiplies by: a form of GELU, or SiLU, ``x sigmoid(x)``."""
    if activation == "silu":
        return F.silu(x)
    return gelu(x, {"gelu": "none", "gelu_tanh": "tanh", "gelu_quick": "quick"}[activation])


def partial_gelu_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    w_merged: Tensor | None,
    bias: Tensor | None,
    *,
    norm_eps: float | None = None,
    residual: bool = False,
    approximate: str = "none",
    norm: str = "layer",
    quantize: str = "none",
) -> Tensor:
    """Reference of :func:`repavit_ops.ops.partial_gelu_ffn`, differentiable by plain autograd unless quantized."""
    given, linear = x, _linear(quantize)
    if quantize == "int8":
        x = reference_int8.widened(x)
    z = normed(x, norm_eps, norm)
    y = linear(gelu(linear(z, w_in, b_in), approximate), w_out, bias)
    if w_merged is not None:
        y = y + linear(z, w_merged, None)
    if residual:
        y = y + x
    return (y if quantize == "none" else y.to(given.dtype)).contiguous()


def gated_ffn(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_out: Tensor,
    w_merged: Tensor | None,
    bias: Tensor | None,
    *,
    activation: str,
    norm_eps: float | None = None,
    inner_norm_eps: float | None = None,
    residual: bool = False,
    norm: str = "layer",
    quantize: str = "none",
) -> Tensor:
    """Reference of :func:`repavit_ops.ops.gated_ffn`, differentiable by plain autograd unless quantized."""
    given, linear = x, _linear(quantize)
    if quantize == "int8":
        x = reference_int8.widened(x)
    z = normed(x, norm_eps, norm)
    h = gate(linear(z, w_gate, b_gate), activation) * linear(z, w_up, b_up)
    y = linear(normed(h, inner_norm_eps), w_out, bias)
    if w_merged is not None:
        y = y + linear(z, w_merged, None)
    if residual:
        y = y + x
    return (y if quantize == "none" else y.to(given.dtype)).contiguous()


def rep_attention(
    x: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    attn_bias: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    *,
    num_heads: int,
    scale: float,
    d_qk: int,
    norm_eps: float | None = None,
    residual: bool = False,
    norm: str = "layer",
    qk_norm_eps: float | None = None,
    qk_norm: str = "layer",
    rotary_layout: str = "half",
    inner_norm_eps: float | None = None,
    quantize: str = "none",
) -> Tensor:
    """Reference of :func:`repavit_ops.ops.rep_attention`, differentiable by plain autograd unless quantized."""
    given, linear = x, _linear(quantize)
    if quantize == "int8":
        x = reference_int8.widened(x)
        attn_bias = None if attn_bias is None else attn_bias.to(x.dtype)
    qkv = linear(normed(x, norm_eps, norm), w_qkv, b_qkv)
    if qk_norm_eps is not None or rotary_cos is not None:
        b, t, width = qkv.shape
        q, k, v = qkv.split([num_heads * d_qk, num_heads * d_qk, width - 2 * num_heads * d_qk], dim=-1)
        turned = []
        for heads, affine in ((q, q_norm), (k, k_norm)):
            rows = heads.reshape(b, t, num_heads, d_qk).transpose(1, 2)
            if qk_norm_eps is not None and affine is not None:
                rows = normed(rows, qk_norm_eps, qk_norm) * affine[0] + affine[1]
            if rotary_cos is not None and rotary_sin is not None:
                rows = rotate(rows, rotary_cos, rotary_sin, rotary_layout)
            turned.append(rows.transpose(1, 2).reshape(b, t, num_heads * d_qk))
        qkv = torch.cat((*turned, v), dim=-1)
    o = attention_core(qkv, attn_bias, num_heads, d_qk, scale)
    y = linear(normed(o, inner_norm_eps), w_proj, b_proj)
    if residual:
        y = y + x
    return (y if quantize == "none" else y.to(given.dtype)).contiguous()


def _linear(quantize: str) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """``x Wᵀ + b`` in floats, or in int8 with the result in float32."""
    return reference_int8.linear if quantize == "int8" else F.linear


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotary embedding: pairs (a, b) of channels become (a cos - b sin, b cos + a sin).

    Shapes:
        x         [B, h, T, d]
        cos, sin  broadcastable to [B, h, tokens, width], x's dtype or wider: of the last tokens and the first
                  channels; others stay
        returns   [B, h, T, d]

    Pairs are (i, i + width / 2) of layout "half", (2 i, 2 i + 1) of "interleaved".
    """
    tokens, width = cos.shape[-2:]
    prefix, rest = x.split([x.shape[2] - tokens, tokens], dim=2)
    inner, outer = rest.split([width, x.shape[3] - width], dim=3)
    if layout == "interleaved":
        partner = torch.stack((-inner[..., 1::2], inner[..., ::2]), dim=-1).flatten(-2)
    else:
        partner = torch.cat((-inner[..., width // 2 :], inner[..., : width // 2]), dim=-1)
    inner = (inner * cos + partner * sin).to(x.dtype)
    return torch.cat((prefix, torch.cat((inner, outer), dim=3)), dim=2)


def window_rep_attention(
    x: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    rel_bias: Tensor,
    pad_kv: Tensor | None = None,
    *,
    num_heads: int,
    scale: float,
    window: Sequence[int],
    shift: Sequence[int],
    norm_eps: float | None = None,
    residual: bool = False,
    roll_first: bool = False,
    norm: str = "layer",
    quantize: str = "none",
) -> Tensor:
    """Reference of :func:`repavit_ops.ops.window_rep_attention`, differentiable by plain autograd unless quantized."""
    d_qk = (w_qkv.shape[0] - w_proj.shape[1]) // (2 * num_heads)
    given, linear = x, _linear(quantize)
    if quantize == "int8":
        x, rel_bias = reference_int8.widened(x), reference_int8.widened(rel_bias)
    qkv = linear(normed(x, norm_eps, norm), w_qkv, b_qkv)
    padding = b_qkv if pad_kv is None else F.pad(pad_kv, (num_heads * d_qk, 0))  # its q is never read
    o = window_attention_core(qkv, rel_bias, padding, num_heads, d_qk, scale, window, shift, roll_first)
    y = linear(o, w_proj, b_proj)
    if residual:
        y = y + x
    return (y if quantize == "none" else y.to(given.dtype)).contiguous()


def patch_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    patch: Sequence[int],
    channels_last: bool,
    norm_eps: float | None = None,
) -> Tensor:
    """Reference of :func:`repavit_ops.ops.patch_projection`, differentiable by plain autograd."""
    z = patches(x, patch, channels_last)
    return F.linear(z if norm_eps is None else layer_norm_core(z, norm_eps), weight, bias)


def patches(x: Tensor, patch: Sequence[int], channels_last: bool) -> Tensor:
    """Elements of every whole patch in one row: [B, C, H, W] (or [B, H, W, C]) → [B, H // ph, W // pw, K]."""
    ph, pw = patch
    if channels_last:
        b, h, w, c = x.shape[0], x.shape[1] // ph, x.shape[2] // pw, x.shape[3]
        z = x[:, : h * ph, : w * pw].reshape(b, h, ph, w, pw, c).permute(0, 1, 3, 2, 4, 5)
    else:
        b, c, h, w = x.shape[0], x.shape[1], x.shape[2] // ph, x.shape[3] // pw
        z = x[:, :, : h * ph, : w * pw].reshape(b, c, h, ph, w, pw).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(b, h, w, c * ph * pw)


def token_embedding(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor | None,
    position: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    patch: Sequence[int],
    as_map: bool,
    norm_eps: float | None,
) -> Tensor:
    """``norm([prefix; patches Wᵀ + bias] + position)`` per image, the start of a model (a step of ``fused_blocks``).

    Shapes:
        x         [B, C, H, W]    weight [N, C·ph·pw] or [N, C, ph, pw], bias [N] or None
        prefix    [P, N] or None  rows in front; position [P + h·w, N] or None; either may have a 1 in front
        returns   [B, P + h·w, N] or with ``as_map``, which has no prefix, [B, h, w, N]

    ``norm_eps`` is that of a LayerNorm over N with ``norm_weight`` and ``norm_bias``; None for no norm.
    """
    y = patch_projection(x, weight.flatten(1), bias, patch=patch, channels_last=False)
    size = y.shape
    y = y.flatten(1, 2)
    if prefix is not None:
        y = torch.cat((prefix.expand(y.shape[0], *prefix.shape[-2:]), y), dim=1)
    if position is not None:
        y = y + position
    if as_map:
        y = y.view(size)
    return y if norm_eps is None else F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, norm_eps)


def pooled_head(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    first: int,
    count: int,
    norm_eps: float | None,
) -> Tensor:
    """``mean(norm(x)) Wᵀ + bias`` over tokens, the end of a classifier (a step of ``fused_blocks``).

    Shapes:
        x         [B, T, C] or [B, H, W, C]
        weight    [N, C] or None: the pooled feature itself; bias [N] or None
        returns   [B, N]  or [B, C]

    The mean is over ``count`` tokens (0: all the rest) from ``first`` on; the norm as in :func:`token_embedding`.
    """
    x = x.flatten(1, -2)
    tokens = x.shape[1]
    if not (0 <= first < tokens and 0 <= count <= tokens - first):  # a slice would take what there is, or count back
        raise ValueError(
            f"first, count: got {first} and {count} for {tokens} tokens, wanted a range of them (count 0: the rest)"
        )
    x = x[:, first : first + count if count else None]
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    x = x.mean(dim=1)
    return x if weight is None else F.linear(x, weight, bias)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        partial_gelu_ffn,
        gated_ffn,
        rep_attention,
        window_rep_attention,
        patch_projection,
        token_embedding,
        pooled_head,
    )
}


PYTORCH = {name: common_gelu()(formula) for name, formula in OPERATORS.items()}


def form(operator: str, backend: str) -> Callable[..., Tensor]:
    """The formula of an operator: its definition, or for backend "pytorch" with the GELU that people's models call."""
    return (PYTORCH if backend == "pytorch" and not torch.compiler.is_compiling() else OPERATORS)[operator]


def fused_blocks(
    x: Tensor, weights: Sequence[Tensor | None], *, plan: Sequence[int], scalars: Sequence[float]
) -> Tensor:
    """Reference of :func:`repavit_ops.ops.fused_blocks`: its steps one after the other."""
    for step in stack_plan.decode(weights, plan, scalars):
        x = run_step(step, x)
    return x


def run_step(step: stack_plan.Step, x: Tensor) -> Tensor:
    """One step of :func:`fused_blocks`."""
    return OPERATORS[step.operator](x, *step.tensors, **step.static)


def attention_core(qkv: Tensor, bias: Tensor | None, num_heads: int, d_qk: int, scale: float) -> Tensor:
    """``softmax(scale · q kᵀ + bias) v`` per head: [B, T, q | k | v] → [B, T, h · d_v]."""
    b, t, width = qkv.shape
    d_v = (width - 2 * num_heads * d_qk) // num_heads if num_heads else 0
    q, k, v = qkv.split([num_heads * d_qk, num_heads * d_qk, num_heads * d_v], dim=-1)
    q, k, v = (p.view(b, t, num_heads, d).transpose(1, 2) for p, d in ((q, d_qk), (k, d_qk), (v, d_v)))
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
        if (not torch.is_grad_enabled() and not backends.in_forward_mode()) or backends.exports_to_onnx():
            bias = bias.detach()  # PyTorch takes its slow way where a mask could get a gradient, its exporter fails
    if backends.in_transform():  # PyTorch would take a kernel that no transform knows and that gives masks no gradient
        with sdpa_kernel(SDPBackend.MATH):
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return o.transpose(1, 2).reshape(b, t, num_heads * d_v)


def window_attention_core(
    qkv: Tensor,
    rel_bias: Tensor,
    padding: Tensor | None,
    num_heads: int,
    d_qk: int,
    scale: float,
    window: Sequence[int],
    shift: Sequence[int],
    roll_first: bool,
) -> Tensor:
    """:func:`attention_core` within (shifted) windows: [B, H, W, q | k | v] → [B, H, W, h · d_v].

    ``padding`` is the qkv row of the tokens that fill up the last windows (None: zeros): padding stands after the
    projection because a padded token is zero after the norm, so its row is a constant.
    """
    batch, height, width, _ = qkv.shape
    shifted = any(shift)
    roll, unroll = (-shift[0], -shift[1]), (shift[0], shift[1])
    if shifted and roll_first:
        qkv = torch.roll(qkv, roll, (1, 2))
    qkv = _pad_tokens(qkv, window, padding)
    if shifted and not roll_first:
        qkv = torch.roll(qkv, roll, (1, 2))

    padded = (qkv.shape[1], qkv.shape[2])
    bias = rel_bias.unsqueeze(0)
    if shifted:
        mask = shift_mask(padded, window, shift, qkv.dtype, qkv.device)
        bias = (bias + mask.unsqueeze(1)).repeat(batch, 1, 1, 1)
    o = attention_core(window_partition(qkv, window), bias, num_heads, d_qk, scale)
    o = window_reverse(o, window, padded, batch)

    if shifted and not roll_first:
        o = torch.roll(o, unroll, (1, 2))
    o = o[:, :height, :width]
    if shifted and roll_first:
        o = torch.roll(o, unroll, (1, 2))
    return o


def window_partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """[B, H, W, D] → [B · windows, wh · ww, D], windows and their tokens in row-major order."""
    b, h, w, d = x.shape
    wh, ww = window
    x = x.view(b, h // wh, wh, w // ww, ww, d)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b * (h // wh) * (w // ww), wh * ww, d)


def window_reverse(windows: Tensor, window: Sequence[int], size: tuple[int, int], batch: int) -> Tensor:
    """Inverse of :func:`window_partition`: [B · windows, wh · ww, D] → [B, H, W, D]."""
    h, w = size
    wh, ww = window
    x = windows.view(batch, h // wh, w // ww, wh, ww, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, h, w, windows.shape[-1])


def shift_mask(
    size: tuple[int, int], window: Sequence[int], shift: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Mask [windows, N, N] of a shifted map: 0 inside one region, ``SHIFT_MASK`` across (Swin)."""
    rows, columns = (_regions(extent, w, s, device) for extent, w, s in zip(size, window, shift, strict=True))
    # any map (row region, column region) → id that keeps pairs apart will do
    region = (rows.unsqueeze(1) * 3 + columns.unsqueeze(0)).view(1, *size, 1)
    region = window_partition(region, window).squeeze(-1)
    differ = region.unsqueeze(1) != region.unsqueeze(2)
    return differ.to(dtype) * SHIFT_MASK


def _regions(extent: int, window: int, shift: int, device: torch.device) -> Tensor:
    """0 before the last window, 1 within it, 2 where the roll brought the other edge (Swin's slices)."""
    position = torch.arange(extent, device=device)
    if shift == 0:
        return torch.zeros_like(position)
    return (position >= extent - window).long() + (position >= extent - shift).long()


def _pad_tokens(qkv: Tensor, window: Sequence[int], row: Tensor | None) -> Tensor:
    """Pad [B, H, W, D] at the right and the bottom to whole windows with the given row (None: zeros)."""
    h, w = qkv.shape[1:3]
    right, bottom = -w % window[1], -h % window[0]
    if right == 0 and bottom == 0:
        return qkv
    padded = F.pad(qkv, (0, 0, 0, right, 0, bottom))
    if row is None:
        return padded
    outside = F.pad(qkv.new_zeros(h, w, 1), (0, 0, 0, right, 0, bottom), value=1.0)
    return padded + outside * row
