"""K1: out = activation(core(x) · weightᵀ + bias) + residual in one launch.

Shapes: x [..., K], weight [N, K] in nn.Linear layout, bias [N], residual and out [..., N].

Design:
1. One fp32 sum per element of out; bias, GELU and residual are added to it before its only rounding.
2. x's LayerNorm core is taken either in the kernel's prologue (few rows: a launch less) or by a kernel in front (many
   rows: its result is read again by every column of tiles).
3. Tiles come through tensor descriptors where chip and alignment allow, through pointers elsewhere: same kernel.
   Descriptors are made by the host, so that nothing is allocated on the device and graphs can be captured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from . import tuning
from .chips import chip_of
from .layer_norm import core, layer_norm_core
from .operands import FP_FUSION, are_aligned, as_rows, as_vector, describe, product_precision
from .tile import accumulate, finish, row_moments, tile_corner
from .tuning import Config

ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}  # of kernels, by ``approximate``


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x,  # [M, K]
    x_stride,
    weight,  # [N, K]
    weight_stride,
    bias,  # [N] or None
    residual,  # [M, N] or None; always a pointer
    residual_stride,
    out,  # [M, N]
    out_stride,
    M,
    N,
    K,
    eps,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "none" | "gelu" | "gelu_tanh" | "gelu_quick"
    NORM: tl.constexpr,  # rows of x are normalised first
    EVEN: tl.constexpr,  # BK divides K
    TMA: tl.constexpr,  # x, weight and out are descriptors
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,  # fp32 accuracy of the activation
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" | "tf32"
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        row0, col0 = tile_corner(tile, M, N, BM, BN)
        mean, rstd, scale = 0.0, 1.0, 1.0
        if NORM:
            mean, rstd, scale = row_moments(x, x_stride, row0, M, K, eps, BM, BK, EVEN, TMA)
        total = tl.zeros([BM, BN], tl.float32)
        total = accumulate(
            total, x, x_stride, weight, weight_stride, row0, M, col0, N, K, mean, rstd, scale,
            BM, BN, BK, EVEN, TMA, NORM, PRECISION,
        )  # fmt: skip
        finish(
            total, bias, residual, residual_stride, out, out_stride, row0, M, col0, N,
            BM, BN, ACTIVATION, EXACT, TMA, SPLIT,
        )  # fmt: skip


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    norm_eps: float | None = None,
    norm: str = "layer",
    residual: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``activation(z weightᵀ + bias) + residual``, z = x or its core when ``norm_eps`` is given.

    Shapes:
        x         [..., K]   fp32 | bf16 | fp16; any strides
        weight    [N, K]     bias [N] or None
        residual  [..., N]   added in fp32; or None
        returns   [..., N]   contiguous, x's dtype

    Args:
        activation: "none", or a GELU as ``ACTIVATIONS`` names it.
        norm: "layer", or "rms", which a kernel in front always takes.
        config: the tile to take instead of the table's (tests, tuner).
    """
    rows, weight = as_rows(x), as_rows(weight)
    if norm == "rms" and norm_eps is not None:
        rows, norm_eps = core(rows, norm_eps, norm), None
    (m, k), n = rows.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out.view(*x.shape[:-1], n)

    chip, aligned = chip_of(x.device), are_aligned(rows, weight, out)
    kind = "linear" + ("_norm" if norm_eps is not None else "") + ("_gelu" if activation != "none" else "")
    config = config or tuning.choose(kind, chip, x.dtype, m, n, k, aligned)
    if norm_eps is not None and not config.norm_prologue:
        rows, norm_eps = layer_norm_core(rows, norm_eps), None
    shortcut = None if residual is None else as_rows(residual)
    if config.vendor:
        return vendor_linear(rows, weight, bias, activation, shortcut).view(*x.shape[:-1], n)

    tma = config.tma and aligned and k > 0
    matrices = (rows, weight, out)
    blocks = ((config.bm, config.bk), (config.bn, config.bk), (config.bm, config.stored_columns))
    x_, weight_, out_ = describe(matrices, blocks) if tma else matrices
    linear_kernel[config.grid(chip, m, n)](
        x_, rows.stride(0), weight_, weight.stride(0), as_vector(bias),
        shortcut, 0 if shortcut is None else shortcut.stride(0), out_, n,
        m, n, k, norm_eps or 0.0,
        config.bm, config.bn, config.bk, activation, norm_eps is not None and k > 0, k % config.bk == 0,
        tma, config.split, x.dtype == torch.float32, product_precision(),
        num_warps=config.warps, num_stages=config.stages,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)


def vendor_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """The same by PyTorch's own products: where a table found them faster."""
    y = F.linear(x, weight, bias)
    if activation != "none":
        y = reference.gelu(y, next(form for form, name in ACTIVATIONS.items() if name == activation))
    return y if residual is None else y.add_(residual)
