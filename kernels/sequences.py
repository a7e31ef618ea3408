"""Sequences of tokens in memory: where the rows of one are, and how tiles of q, k, v, bias and result are moved.

A sequence is the tokens that attend to each other: those of an image, or those of a (shifted) window of a map.

Design:
1. Windows are addressing: partition, roll, padding and the way back are one function, ``token_rows``.
2. Head widths that are no power of two are two pieces (80 = 64 + 16), else masked columns.
3. Offsets of rows are 64-bit.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MINUS_INFINITY = tl.constexpr(float("-inf"))


class Task(NamedTuple):
    """What the programs of one head share: the arguments of ``attention_kernel``, and which head it is."""

    head: Any
    qkv: Any
    bias: Any
    bias_strides: Any
    padding: Any
    out: Any
    scale: Any
    tokens: Any
    height: Any
    width: Any
    shift_h: Any
    shift_w: Any
    heads: Any
    d_qk: Any
    d_v: Any
    qk_pieces: Any
    v_pieces: Any
    window: Any
    shifted: Any
    roll_first: Any
    precision: Any


@triton.jit
def token_rows(task, sequence, token):
    """Row of each token [N] of a sequence within its image; whether it is of the map; its region of the shifted map."""
    present = token < task.tokens
    region = token * 0
    if task.window is None:
        row = token.to(tl.int64)
    else:
        wh, ww = task.window[0], task.window[1]
        down, across = tl.cdiv(task.height, wh), tl.cdiv(task.width, ww)
        window = sequence % (down * across)
        i = window // across * wh + token // ww
        j = window % across * ww + token % ww
        if task.shifted:
            padded_h, padded_w = down * wh, across * ww
            region = _region(i, padded_h, wh, task.shift_h) * 3 + _region(j, padded_w, ww, task.shift_w)
            if task.roll_first:
                present = present & (i < task.height) & (j < task.width)
                i, j = (i + task.shift_h) % task.height, (j + task.shift_w) % task.width
            else:
                i, j = (i + task.shift_h) % padded_h, (j + task.shift_w) % padded_w
        present = present & (i < task.height) & (j < task.width)
        row = (i * task.width + j).to(tl.int64)
    return row, present, region


@triton.jit
def first_row(task, sequence):
    """Row of the first token of the image that a sequence is or belongs to, int64."""
    if task.window is None:
        row = sequence.to(tl.int64) * task.tokens
    else:
        windows = tl.cdiv(task.height, task.window[0]) * tl.cdiv(task.width, task.window[1])
        row = (sequence // windows).to(tl.int64) * task.height * task.width
    return row


@triton.jit
def _region(position, extent, window, shift):
    """0 before the last window, 1 within it, 2 where the roll brought the other edge; 0 without a shift."""
    last = (position >= extent - window).to(tl.int32) + (position >= extent - shift).to(tl.int32)
    return tl.where(shift > 0, last, 0)


@triton.jit
def _load_rows(base, stride, row, present, padding, D: tl.constexpr, PIECES: tl.constexpr):
    """[N, D] of a matrix as a tuple of [N, piece]; columns beyond D read as 0.

    Args:
        base: element [0, first column]; ``stride`` elements from row to row, 1 from column to column.
        row: [N] int64, as every offset: 32 bits could wrap, so that no two addresses would share a register.
        present: [N] bool, or None: every row is.
        padding: pointer to the [D] that an absent row reads as; None: 0.
    """
    tiles = ()
    for p in tl.static_range(len(PIECES)):
        tile = _load_tile(base, stride, row, present, padding, 0 if p == 0 else PIECES[0], PIECES[p], D)
        tiles += (tile,)
    return tiles


@triton.jit
def _load_tile(base, stride, row, present, padding, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns START to START + WIDTH of ``_load_rows``."""
    column = (START + tl.arange(0, WIDTH))[None, :]
    address = base + row[:, None] * stride + column
    if padding is not None:
        absent = tl.load(padding + column, mask=column < D, other=0.0)
        tile = tl.load(address, mask=present[:, None] & (column < D), other=absent)
    elif START + WIDTH > D:
        exists = column < D
        if present is not None:
            exists = exists & present[:, None]
        tile = tl.load(address, mask=exists, other=0.0)
    elif present is not None:
        tile = tl.load(address, mask=present[:, None], other=0.0)
    else:
        tile = tl.load(address)
    return tile


@triton.jit
def store_rows(base, stride, row, present, tiles, D: tl.constexpr, PIECES: tl.constexpr):
    """Write what ``_load_rows`` would read; absent rows are left alone."""
    for p in tl.static_range(len(PIECES)):
        column = ((0 if p == 0 else PIECES[0]) + tl.arange(0, PIECES[p]))[None, :]
        tile = tiles[p].to(base.dtype.element_ty)
        tl.store(base + row[:, None] * stride + column, tile, mask=present[:, None] & (column < D))


@triton.jit
def load_queries(task, sequence, row, present):
    """q of a sequence's rows, as pieces; 0 for absent ones."""
    stride = task.heads * (2 * task.d_qk + task.d_v)
    base = task.qkv + first_row(task, sequence) * stride + task.head * task.d_qk
    return _load_rows(base, stride, row, present, None, task.d_qk, task.qk_pieces)


@triton.jit
def load_keys(task, sequence, row, present, WHOLE: tl.constexpr):
    """k of a sequence's rows, as pieces; the padding's for absent ones. WHOLE: all are tokens of the sequence."""
    stride = task.heads * (2 * task.d_qk + task.d_v)
    column = task.head * task.d_qk
    padding = None if task.padding is None else task.padding + column
    base = task.qkv + first_row(task, sequence) * stride + task.heads * task.d_qk + column
    mask = None if WHOLE and task.window is None else present
    return _load_rows(base, stride, row, mask, padding, task.d_qk, task.qk_pieces)


@triton.jit
def load_values(task, sequence, row, present, WHOLE: tl.constexpr):
    """v of a sequence's rows, as ``load_keys`` reads k."""
    stride = task.heads * (2 * task.d_qk + task.d_v)
    column = task.heads * task.d_qk + task.head * task.d_v
    padding = None if task.padding is None else task.padding + column
    base = task.qkv + first_row(task, sequence) * stride + task.heads * task.d_qk + column
    mask = None if WHOLE and task.window is None else present
    return _load_rows(base, stride, row, mask, padding, task.d_v, task.v_pieces)


@triton.jit
def load_bias(task, sequence, query, key):
    """[M, N] of the bias in fp32, -inf beyond the last key."""
    by_sequence, by_head, by_query, by_key = task.bias_strides
    base = task.bias + sequence.to(tl.int64) * by_sequence + task.head.to(tl.int64) * by_head
    address = base + (query.to(tl.int64)[:, None] * by_query + key.to(tl.int64)[None, :] * by_key)
    present = (query < task.tokens)[:, None] & (key < task.tokens)[None, :]
    return tl.load(address, mask=present, other=MINUS_INFINITY).to(tl.float32)
