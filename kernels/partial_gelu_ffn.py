"""The deployed channel-idle FFN in two launches.

    K1 (linear.py)   h = gelu(z · w_inᵀ + b_in)
    K2 (here)        y = z · w_mergedᵀ + h · w_outᵀ + bias + residual

Shapes: x, z, y [M, C] (z is x or its LayerNorm core), h [M, H], w_in [H, C], w_out [C, H], w_merged [C, C].

Design:
1. K2 is one product over two sources, [z | h] · [w_merged | w_out]ᵀ, with one fp32 sum: two loops in a row, nothing
   concatenated in memory, no result of the first half ever rounded. z comes first: it is ready before h.
2. The residual is added in fp32, from the raw x; folded into a low-precision w_merged it would lose digits.
3. Narrow tokens take one launch instead (on_chip_ffn.py), where the table or the rule of thumb says so.
4. In int8 both products are int8.py's, with z and h quantized in front of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .chips import chip_of
from .int8 import int8_linear
from .layer_norm import core
from .linear import ACTIVATIONS, linear, vendor_linear
from .on_chip_ffn import on_chip_ffn
from .operands import FP_FUSION, are_aligned, as_rows, as_vector, describe, product_precision
from .quantize_rows import Rows, quantize_rows, quantize_weights
from .tile import accumulate, finish, tile_corner
from .tuning import Config


@triton.jit(do_not_specialize=["M"])
def two_source_kernel(
    z,  # [M, C]
    z_stride,
    w_merged,  # [N, C]
    merged_stride,
    h,  # [M, H]
    h_stride,
    w_out,  # [N, H]
    out_weight_stride,
    bias,  # [N] or None
    residual,  # [M, N] or None; always a pointer
    residual_stride,
    y,  # [M, N]
    y_stride,
    M,
    N,
    C,
    H,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_C: tl.constexpr,  # BK divides C
    EVEN_H: tl.constexpr,
    TMA: tl.constexpr,  # all matrices but residual are descriptors
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" | "tf32"
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        row0, col0 = tile_corner(tile, M, N, BM, BN)
        total = tl.zeros([BM, BN], tl.float32)
        total = accumulate(
            total, z, z_stride, w_merged, merged_stride, row0, M, col0, N, C, 0.0, 1.0, 1.0,
            BM, BN, BK, EVEN_C, TMA, False, PRECISION,
        )  # fmt: skip
        total = accumulate(
            total, h, h_stride, w_out, out_weight_stride, row0, M, col0, N, H, 0.0, 1.0, 1.0,
            BM, BN, BK, EVEN_H, TMA, False, PRECISION,
        )  # fmt: skip
        finish(total, bias, residual, residual_stride, y, y_stride, row0, M, col0, N, BM, BN, "none", False, TMA, SPLIT)


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
    """Launcher of :func:`repavit_ops.ops.partial_gelu_ffn`, same arguments."""
    rows = as_rows(x)
    activation = ACTIVATIONS[approximate]
    if quantize == "int8":
        z = quantize_rows(rows, norm_eps, norm)
        h = int8_linear(z, quantize_weights(w_in), b_in, torch.float32, activation=activation)
        return int8_second(h, z, w_out, w_merged, bias, rows if residual else None, x.dtype).view(x.shape)
    (m, c), hidden = rows.shape, w_in.shape[0]
    config = None if norm == "rms" else tuning.choose_on_chip(chip_of(x.device), x.dtype, m, c, hidden)
    operands = (rows, w_in, b_in, w_out, w_merged, bias, norm_eps, residual, activation)
    y = two_launches(*operands, norm) if config is None else on_chip_ffn(*operands, config)
    return y.view(x.shape)


def int8_second(
    h: Tensor,
    z: Rows,
    w_out: Tensor,
    w_merged: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``h w_outᵀ + z w_mergedᵀ + bias + residual`` in int8, of h in fp32 [M, H] and z as it is quantized."""
    merged = None if w_merged is None else (z, quantize_weights(w_merged))
    return int8_linear(quantize_rows(h), quantize_weights(w_out), bias, dtype, residual=residual, second=merged)


def two_launches(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    w_merged: Tensor | None,
    bias: Tensor | None,
    norm_eps: float | None,
    residual: bool,
    activation: str,
    norm: str = "layer",
) -> Tensor:
    """K1 and K2 on the rows of x [M, C], whose columns have stride 1."""
    z = x
    if norm_eps is not None and (
        w_merged is not None or norm == "rms"
    ):  # both launches read it, or no prologue takes it
        z, norm_eps = core(x, norm_eps, norm), None
    h = linear(z, w_in, b_in, activation=activation, norm_eps=norm_eps)
    shortcut = x if residual else None
    if w_merged is None:
        return linear(h, w_out, bias, residual=shortcut)
    return two_source(z, w_merged, h, w_out, bias, shortcut)


def two_source(
    z: Tensor,
    w_merged: Tensor,
    h: Tensor,
    w_out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """K2: ``z w_mergedᵀ + h w_outᵀ + bias + residual``.

    Shapes:
        z  [M, C], w_merged [N, C]; h [M, H], w_out [N, H]; columns of z, h and residual have stride 1
        bias [N] or None; residual [M, N] or None
        returns [M, N]
    """
    (m, c), hidden, n = z.shape, h.shape[1], w_merged.shape[0]
    if hidden == 0:
        return linear(z, w_merged, bias, residual=residual)
    w_merged, w_out = as_rows(w_merged), as_rows(w_out)
    y = torch.empty(m, n, dtype=z.dtype, device=z.device)
    if not y.numel():
        return y
    matrices = (z, w_merged, h, w_out, y)
    chip, aligned = chip_of(z.device), are_aligned(*matrices)
    config = config or tuning.choose("two_source", chip, z.dtype, m, n, c + hidden, aligned)
    if config.vendor:
        return vendor_linear(z, w_merged, bias, "none", residual).addmm_(h, w_out.t())
    tma = config.tma and aligned and c > 0
    left, right, result = (config.bm, config.bk), (config.bn, config.bk), (config.bm, config.stored_columns)
    blocks = (left, right, left, right, result)
    z_, merged_, h_, out_, y_ = describe(matrices, blocks) if tma else matrices
    two_source_kernel[config.grid(chip, m, n)](
        z_, z.stride(0), merged_, w_merged.stride(0), h_, h.stride(0), out_, w_out.stride(0),
        as_vector(bias), residual, 0 if residual is None else residual.stride(0), y_, n,
        m, n, c, hidden,
        config.bm, config.bn, config.bk, c % config.bk == 0, hidden % config.bk == 0, tma, config.split,
        product_precision(), num_warps=config.warps, num_stages=config.stages,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return y
