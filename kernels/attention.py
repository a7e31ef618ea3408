"""softmax(scale · q kᵀ + bias) v, straight from the packed qkv product, over whole images or (shifted) windows.

Shapes:
    qkv   [rows, h·d_qk | h·d_qk | h·d_v]   one row per token, as the qkv GEMM writes it
    out   [rows, h·d_v]                     as the projection reads it

Design:
1. A program is one head and one tile of queries of a group of sequences (sequences.py): one image, or several windows,
   so that their bias is loaded once.
2. Up to a few hundred keys all scores of a query tile stand in registers: one max, one exp2, one sum, nothing is
   rescaled. The keys come in powers of two (197 → 128 + 64 + 16), so that less than 16 are wasted; the queries left
   over from the last full tile may get a tile of their own. Longer sequences run the online softmax.
3. exp2 is one instruction, so scores are multiplied by log2e. That waits for the exponent: without a bias it is half of
   a fused multiply-add there, and of a bias the product could overflow before the greatest score is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .attention_tiles import Attention, AttentionTile, choose, pieces
from .chips import chip_of
from .operands import FP_FUSION, product_precision
from .sequences import (
    LOG2E,
    MINUS_INFINITY,
    Task,
    first_row,
    load_bias,
    load_keys,
    load_queries,
    load_values,
    store_rows,
    token_rows,
)

WIDEST = 256  # columns of a head; wider ones run in plain PyTorch
SHIFT_MASK = tl.constexpr(-100.0)  # what Swin adds between tokens of different regions


@triton.jit
def _scores(task, sequence, q, query, region, key, known_bias, WHOLE: tl.constexpr):
    """Scores of queries [M] against keys [N], -inf beyond the last key; and the keys' rows and presence.

    ``scale · q kᵀ + bias``; without a bias q kᵀ alone, still to be multiplied by the scale.

    Args:
        region: of the queries, as ``token_rows`` gives it.
        known_bias: what ``load_bias`` would load, or None.
        WHOLE: every key is a token of the sequence.
    """
    row, present, key_region = token_rows(task, sequence, key)
    k = load_keys(task, sequence, row, present, WHOLE)
    s = tl.dot(q[0], tl.trans(k[0]), input_precision=task.precision)
    for p in tl.static_range(1, len(task.qk_pieces)):
        s = tl.dot(q[p], tl.trans(k[p]), s, input_precision=task.precision)
    if known_bias is not None:
        s = s * task.scale + known_bias
    elif task.bias is not None:
        s = s * task.scale + load_bias(task, sequence, query, key)
    elif not WHOLE:
        s = tl.where((key < task.tokens)[None, :], s, MINUS_INFINITY)
    if task.shifted:
        s = tl.where(region[:, None] == key_region[None, :], s, s + SHIFT_MASK)
    return s, row, present


@triton.jit
def _exponential(task, score, peak):
    """Weight of a score, given the largest of its row."""
    if task.bias is None:
        weight = tl.exp2(score * task.scale - peak * task.scale)
    else:
        weight = tl.exp2((score - peak) * LOG2E)
    return weight


@triton.jit
def _finite(task, peak):
    """Largest score of each row; 0 where a bias of -inf masks the whole row, so that its weights are 0, not NaN."""
    return peak if task.bias is None else tl.where(peak == MINUS_INFINITY, 0.0, peak)


@triton.jit
def _weighted(task, p, v, acc):
    """acc + p v as pieces, in fp32; p [M, N] is rounded to v's dtype."""
    p = p.to(v[0].dtype)
    total = ()
    for i in tl.static_range(len(task.v_pieces)):
        total += (tl.dot(p, v[i], acc[i], input_precision=task.precision),)
    return total


@triton.jit
def _scaled(task, acc, factor):
    """factor · acc, pieces of [M, D]; factor [M]."""
    result = ()
    for i in tl.static_range(len(task.v_pieces)):
        result += (acc[i] * factor[:, None],)
    return result


@triton.jit
def _zeros(task, M: tl.constexpr):
    pieces = ()
    for i in tl.static_range(len(task.v_pieces)):
        pieces += (tl.full((M, task.v_pieces[i]), 0.0, tl.float32),)
    return pieces


@triton.jit
def _write(task, sequence, row, present, acc, total):
    """out = acc / total; 0 where a row attends to nothing."""
    if task.bias is not None:
        total = tl.where(total == 0, 1.0, total)
    stride = task.heads * task.d_v
    base = task.out + first_row(task, sequence) * stride + task.head * task.d_v
    store_rows(base, stride, row, present, _scaled(task, acc, 1.0 / total), task.d_v, task.v_pieces)


