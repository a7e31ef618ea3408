"""Pure functions of one tile of a product: which tile, load, multiply-accumulate, epilogue.

A matrix argument is row-major [rows, cols] with unit column stride. It comes as a pointer with its row stride in
elements, or, under TMA, as a tensor descriptor whose block is the tile; offsets are 64-bit either way.
"""

import triton
import triton.language as tl

from .device_math import activate

LARGEST_SUM = tl.constexpr(3e38)  # of squares; what is beyond, or NaN, is summed again
SHRINK = tl.constexpr(2.0**-80)  # squares of any fp32 number times this add up, and times no less keep their digits
SMALLEST = tl.constexpr(1e-37)  # in place of a variance of 0 under an eps that vanished


@triton.jit
def tile_corner(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr = 8):
    """(first row, first column) of a tile of [M, N]: column by column within groups of GROUP row tiles (L2 reuse)."""
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tile % (GROUP * across)
    return (first + within % height) * BM, within // height * BN


@triton.jit
def load_tile(
    matrix, stride, row0, rows, col0, cols, R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr
):
    """[R, C] at (row0, col0) of a [rows, cols] matrix: zero beyond its columns, anything finite beyond its rows.

    EVEN: C divides cols.
    """
    if TMA:
        block = matrix.load([row0, col0])
    else:
        row = tl.minimum(row0 + tl.arange(0, R), rows - 1).to(tl.int64)
        col = col0 + tl.arange(0, C)
        at = matrix + row[:, None] * stride + col[None, :]
        if EVEN:
            block = tl.load(at)
        else:
            block = tl.load(at, mask=col[None, :] < cols, other=0.0)
    return block


