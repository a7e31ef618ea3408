"""QK-norm and rotary embedding between a projection and its attention: one launch, a copy of q | k | v.

Shapes: qkv, out [B · T, h·d_qk + h·d_qk + h·d_v], rows q | k | v, head-major in each; q_norm, k_norm [2, d_qk];
cos, sin [B, h, tokens, width] by strides.

Not in place: a program reads both channels of a pair, and threads of a program do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import FP_FUSION

ROWS = 16  # of one program


@triton.jit(do_not_specialize=["M", "T"])
def query_key_kernel(
    qkv,  # [M, width of all]
    qkv_stride,
    out,  # the same, contiguous
    out_stride,
    q_norm,  # [2, D] or None: weight, bias
    k_norm,
    cos,  # by strides, or None
    cos_image,
    cos_head,
    cos_token,
    sin,
    sin_image,
    sin_head,
    sin_token,
    M,
    T,  # tokens of an image
    HEADS,
    D,  # d_qk
    DV,
    PREFIX,  # tokens of an image that are not turned
    TURNED,  # channels of a head that are
    eps,
    BM: tl.constexpr,
    BD: tl.constexpr,  # covers D and DV
    RMS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    head, part = tl.program_id(1), tl.program_id(2)  # part: q, k, v
    col = tl.arange(0, BD)
    width = tl.where(part == 2, DV, D)
    first = part * HEADS * D + head * width
    inside = (row < M)[:, None] & (col < width)[None, :]
    at = qkv + row.to(tl.int64)[:, None] * qkv_stride + first
    x = tl.load(at + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if part < 2:
        if INTERLEAVED:
            partner = col ^ 1
            sign = tl.where(col % 2 == 0, -1.0, 1.0)
        else:
            half = TURNED // 2
            partner = tl.where(col < half, col + half, col - half)
            sign = tl.where(col < half, -1.0, 1.0)
        partner = tl.where(col < TURNED, partner, col)
        other = tl.load(at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if q_norm is not None:
            mean = tl.zeros([BM], tl.float32)
            if not RMS:
                mean = tl.sum(x, 1) / D
            off = tl.where((col < D)[None, :], x - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt_rn(tl.sum(off * off, 1) / D + eps)
            norm = tl.where(part == 0, q_norm, k_norm)
            weight = tl.load(norm + col, mask=col < D, other=0.0).to(tl.float32)
            bias = tl.load(norm + D + col, mask=col < D, other=0.0).to(tl.float32)
            x = off * rstd[:, None] * weight[None, :] + bias[None, :]
            weight = tl.load(norm + partner, mask=col < D, other=0.0).to(tl.float32)
            bias = tl.load(norm + D + partner, mask=col < D, other=0.0).to(tl.float32)
            other = (other - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        if cos is not None:
            image, token = (row // T).to(tl.int64), row % T - PREFIX
            turned = ((row < M) & (token >= 0))[:, None] & (col < TURNED)[None, :]
            place = image * cos_image + head * cos_head + token * cos_token
            c = tl.load(cos + place[:, None] + col[None, :], mask=turned, other=1.0).to(tl.float32)
            place = image * sin_image + head * sin_head + token * sin_token
            s = tl.load(sin + place[:, None] + col[None, :], mask=turned, other=0.0).to(tl.float32)
            x = x * c + sign[None, :] * other * s
    to = out + row.to(tl.int64)[:, None] * out_stride + first + col[None, :]
    tl.store(to, x.to(out.dtype.element_ty), mask=inside)


def query_key_rows(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    num_heads: int,
    d_qk: int,
    eps: float | None,
    norm: str,
    layout: str,
) -> Tensor:
    """qkv [B, T, q | k | v] with q and k of every head through norm and rotation; arguments as rep_attention's."""
    b, t, width = qkv.shape
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    d_v = width // num_heads - 2 * d_qk
    turned, prefix, tables = 0, 0, []
    for table in (cos, sin):
        strides: Sequence[int] = (0, 0, 0)
        if table is not None:
            table = table if table.stride(-1) == 1 else table.contiguous()
            turned, prefix = table.shape[-1], t - table.shape[-2]
            strides = table.expand(b, num_heads, *table.shape[-2:]).stride()[:3]
        tables += [table, *strides]
    normed = eps is not None and q_norm is not None and k_norm is not None
    query_key_kernel[(triton.cdiv(b * t, ROWS), num_heads, 3)](
        qkv, qkv.stride(1), out, width,
        q_norm.contiguous() if normed and q_norm is not None else None,
        k_norm.contiguous() if normed and k_norm is not None else None,
        *tables, b * t, t, num_heads, d_qk, d_v, prefix, turned, eps or 0.0,
        ROWS, triton.next_power_of_2(max(d_qk, d_v, 1)), norm == "rms", layout == "interleaved",
        num_warps=4, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out