@triton.jit
def _attend_at_once(task, sequence, first_query, known_bias, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Attention of QUERIES tokens with all their scores in registers; KEYS: chunks of keys."""
    query = first_query + tl.arange(0, QUERIES)
    query_row, query_present, region = token_rows(task, sequence, query)
    q = load_queries(task, sequence, query_row, query_present)
    scores, rows, presence = (), (), ()
    peak = tl.full((QUERIES,), MINUS_INFINITY, tl.float32)
    start = 0
    for c in tl.static_range(len(KEYS)):
        key = start + tl.arange(0, KEYS[c])
        bias = None if known_bias is None else known_bias[c]
        s, row, present = _scores(task, sequence, q, query, region, key, bias, c < len(KEYS) - 1)
        scores += (s,)
        rows += (row,)
        presence += (present,)
        peak = tl.maximum(peak, tl.max(s, 1))
        start += KEYS[c]

    peak = _finite(task, peak)
    acc = _zeros(task, QUERIES)
    total = tl.zeros((QUERIES,), tl.float32)
    for c in tl.static_range(len(KEYS)):
        p = _exponential(task, scores[c], peak[:, None])
        total += tl.sum(p, 1)
        acc = _weighted(task, p, load_values(task, sequence, rows[c], presence[c], c < len(KEYS) - 1), acc)
    _write(task, sequence, query_row, query_present, acc, total)


@triton.jit
def _attend_online(task, sequence, first_query, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr):
    """Attention of QUERIES tokens over any number of keys, KEYS at a time, by the online softmax."""
    query = first_query + tl.arange(0, QUERIES)
    query_row, query_present, region = token_rows(task, sequence, query)
    q = load_queries(task, sequence, query_row, query_present)
    acc = _zeros(task, QUERIES)
    total = tl.zeros((QUERIES,), tl.float32)
    peak = tl.full((QUERIES,), MINUS_INFINITY, tl.float32)
    for start in tl.range(0, task.tokens, KEYS, num_stages=STAGES):
        acc, total, peak = _online_step(task, sequence, q, query, region, start, acc, total, peak, KEYS)
    _write(task, sequence, query_row, query_present, acc, total)


@triton.jit
def _online_step(task, sequence, q, query, region, start, acc, total, peak, KEYS: tl.constexpr):
    """acc, total and peak with KEYS more keys taken in."""
    s, row, present = _scores(task, sequence, q, query, region, start + tl.arange(0, KEYS), None, False)
    new_peak = tl.maximum(peak, tl.max(s, 1))
    shift = _finite(task, new_peak)
    p = _exponential(task, s, shift[:, None])
    rescale = _exponential(task, peak, shift)
    acc = _weighted(task, p, load_values(task, sequence, row, present, False), _scaled(task, acc, rescale))
    return acc, total * rescale + tl.sum(p, 1), new_peak


@triton.jit
def _attend(
    task,
    sequence,
    steps,
    tile,
    QUERIES: tl.constexpr,
    TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    ONLINE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of queries of ``steps`` sequences, from the given one on."""
    first_query = tile * QUERIES
    known_bias = None
    if task.window is not None and not ONLINE and len(KEYS) == 1:  # one bias for all windows, small enough to keep
        query = first_query + tl.arange(0, QUERIES)
        known_bias = (load_bias(task, sequence, query, tl.arange(0, KEYS[0])),)
    for step in tl.range(0, steps, num_stages=1 if ONLINE else STAGES):
        if ONLINE:
            _attend_online(task, sequence + step, first_query, QUERIES, KEYS[0], STAGES)
        elif TAIL:
            if first_query + QUERIES <= task.tokens:
                _attend_at_once(task, sequence + step, first_query, known_bias, QUERIES, KEYS)
            else:
                _attend_at_once(task, sequence + step, first_query, known_bias, TAIL, KEYS)
        else:
            _attend_at_once(task, sequence + step, first_query, known_bias, QUERIES, KEYS)


@triton.jit(do_not_specialize=["sequences", "group", "tokens", "height", "width", "shift_h", "shift_w"])
def attention_kernel(
    qkv,  # [rows, HEADS · (2 D_QK + D_V)], contiguous
    bias,  # added to the scores, read by the strides below; None: no bias
    bias_strides,  # elements per (sequence, head, query, key); 0 where it is broadcast
    padding,  # [HEADS · (D_QK + D_V)]: k | v of the tokens that fill up the last windows; None: they are 0
    out,  # [rows, HEADS · D_V], contiguous
    scale,  # factor of q kᵀ; where there is no bias, times log2e, and positive
    sequences,  # images, or images · windows
    group,  # sequences per program
    tokens,  # of a sequence
    height,  # of the map, in tokens; windows only, as the next three
    width,
    shift_h,  # tokens by which the map is rolled
    shift_w,
    HEADS: tl.constexpr,
    D_QK: tl.constexpr,  # width of a query or key head
    D_V: tl.constexpr,  # width of a value head
    QK_PIECES: tl.constexpr,  # the powers of two that D_QK is read in
    V_PIECES: tl.constexpr,
    WINDOW: tl.constexpr,  # (height, width) of a window in tokens; None: a sequence is an image
    SHIFTED: tl.constexpr,
    ROLL_FIRST: tl.constexpr,  # the map is rolled before it is padded
    PRECISION: tl.constexpr,  # "ieee" or "tf32", of fp32 products
    QUERIES: tl.constexpr,  # of a tile
    TAIL: tl.constexpr,  # queries of the last tile, where it is a smaller one; else 0
    KEYS: tl.constexpr,  # at once: chunks that add up to tokens or more; online: (keys per step,)
    ONLINE: tl.constexpr,
    STAGES: tl.constexpr,  # of the loop's software pipeline
):
    """Attention of one head and one tile of queries, for each of a group of sequences."""
    tiles = tl.cdiv(tokens, QUERIES)
    head = tl.program_id(0) // tiles % HEADS
    sequence = tl.program_id(0) // tiles // HEADS * group
    _attend(
        Task(
            head, qkv, bias, bias_strides, padding, out, scale, tokens, height, width, shift_h, shift_w,
            HEADS, D_QK, D_V, QK_PIECES, V_PIECES, WINDOW, SHIFTED, ROLL_FIRST, PRECISION,
        ),
        sequence,
        min(group, sequences - sequence),
        tl.program_id(0) % tiles,
        QUERIES,
        TAIL,
        KEYS,
        ONLINE,
        STAGES,
    )  # fmt: skip


def attention(
    qkv: Tensor, bias: Tensor | None, num_heads: int, d_qk: int, scale: float, *, config: AttentionTile | None = None
) -> Tensor:
    """``softmax(scale · q kᵀ + bias) v`` per head: [B, T, q | k | v] → [B, T, h · d_v].

    Args:
        bias: broadcasts to [B, h, T, T], any strides; or None.
        config: the tiles to take instead of the table's (tests, tuner).
    """
    batch, tokens, width = qkv.shape
    d_v = width // num_heads - 2 * d_qk
    shape = Attention(batch, tokens, num_heads, d_qk, d_v, biased=bias is not None, windows=False)
    config = config or choose(chip_of(qkv.device), qkv.dtype, shape)
    if config.vendor or max(d_qk, d_v) > WIDEST:
        return reference.attention_core(qkv, bias, num_heads, d_qk, scale)
    if bias is None and not scale > 0:  # the kernel takes the maximum before it multiplies by the scale
        bias = qkv.new_zeros(1)
    if bias is not None:
        bias = bias.expand(batch, num_heads, tokens, tokens)
    return _launch(qkv, bias, None, scale, shape, config)


def window_attention(
    qkv: Tensor,
    rel_bias: Tensor,
    padding: Tensor | None,
    num_heads: int,
    d_qk: int,
    scale: float,
    window: Sequence[int],
    shift: Sequence[int],
    roll_first: bool,
    *,
    config: AttentionTile | None = None,
) -> Tensor:
    """:func:`attention` within (shifted) windows: [B, H, W, q | k | v] → [B, H, W, h · d_v].

    Args:
        rel_bias: [h, wh · ww, wh · ww].
        padding: [h · d_qk | h · d_v], k | v of the tokens that fill up the last windows; None: they are 0.
        config: as of :func:`attention`.
    """
    batch, height, width, columns = qkv.shape
    wh, ww = window
    d_v = columns // num_heads - 2 * d_qk
    windows = batch * triton.cdiv(height, wh) * triton.cdiv(width, ww)
    shape = Attention(windows, wh * ww, num_heads, d_qk, d_v, biased=True, windows=True)
    config = config or choose(chip_of(qkv.device), qkv.dtype, shape)
    if config.vendor or max(d_qk, d_v) > WIDEST:
        row = None if padding is None else F.pad(padding, (num_heads * d_qk, 0))  # its q is never read
        return reference.window_attention_core(
            qkv, rel_bias, row, num_heads, d_qk, scale, window, shift, roll_first
        ).contiguous()
    if padding is not None:
        padding = None if height % wh == 0 and width % ww == 0 else padding.contiguous()
    bias = rel_bias.unsqueeze(0).expand(windows, -1, -1, -1)
    return _launch(qkv, bias, padding, scale, shape, config, (height, width, *shift), (wh, ww), roll_first)


def _launch(
    qkv: Tensor,
    bias: Tensor | None,
    padding: Tensor | None,
    scale: float,
    shape: Attention,
    config: AttentionTile,
    geometry: tuple[int, ...] = (0, 0, 0, 0),
    window: tuple[int, int] | None = None,
    roll_first: bool = False,
) -> Tensor:
    """Launch ``attention_kernel``; geometry: height, width, shift_h, shift_w."""
    qkv = qkv.contiguous()
    out = qkv.new_empty(*qkv.shape[:-1], shape.heads * shape.d_v)
    if not out.numel():
        return out
    tiles = triton.cdiv(shape.tokens, config.queries)
    attention_kernel[(triton.cdiv(shape.sequences, config.group) * shape.heads * tiles,)](
        qkv, bias, None if bias is None else bias.stride(), padding, out,
        scale if bias is not None else scale * LOG2E.value, shape.sequences, config.group, shape.tokens, *geometry,
        shape.heads, shape.d_qk, shape.d_v, pieces(shape.d_qk), pieces(shape.d_v),
        window, any(geometry[2:]), roll_first, product_precision(),
        config.queries, config.queries_of_tail(shape.tokens), config.chunks_of_keys(shape.tokens), config.keys > 0,
        config.stages, num_warps=config.warps, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out
