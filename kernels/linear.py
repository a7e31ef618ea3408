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
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .chips import Chip, chip_of
from .layer_norm import layer_norm_core
from .tile import accumulate, finish, row_moments, tile_corner
from .tuning import Config

ALIGNMENT = 16  # bytes


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
    ACTIVATION: tl.constexpr,  # "none" | "gelu" | "gelu_tanh"
    NORM: tl.constexpr,  # rows of x are normalised first
    EVEN: tl.constexpr,  # BK divides K
    TMA: tl.constexpr,  # x, weight and out are descriptors
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,  # fp32 accuracy of the activation
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" | "tf32"
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        row0, col0 = tile_corner(tile, M, N, BM, BN)
        mean, rstd = 0.0, 1.0
        if NORM:
            mean, rstd = row_moments(x, x_stride, row0, M, K, eps, BM, BK, EVEN, TMA)
        total = tl.zeros([BM, BN], tl.float32)
        total = accumulate(
            total, x, x_stride, weight, weight_stride, row0, M, col0, N, K, mean, rstd,
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
    residual: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``activation(z weightᵀ + bias) + residual``, z = x or its LayerNorm core when ``norm_eps`` is given.

    Shapes:
        x         [..., K]   fp32 | bf16 | fp16; any strides
        weight    [N, K]     bias [N] or None
        residual  [..., N]   added in fp32; or None
        returns   [..., N]   contiguous, x's dtype

    Args:
        activation: "none", "gelu" (erf) or "gelu_tanh".
        config: the tile to take instead of the table's (tests, tuner).
    """
    rows = as_rows(x)
    weight = as_rows(weight)
    (m, k), n = rows.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if out.numel():
        chip, aligned = chip_of(x.device), are_aligned(rows, weight, out)
        config = config or tuning.choose(chip, x.dtype, m, n, k, aligned)
        if norm_eps is not None and not config.norm_prologue:
            rows, norm_eps = layer_norm_core(rows, norm_eps), None
        extra = None if residual is None else as_rows(residual)
        descriptors = config.tma and aligned and k > 0
        linear_kernel[grid_of(config, chip, m, n)](
            describe(rows, config.bm, config.bk) if descriptors else rows,
            rows.stride(0),
            describe(weight, config.bn, config.bk) if descriptors else weight,
            weight.stride(0),
            bias if bias is None else bias.contiguous(),
            extra,
            0 if extra is None else extra.stride(0),
            describe(out, config.bm, config.bn // 2 if config.split else config.bn) if descriptors else out,
            out.stride(0),
            m,
            n,
            k,
            norm_eps or 0.0,
            config.bm,
            config.bn,
            config.bk,
            activation,
            norm_eps is not None,
            k % config.bk == 0,
            descriptors,
            config.split,
            x.dtype == torch.float32,
            product_precision(),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out.view(*x.shape[:-1], n)


def as_rows(x: Tensor) -> Tensor:
    """[..., K] as a matrix whose columns have stride 1: a view where the strides allow one, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def are_aligned(*matrices: Tensor) -> bool:
    """Whether bases and row strides are multiples of 16 bytes: descriptors need it, pointers are slow without."""
    return all(t.data_ptr() % ALIGNMENT == 0 and t.stride(0) * t.itemsize % ALIGNMENT == 0 for t in matrices)


def describe(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Descriptor of a matrix in blocks of [rows, cols]."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, cols])


def grid_of(config: Config, chip: Chip, m: int, n: int) -> tuple[int]:
    """One program for every tile, or as many as run at once."""
    tiles = triton.cdiv(m, config.bm) * triton.cdiv(n, config.bn)
    return (min(tiles, chip.processors) if config.persistent else tiles,)


def product_precision() -> str:
    """How fp32 products are taken: as PyTorch's own switch says for cuBLAS."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