@triton.jit
def row_moments(
    x,  # [M, K]
    x_stride,
    row0,
    M,
    K,
    eps,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """(mean · scale, 1 / √(variance + eps) / scale, scale) of BM rows, fp32 [BM] each, for ``normalise``.

    Moments of chunks of BK, merged pairwise (Chan). scale is 1, and 2**-80 for rows whose sums are beyond fp32.
    """
    mean = tl.zeros([BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)  # Σ (x - mean)² so far
    for k in range(0, K, BK):
        chunk = load_tile(x, x_stride, row0, M, k, K, BM, BK, EVEN, TMA).to(tl.float32)
        count = tl.minimum(K - k, BK).to(tl.float32)
        chunk_mean = tl.sum(chunk, 1) / count
        off = chunk - chunk_mean[:, None]
        if not EVEN:
            off = tl.where((k + tl.arange(0, BK) < K)[None, :], off, 0.0)
        share = count / (k + count)
        delta = chunk_mean - mean
        mean += delta * share
        squares += tl.sum(off * off, 1) + delta * delta * (k * share)
    rstd = 1.0 / tl.sqrt_rn(squares / K + eps)
    scale = tl.full([BM], 1.0, tl.float32)
    within = squares < LARGEST_SUM
    if tl.min(within.to(tl.int32), 0) == 0:
        other_mean, other_rstd = _shrunk_moments(x, x_stride, row0, M, K, eps, BM, BK, EVEN, TMA)
        mean = tl.where(within, mean, other_mean)
        rstd = tl.where(within, rstd, other_rstd)
        scale = tl.where(within, scale, SHRINK)
    return mean, rstd, scale


@triton.jit
def _shrunk_moments(
    x, x_stride, row0, M, K, eps, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr
):
    """(mean, 1 / √(variance + eps)) of rows times SHRINK, in two passes: for few rows, so that no time counts."""
    mean = tl.zeros([BM], tl.float32)
    for k in range(0, K, BK):
        mean += tl.sum(load_tile(x, x_stride, row0, M, k, K, BM, BK, EVEN, TMA).to(tl.float32) * SHRINK, 1)
    mean = mean / K
    sums = tl.zeros([BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for k in range(0, K, BK):
        off = load_tile(x, x_stride, row0, M, k, K, BM, BK, EVEN, TMA).to(tl.float32) * SHRINK - mean[:, None]
        if not EVEN:
            off = tl.where((k + tl.arange(0, BK) < K)[None, :], off, 0.0)
        sums += tl.sum(off, 1)
        squares += tl.sum(off * off, 1)
    rest = sums / K  # what rounding left of the mean
    variance = squares / K - rest * rest
    variance = tl.where(variance < 0, 0.0, variance)  # NaN stays
    return mean + rest, 1.0 / tl.sqrt_rn(variance + eps * SHRINK * SHRINK + SMALLEST)


@triton.jit
def root_mean_square(
    x,  # [M, K]
    x_stride,
    row0,
    M,
    K,
    eps,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """What :func:`row_moments` gives, without a mean: (0, 1 / √(mean(x²) + eps) / scale, scale), fp32 [BM] each."""
    squares = tl.zeros([BM], tl.float32)
    for k in range(0, K, BK):
        chunk = load_tile(x, x_stride, row0, M, k, K, BM, BK, EVEN, False).to(tl.float32)
        squares += tl.sum(chunk * chunk, 1)
    rstd = 1.0 / tl.sqrt_rn(squares / K + eps)
    scale = tl.full([BM], 1.0, tl.float32)
    within = squares < LARGEST_SUM
    if tl.min(within.to(tl.int32), 0) == 0:
        shrunk = tl.zeros([BM], tl.float32)
        for k in range(0, K, BK):
            chunk = load_tile(x, x_stride, row0, M, k, K, BM, BK, EVEN, False).to(tl.float32) * SHRINK
            shrunk += tl.sum(chunk * chunk, 1)
        rstd = tl.where(within, rstd, 1.0 / tl.sqrt_rn(shrunk / K + eps * SHRINK * SHRINK))
        scale = tl.where(within, scale, SHRINK)
    return tl.zeros([BM], tl.float32), rstd, scale


@triton.jit
def normalise(x, mean, rstd, scale, NORM: tl.constexpr):
    """LayerNorm core by rows, of what ``row_moments`` gives, rounded to x's dtype; x itself without NORM."""
    if NORM:
        x = ((x.to(tl.float32) * scale[:, None] - mean[:, None]) * rstd[:, None]).to(x.dtype)
    return x


@triton.jit
def accumulate(
    total,  # [BM, BN] fp32, what was summed so far
    a,  # [M, K]
    a_stride,
    w,  # [N, K]
    w_stride,
    row0,
    M,
    col0,
    N,
    K,
    mean,  # [BM] fp32 with NORM, as the next two: rows of a are taken as ``normalise`` does
    rstd,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + a[row0 : row0 + BM] · w[col0 : col0 + BN]ᵀ over all of K."""
    for k in range(0, K, BK):
        left = load_tile(a, a_stride, row0, M, k, K, BM, BK, EVEN, TMA)
        right = load_tile(w, w_stride, col0, N, k, K, BN, BK, EVEN, TMA)
        total = tl.dot(normalise(left, mean, rstd, scale, NORM), right.T, total, input_precision=PRECISION)
    return total


@triton.jit
def finish(
    total,  # [BM, BN] fp32
    bias,  # [N] or None
    residual,  # [M, N], pointer, or None
    residual_stride,
    out,  # [M, N]
    out_stride,
    row0,
    M,
    col0,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out tile = activation(total + bias) + residual; with SPLIT in two halves, which takes half the registers."""
    if SPLIT:
        halves = tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1))
        low, high = tl.split(halves)
        _finish_part(
            low, bias, residual, residual_stride, out, out_stride, row0, M, col0, N, BM, BN // 2, ACTIVATION, EXACT, TMA
        )
        col0 += BN // 2
        _finish_part(
            high,
            bias,
            residual,
            residual_stride,
            out,
            out_stride,
            row0,
            M,
            col0,
            N,
            BM,
            BN // 2,
            ACTIVATION,
            EXACT,
            TMA,
        )
    else:
        _finish_part(
            total, bias, residual, residual_stride, out, out_stride, row0, M, col0, N, BM, BN, ACTIVATION, EXACT, TMA
        )


@triton.jit
def _finish_part(
    part,
    bias,
    residual,
    residual_stride,
    out,
    out_stride,
    row0,
    M,
    col0,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    TMA: tl.constexpr,
):
    row = row0 + tl.arange(0, BM)
    col = col0 + tl.arange(0, BN)
    inside = (row < M)[:, None] & (col < N)[None, :]
    if bias is not None:
        part += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    part = activate(part, ACTIVATION, EXACT)
    if residual is not None:
        at = residual + row.to(tl.int64)[:, None] * residual_stride + col[None, :]
        part += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if TMA:
        out.store([row0, col0], part.to(out.dtype))
    else:
        at = out + row.to(tl.int64)[:, None] * out_stride + col[None, :]
        tl.store(at, part.to(out.dtype.element_ty), mask=inside)
