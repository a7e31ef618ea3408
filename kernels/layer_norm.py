"""LayerNorm core, (x - mean) / √(variance + eps) over the last dimension, or RMSNorm's, x / √(mean(x²) + eps).

One launch, in front of a product.

Shapes: x [M, K] rows of any stride → [M, K] contiguous, x's dtype, moments in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import FP_FUSION
from .tile import load_tile, normalise, root_mean_square, row_moments

ELEMENTS = 4096  # of one program, about: 8 to 32 KiB in registers


@triton.jit(do_not_specialize=["M"])
def layer_norm_core_kernel(
    x,  # [M, K]
    x_stride,
    out,  # [M, K]
    M,
    K,
    eps,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    RMS: tl.constexpr,
):
    row0 = tl.program_id(0) * BM
    if RMS:
        mean, rstd, scale = root_mean_square(x, x_stride, row0, M, K, eps, BM, BK, EVEN)
    else:
        mean, rstd, scale = row_moments(x, x_stride, row0, M, K, eps, BM, BK, EVEN, False)
    row = row0 + tl.arange(0, BM)
    for k in range(0, K, BK):
        col = k + tl.arange(0, BK)
        core = normalise(load_tile(x, x_stride, row0, M, k, K, BM, BK, EVEN, False), mean, rstd, scale, True)
        at = out + row.to(tl.int64)[:, None] * K + col[None, :]
        tl.store(at, core, mask=(row < M)[:, None] & (col < K)[None, :])


def layer_norm_core(x: Tensor, eps: float) -> Tensor:
    """LayerNorm core of the rows of x [M, K], whose columns have stride 1."""
    return core(x, eps, "layer")


def core(x: Tensor, eps: float, norm: str) -> Tensor:
    """Core of the rows of x [M, K], whose columns have stride 1, under "layer" or "rms"."""
    m, k = x.shape
    out = torch.empty(m, k, dtype=x.dtype, device=x.device)
    if out.numel():
        bk = min(triton.next_power_of_2(k), ELEMENTS)
        bm = ELEMENTS // bk
        grid = (triton.cdiv(m, bm),)
        layer_norm_core_kernel[grid](
            x, x.stride(0), out, m, k, eps, bm, bk, k % bk == 0, norm == "rms",
            num_warps=4, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out
