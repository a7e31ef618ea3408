"""The deployed channel-idle FFN in one launch, for narrow tokens: h never leaves the chip.

    y = gelu(z · w_inᵀ + b_in) · w_outᵀ + z · w_mergedᵀ + bias + residual

Shapes: x, z, y [M, C] (z is x or its LayerNorm core), w_in [H, C], w_out [C, H], w_merged [C, C].

Design:
1. A program keeps whole rows: z, as TILES tiles of BC columns, and the fp32 sums of y, as many. h comes in chunks of BH
   columns, each used up before the next, so H may be anything.
2. Every program reads all weights. From L2 that pays at C = 192, not at C = 768, whose rows would not fit anyway.
3. The LayerNorm core costs a few instructions: the rows are here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import FP_FUSION, are_aligned, as_rows, as_vector, describe, product_precision
from .tile import activate, finish, load_tile, normalise, row_moments
from .tuning import OnChip


@triton.jit(do_not_specialize=["M"])
def on_chip_kernel(
    x,  # [M, C]
    x_stride,
    w_in,  # [H, C]
    in_stride,
    b_in,  # [H] or None
    w_out,  # [C, H]
    out_weight_stride,
    w_merged,  # [C, C] or None
    merged_stride,
    bias,  # [C] or None
    residual,  # [M, C] or None; always a pointer
    residual_stride,
    y,  # [M, C]
    y_stride,
    M,
    C,
    H,
    eps,
    BM: tl.constexpr,
    BH: tl.constexpr,  # columns of h at a time
    BC: tl.constexpr,  # columns of x, z and y in one tile
    TILES: tl.constexpr,  # tiles that cover C
    ACTIVATION: tl.constexpr,  # "gelu" | "gelu_tanh" | "gelu_quick"
    NORM: tl.constexpr,
    EVEN_C: tl.constexpr,  # BC divides C
    EVEN_H: tl.constexpr,  # BH divides H
    TMA: tl.constexpr,  # all matrices but residual are descriptors
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row0 = tl.program_id(0) * BM
    mean, rstd, scale = 0.0, 1.0, 1.0
    if NORM:
        mean, rstd, scale = row_moments(x, x_stride, row0, M, C, eps, BM, BC, EVEN_C, TMA)
    z, total = (), ()
    for i in tl.static_range(TILES):
        tile = load_tile(x, x_stride, row0, M, i * BC, C, BM, BC, EVEN_C, TMA)
        z += (normalise(tile, mean, rstd, scale, NORM),)
        total += (tl.zeros([BM, BC], tl.float32),)

    for start in range(0, H, BH):
        h = tl.zeros([BM, BH], tl.float32)
        for i in tl.static_range(TILES):
            weight = load_tile(w_in, in_stride, start, H, i * BC, C, BH, BC, EVEN_C, TMA)
            h = tl.dot(z[i], weight.T, h, input_precision=PRECISION)
        if b_in is not None:
            col = start + tl.arange(0, BH)
            h += tl.load(b_in + col, mask=col < H, other=0.0).to(tl.float32)[None, :]
        h = activate(h, ACTIVATION, EXACT).to(z[0].dtype)
        sums = ()
        for i in tl.static_range(TILES):
            weight = load_tile(w_out, out_weight_stride, i * BC, C, start, H, BC, BH, EVEN_H, TMA)
            sums += (tl.dot(h, weight.T, total[i], input_precision=PRECISION),)
        total = sums

    if w_merged is not None:
        for k in range(0, C, BC):
            tile = load_tile(x, x_stride, row0, M, k, C, BM, BC, EVEN_C, TMA)
            tile = normalise(tile, mean, rstd, scale, NORM)
            sums = ()
            for i in tl.static_range(TILES):
                weight = load_tile(w_merged, merged_stride, i * BC, C, k, C, BC, BC, EVEN_C, TMA)
                sums += (tl.dot(tile, weight.T, total[i], input_precision=PRECISION),)
            total = sums

    for i in tl.static_range(TILES):
        finish(
            total[i], bias, residual, residual_stride, y, y_stride, row0, M, i * BC, C,
            BM, BC, "none", False, TMA, False,
        )  # fmt: skip


def on_chip_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    w_merged: Tensor | None,
    bias: Tensor | None,
    norm_eps: float | None,
    residual: bool,
    activation: str,
    config: OnChip,
) -> Tensor:
    """FFN of the rows of x [M, C], whose columns have stride 1; other arguments as partial_gelu_ffn has them."""
    (m, c), hidden = x.shape, w_in.shape[0]
    w_in, w_out = as_rows(w_in), as_rows(w_out)
    merged = None if w_merged is None else as_rows(w_merged)
    y = torch.empty(m, c, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    matrices = [x, w_in, w_out, y] + ([] if merged is None else [merged])
    tma = config.tma and hidden > 0 and are_aligned(*matrices)
    blocks = [(config.bm, config.bc), (config.bh, config.bc), (config.bc, config.bh), (config.bm, config.bc)]
    x_, in_, out_, y_, *rest = describe(matrices, [*blocks, (config.bc, config.bc)]) if tma else matrices
    on_chip_kernel[(triton.cdiv(m, config.bm),)](
        x_, x.stride(0), in_, w_in.stride(0), as_vector(b_in), out_, w_out.stride(0),
        rest[0] if rest else None, 0 if merged is None else merged.stride(0), as_vector(bias),
        x if residual else None, x.stride(0), y_, c,
        m, c, hidden, norm_eps or 0.0,
        config.bm, config.bh, config.bc, triton.cdiv(c, config.bc), activation, norm_eps is not None,
        c % config.bc == 0, hidden % config.bh == 0, tma, x.dtype == torch.float32,
        product_precision(), num_warps=config.warps, num_stages=config.stages,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return y
