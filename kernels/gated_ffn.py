"""The gated FFN in two launches, or three with an inner norm.

    K1 (here)        h = act(z · w_gateᵀ + b_gate) ∘ (z · w_upᵀ + b_up)
    K2               y = z · w_mergedᵀ + h · w_outᵀ + bias + residual (linear.py, or partial_gelu_ffn.py with w_merged)

Shapes: x, z, y [M, C] (z: x or its core), h [M, H]; w_gate, w_up [H, C], w_out [C, H], w_merged [C, C].

Design:
1. A program holds two fp32 sums, of the gate and of what it multiplies; every tile of z is loaded once for both. h is
   the first that is written, rounded once.
2. Cores are taken by a kernel in front: here every column of tiles would take the moments of a row anew.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .chips import chip_of
from .int8 import int8_gated
from .layer_norm import core, layer_norm_core
from .linear import linear
from .operands import FP_FUSION, are_aligned, as_rows, as_vector, describe, product_precision
from .partial_gelu_ffn import int8_second, two_source
from .quantize_rows import quantize_rows, quantize_weights
from .tile import activate, finish, load_tile, tile_corner
from .tuning import Config


@triton.jit(do_not_specialize=["M"])
def gated_kernel(
    z,  # [M, K]
    z_stride,
    w_gate,  # [N, K]
    gate_stride,
    b_gate,  # [N] or None
    w_up,  # [N, K]
    up_stride,
    b_up,  # [N] or None
    h,  # [M, N]
    h_stride,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "silu" | "gelu" | "gelu_tanh" | "gelu_quick"
    EVEN: tl.constexpr,  # BK divides K
    TMA: tl.constexpr,  # all matrices are descriptors
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products: "ieee" | "tf32"
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
        row0, col0 = tile_corner(tile, M, N, BM, BN)
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            left = load_tile(z, z_stride, row0, M, k, K, BM, BK, EVEN, TMA)
            right = load_tile(w_gate, gate_stride, col0, N, k, K, BN, BK, EVEN, TMA)
            gate = tl.dot(left, right.T, gate, input_precision=PRECISION)
            right = load_tile(w_up, up_stride, col0, N, k, K, BN, BK, EVEN, TMA)
            up = tl.dot(left, right.T, up, input_precision=PRECISION)
        col = col0 + tl.arange(0, BN)
        if b_gate is not None:
            gate += tl.load(b_gate + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        if b_up is not None:
            up += tl.load(b_up + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        product = activate(gate, ACTIVATION, EXACT) * up
        finish(product, None, None, 0, h, h_stride, row0, M, col0, N, BM, BN, "none", False, TMA, SPLIT)


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
    """Launcher of :func:`repavit_ops.ops.gated_ffn`, same arguments."""
    rows = as_rows(x)
    shortcut = rows if residual else None
    if quantize == "int8":
        q = quantize_rows(rows, norm_eps, norm)
        gate_up = quantize_weights(w_gate), b_gate, quantize_weights(w_up), b_up
        h = int8_gated(q, *gate_up, activation, x.dtype == torch.float32)
        if inner_norm_eps is not None:
            h = layer_norm_core(h, inner_norm_eps)
        return int8_second(h, q, w_out, w_merged, bias, shortcut, x.dtype).view(x.shape)
    z = rows if norm_eps is None else core(rows, norm_eps, norm)
    h = gated(z, w_gate, b_gate, w_up, b_up, activation)
    if inner_norm_eps is not None:
        h = layer_norm_core(h, inner_norm_eps)
    if w_merged is None:
        y = linear(h, w_out, bias, residual=shortcut)
    else:
        y = two_source(z, w_merged, h, w_out, bias, shortcut)
    return y.view(x.shape)


def gated(
    z: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    activation: str,
    config: Config | None = None,
) -> Tensor:
    """K1: ``act(z w_gateᵀ + b_gate) ∘ (z w_upᵀ + b_up)``.

    Shapes:
        z [M, K], columns of stride 1; w_gate, w_up [N, K]; b_gate, b_up [N] or None
        returns [M, N]
    """
    w_gate, w_up = as_rows(w_gate), as_rows(w_up)
    (m, k), n = z.shape, w_gate.shape[0]
    h = torch.empty(m, n, dtype=z.dtype, device=z.device)
    if not h.numel():
        return h
    matrices = (z, w_gate, w_up, h)
    chip, aligned = chip_of(z.device), are_aligned(*matrices)
    config = config or _tile_of(tuning.choose("gated", chip, z.dtype, m, n, k, aligned))
    tma = config.tma and aligned and k > 0
    right = (config.bn, config.bk)
    blocks = ((config.bm, config.bk), right, right, (config.bm, config.stored_columns))
    z_, gate_, up_, h_ = describe(matrices, blocks) if tma else matrices
    gated_kernel[config.grid(chip, m, n)](
        z_, z.stride(0), gate_, w_gate.stride(0), as_vector(b_gate), up_, w_up.stride(0), as_vector(b_up), h_, n,
        m, n, k,
        config.bm, config.bn, config.bk, activation, k % config.bk == 0, tma, config.split,
        z.dtype == torch.float32, product_precision(), num_warps=config.warps, num_stages=config.stages,
        enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return h


def _tile_of(config: Config) -> Config:
    """The tile of a plain product, half as wide: there are two sums to hold, and two weights to load."""
    return replace(config, bn=max(config.bn // 2, 16))
