"""Products of quantized rows and weights, exact until a segment of terms ends (quantize_rows.py makes both).

    K1  out = activation(Σ over one or two segments of  x Wᵀ  + bias) + residual
    K2  out = act(x w_gateᵀ + b_gate) ∘ (x w_upᵀ + b_up)

Shapes: x [M, K] as Rows; weights [N, K] as Columns; bias [N], residual and out [M, N].

Design:
1. Sums are int32. When a segment is done they become floats once, as reference_int8.product says it:
   (sum · s_t + o_t · Σ w) · s_n. The 128 that tokens were shifted by goes back in whole numbers before.
2. Two segments add up as floats, so H and z of an FFN need no common unit. Both live at once: tiles are half as wide.
3. out is fp32 where it is quantized again: a hidden row is known when its last column is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .chips import Chip, chip_of
from .operands import FP_FUSION, as_rows, as_vector, describe
from .quantize_rows import Columns, Rows, quantize_rows, quantize_weights
from .tile import activate, finish, load_tile, tile_corner
from .tuning import Config

WIDEST = 128  # columns of a tile
SHORTEST_STEP = 32  # along K, of the instructions that multiply bytes


@triton.jit
def whole_sums(
    x,
    w,
    stride,
    row0,
    M,
    col0,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """x[row0 : row0 + BM] · w[col0 : col0 + BN]ᵀ in int32, of bytes [M, K] and [N, K] of one stride."""
    total = tl.zeros([BM, BN], tl.int32)
    for k in range(0, K, BK):
        left = load_tile(x, stride, row0, M, k, K, BM, BK, EVEN, TMA)
        right = load_tile(w, stride, col0, N, k, K, BN, BK, EVEN, TMA)
        total = tl.dot(left, right.T, total, out_dtype=tl.int32)
    return total


@triton.jit
def as_floats(total, scale, offset, w_scale, w_sums, row0, M, col0, N, BM: tl.constexpr, BN: tl.constexpr):
    """What sums of shifted tokens stand for, fp32 [BM, BN]."""
    row = row0 + tl.arange(0, BM)
    col = col0 + tl.arange(0, BN)
    s = tl.load(scale + row, mask=row < M, other=0.0)[:, None]
    o = tl.load(offset + row, mask=row < M, other=0.0)[:, None]
    sums = tl.load(w_sums + col, mask=col < N, other=0)[None, :]
    whole = (total + 128 * sums).to(tl.float32)
    return (whole * s + o * sums.to(tl.float32)) * tl.load(w_scale + col, mask=col < N, other=0.0)[None, :]


@triton.jit(do_not_specialize=["M"])
def int8_linear_kernel(
    x,  # [M, K] bytes
    scale,  # [M]
    offset,  # [M]
    w,  # [N, K] bytes
    w_scale,  # [N]
    w_sums,  # [N]
    K,  # with what is zero behind it: the stride of both
    x2,  # the second segment, [M, K2]; None where there is none
    scale2,
    offset2,
    w2,
    w2_scale,
    w2_sums,
    K2,
    bias,  # [N] or None
    residual,  # [M, N] or None
    residual_stride,
    out,  # [M, N]
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "none" | "gelu" | "gelu_tanh" | "gelu_quick"
    EVEN: tl.constexpr,  # BK divides K
    EVEN2: tl.constexpr,
    TMA: tl.constexpr,  # x and w are descriptors
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        row0, col0 = tile_corner(tile, M, N, BM, BN)
        sums = whole_sums(x, w, K, row0, M, col0, N, K, BM, BN, BK, EVEN, TMA)
        total = as_floats(sums, scale, offset, w_scale, w_sums, row0, M, col0, N, BM, BN)
        if x2 is not None:
            sums = whole_sums(x2, w2, K2, row0, M, col0, N, K2, BM, BN, BK, EVEN2, TMA)
            total += as_floats(sums, scale2, offset2, w2_scale, w2_sums, row0, M, col0, N, BM, BN)
        finish(
            total, bias, residual, residual_stride, out, N, row0, M, col0, N, BM, BN, ACTIVATION, EXACT, False, SPLIT
        )


@triton.jit(do_not_specialize=["M"])
def int8_gated_kernel(
    x,  # [M, K] bytes
    scale,  # [M]
    offset,  # [M]
    w_gate,  # [N, K] bytes
    gate_scale,  # [N]
    gate_sums,  # [N]
    b_gate,  # [N] or None
    w_up,  # [N, K] bytes
    up_scale,  # [N]
    up_sums,  # [N]
    b_up,  # [N] or None
    out,  # [M, N]
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "silu" | "gelu" | "gelu_tanh" | "gelu_quick"
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        row0, col0 = tile_corner(tile, M, N, BM, BN)
        col = col0 + tl.arange(0, BN)
        sums = whole_sums(x, w_gate, K, row0, M, col0, N, K, BM, BN, BK, EVEN, TMA)
        gate = as_floats(sums, scale, offset, gate_scale, gate_sums, row0, M, col0, N, BM, BN)
        if b_gate is not None:
            gate += tl.load(b_gate + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        gate = activate(gate, ACTIVATION, EXACT)
        sums = whole_sums(x, w_up, K, row0, M, col0, N, K, BM, BN, BK, EVEN, TMA)
        up = as_floats(sums, scale, offset, up_scale, up_sums, row0, M, col0, N, BM, BN)
        if b_up is not None:
            up += tl.load(b_up + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        finish(gate * up, None, None, 0, out, N, row0, M, col0, N, BM, BN, "none", EXACT, False, SPLIT)


def int8_linear(
    x: Rows,
    w: Columns,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    second: tuple[Rows, Columns] | None = None,
    config: Config | None = None,
) -> Tensor:
    """K1: ``activation(x wᵀ + x₂ w₂ᵀ + bias) + residual`` in ``dtype``, [M, N].

    Args:
        second: x₂ and w₂, of as many rows and columns.
        config: the tile to take instead of the rule's (tests).
    """
    m, n = x.q.shape[0], w.q.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=x.q.device)
    if not out.numel():
        return out
    chip = chip_of(x.q.device)
    config = config or _tile(chip, m, n, x.k + (second[0].k if second else 0), halved=second is not None)
    x_, w_ = _operands(x, w, config)
    k, k2 = x.q.shape[1], 0 if second is None else second[0].q.shape[1]
    first = (x_, x.scale, x.offset, w_, w.scale, w.sums, k)
    others: tuple[Any, ...] = (None,) * 6
    if second is not None:
        x2, w2 = second
        x2_, w2_ = _operands(x2, w2, config)
        others = (x2_, x2.scale, x2.offset, w2_, w2.scale, w2.sums)
    shortcut = None if residual is None else as_rows(residual)
    int8_linear_kernel[config.grid(chip, m, n)](
        *first, *others, k2, as_vector(bias), shortcut, 0 if shortcut is None else shortcut.stride(0), out, m, n,
        config.bm, config.bn, config.bk, activation, k % config.bk == 0, k2 % config.bk == 0, config.tma, config.split,
        dtype == torch.float32, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out


def int8_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm_eps: float | None = None,
    norm: str = "layer",
    residual: Tensor | None = None,
) -> Tensor:
    """As :func:`repavit_ops.kernels.linear.linear` without an activation, with both operands quantized."""
    rows = quantize_rows(x, norm_eps, norm)
    y = int8_linear(rows, quantize_weights(weight), bias, x.dtype, residual=residual)
    return y.view(*x.shape[:-1], weight.shape[0])


def int8_gated(
    x: Rows,
    w_gate: Columns,
    b_gate: Tensor | None,
    w_up: Columns,
    b_up: Tensor | None,
    activation: str,
    exact: bool,
    config: Config | None = None,
) -> Tensor:
    """K2 in float32, [M, N]; ``exact`` asks for fp32 accuracy of the activation."""
    m, n, k = x.q.shape[0], w_gate.q.shape[0], x.q.shape[1]
    out = torch.empty(m, n, dtype=torch.float32, device=x.q.device)
    if not out.numel():
        return out
    chip = chip_of(x.q.device)
    config = config or _tile(chip, m, n, x.k, halved=True)
    x_, gate_ = _operands(x, w_gate, config)
    _, up_ = _operands(x, w_up, config)
    int8_gated_kernel[config.grid(chip, m, n)](
        x_, x.scale, x.offset, gate_, w_gate.scale, w_gate.sums, as_vector(b_gate), up_, w_up.scale, w_up.sums,
        as_vector(b_up), out, m, n, k, config.bm, config.bn, config.bk, activation, k % config.bk == 0, config.tma,
        config.split, exact, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out


def _tile(chip: Chip, m: int, n: int, k: int, *, halved: bool) -> Config:
    """The tile of a product in 16 bits, as many bytes long, no wider than registers hold whole sums beside floats.

    Half as wide again where a second sum stands beside the first.
    """
    config = tuning.choose("int8", chip, torch.int8, m, n, k)
    wide = min(config.bn, WIDEST) // (2 if halved else 1)
    return replace(config, bn=max(wide, 16), bk=max(2 * config.bk, SHORTEST_STEP), tma=config.tma and k > 0)


def _operands(x: Rows, w: Columns, config: Config) -> Sequence[Any]:
    """The bytes as tensors, or as descriptors."""
    if not config.tma:
        return x.q, w.q
    return describe((x.q, w.q), ((config.bm, config.bk), (config.bn, config.bk)))
