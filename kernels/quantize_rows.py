"""Rows of floats as bytes about 0, with what they stand for (:mod:`repavit_ops.reference_int8` is the definition).

    tokens   x[t] ≈ s_t (q + 128) + o_t,  q from -128 to 127      by default, behind their norm if they have one
    weights  w[n] ≈ s_n q,                q from -127 to 127      and the sum of each row's q

Shapes: x [M, K] rows of any stride → q [M, K'], K' a multiple of 16 with zeros behind K; scale, offset fp32 [M]; sums
int32 [M].

Design:
1. A program holds a few rows and reads them two or three times: moments of the norm, extremes, numbers. From L2 all but
   the first cost little.
2. A GPU multiplies bytes of one kind, so tokens are shifted by 128; int8.py puts that back, exactly.
3. Weights are quantized in the call, as nothing is packed on a GPU: outputs follow them whoever writes, in CUDA graphs
   too. It reads each weight once more, which is little beside a product of hundreds of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_int8 import TINY
from .layer_norm import ELEMENTS
from .operands import ALIGNMENT, FP_FUSION, as_rows
from .tile import load_tile, root_mean_square, row_moments

LARGEST = tl.constexpr(3.4028234663852886e38)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 · 2**23: what is added to it has no room for a fraction
LEAST_SPAN = tl.constexpr(TINY)


class Rows(NamedTuple):
    """Quantized tokens [M, K]; ``k`` is K, beyond which q holds zeros."""

    q: Tensor
    scale: Tensor
    offset: Tensor
    k: int


class Columns(NamedTuple):
    """Quantized weights [N, K], rows of which give columns of a result."""

    q: Tensor
    scale: Tensor
    sums: Tensor


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x,  # [M, K]
    x_stride,
    q,  # [M, PADDED]
    scale,  # [M]
    offset,  # [M], of tokens; of weights their sums
    M,
    K,
    PADDED,
    eps,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    NORM: tl.constexpr,  # "none" | "layer" | "rms"
    WEIGHTS: tl.constexpr,
):
    row0 = tl.program_id(0) * BM
    mean = tl.zeros([BM], tl.float32)
    rstd = tl.full([BM], 1.0, tl.float32)
    shrink = tl.full([BM], 1.0, tl.float32)
    if NORM == "layer":
        mean, rstd, shrink = row_moments(x, x_stride, row0, M, K, eps, BM, BK, EVEN, False)
    if NORM == "rms":
        mean, rstd, shrink = root_mean_square(x, x_stride, row0, M, K, eps, BM, BK, EVEN)

    least = tl.full([BM], float("inf"), tl.float32)
    most = tl.full([BM], float("-inf"), tl.float32)
    wrong = tl.zeros([BM], tl.float32)  # NaN of a NaN or an infinity
    for k in range(0, K, BK):
        inside = (k + tl.arange(0, BK) < K)[None, :]
        v = _normalised(x, x_stride, row0, M, k, K, mean, rstd, shrink, BM, BK, EVEN)
        wrong += tl.sum(tl.where(inside, v * 0.0, 0.0), 1)
        if WEIGHTS:
            v = tl.abs(v)
        least = tl.minimum(least, tl.min(tl.where(inside, v, float("inf")), 1))
        most = tl.maximum(most, tl.max(tl.where(inside, v, float("-inf")), 1))
    if WEIGHTS:
        least = tl.zeros([BM], tl.float32)
    span = most - least
    finite = (wrong == 0.0) & (span <= LARGEST)
    used = finite & (span >= LEAST_SPAN)
    steps = 127.0 if WEIGHTS else 255.0
    factor = tl.where(used, tl.div_rn(tl.full([BM], steps, tl.float32), tl.where(used, span, 1.0)), 0.0)
    one = tl.where(used, tl.div_rn(span, tl.full([BM], steps, tl.float32)), tl.where(finite, 0.0, float("nan")))

    row = row0 + tl.arange(0, BM)
    sums = tl.zeros([BM], tl.int32)
    for k in range(0, PADDED, BK):
        col = k + tl.arange(0, BK)
        v = _normalised(x, x_stride, row0, M, k, K, mean, rstd, shrink, BM, BK, False)
        kept = used[:, None] & (col < K)[None, :]
        whole = (tl.where(kept, (v - least[:, None]) * factor[:, None], 0.0) + ROUNDING) - ROUNDING
        numbers = whole.to(tl.int32)
        if WEIGHTS:
            sums += tl.sum(numbers, 1)
        else:
            numbers = tl.where((col < K)[None, :], numbers - 128, 0)
        at = q + row.to(tl.int64)[:, None] * PADDED + col[None, :]
        tl.store(at, numbers.to(tl.int8), mask=(row < M)[:, None] & (col < PADDED)[None, :])
    tl.store(scale + row, one, mask=row < M)
    if WEIGHTS:
        tl.store(offset + row, sums, mask=row < M)
    else:
        tl.store(offset + row, tl.where(finite, least, 0.0), mask=row < M)


@triton.jit
def _normalised(x, x_stride, row0, M, k, K, mean, rstd, shrink, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """Columns k to k + BK of the rows behind their norm, in fp32: unlike ``normalise`` never rounded to x's dtype."""
    v = load_tile(x, x_stride, row0, M, k, K, BM, BK, EVEN, False).to(tl.float32)
    return (v * shrink[:, None] - mean[:, None]) * rstd[:, None]


def quantize_rows(x: Tensor, norm_eps: float | None = None, norm: str = "layer") -> Rows:
    """Tokens x [..., K] behind their norm, each row with a scale of its own."""
    rows = as_rows(x)
    q, scale, offset = _empty(rows, torch.float32)
    _launch(rows, q, scale, offset, norm_eps or 0.0, "none" if norm_eps is None else norm, False)
    return Rows(q, scale, offset, rows.shape[1])


def quantize_weights(w: Tensor) -> Columns:
    """Weights w [N, K], each row with a scale of its own."""
    rows = as_rows(w)
    q, scale, sums = _empty(rows, torch.int32)
    _launch(rows, q, scale, sums, 0.0, "none", True)
    return Columns(q, scale, sums)


def _empty(rows: Tensor, third: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the bytes, the scales and what stands beside them; zeros where there is nothing to quantize."""
    m, k = rows.shape
    made = torch.empty if k else torch.zeros
    padded = triton.cdiv(k, ALIGNMENT) * ALIGNMENT
    return (
        torch.empty(m, padded, dtype=torch.int8, device=rows.device),
        made(m, dtype=torch.float32, device=rows.device),
        made(m, dtype=third, device=rows.device),
    )


def _launch(rows: Tensor, q: Tensor, scale: Tensor, other: Tensor, eps: float, norm: str, weights: bool) -> None:
    m, k = rows.shape
    if not rows.numel():
        return
    bk = min(triton.next_power_of_2(k), ELEMENTS)
    bm = ELEMENTS // bk
    quantize_rows_kernel[(triton.cdiv(m, bm),)](
        rows, rows.stride(0), q, scale, other, m, k, q.shape[1], eps, bm, bk, k % bk == 0, norm, weights,
        num_warps=4, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
