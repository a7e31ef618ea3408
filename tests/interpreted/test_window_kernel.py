"""Window attention: partition, roll, padding and masks as addressing, against the reference that moves the tokens."""

from __future__ import annotations

import pytest
import torch
from op_helpers import assert_follows_rule, cast, check_operator, randn
from test_window_rep_attention import operands

from repavit_ops import reference
from repavit_ops.kernels.attention import window_attention
from repavit_ops.kernels.attention_tiles import VENDOR, AttentionTile
from repavit_ops.kernels.window_rep_attention import window_rep_attention

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
ROLL_FIRST = pytest.mark.parametrize("roll_first", [False, True], ids=["pad_then_roll", "roll_then_pad"])
TILES = {
    "at_once": AttentionTile(32, warps=1),
    "groups_of_two": AttentionTile(64, warps=1, stages=2, group=2),
    "group_across_images": AttentionTile(64, warps=1, group=7),
    "online": AttentionTile(32, keys=32, warps=1),
}
SHAPES = {  # images, height, width, heads, d, window, shift
    "divides": (2, 8, 12, 1, 16, (4, 4), (0, 0)),
    "shifted": (1, 8, 8, 2, 12, (4, 4), (2, 2)),
    "padded": (1, 6, 9, 1, 16, (4, 4), (2, 1)),
    "rectangular": (1, 6, 7, 1, 8, (3, 5), (1, 0)),
    "swin": (1, 14, 7, 1, 32, (7, 7), (3, 3)),
    "two_chunks_of_keys": (1, 9, 9, 1, 16, (9, 9), (4, 4)),
    "map_within_window": (2, 3, 5, 1, 16, (7, 7), (3, 3)),
    "one_token": (1, 3, 2, 1, 16, (1, 1), (0, 0)),
}


def check(shape, dtype, tile, roll_first=False, padding=True):
    images, height, width, heads, d, window, shift = SHAPES[shape]
    tokens = window[0] * window[1]
    tensors = randn(images, height, width, 3 * heads * d), randn(heads, tokens, tokens, seed=1)
    qkv, rel_bias, pad = cast((*tensors, randn(2 * heads * d, seed=2) if padding else None), dtype)
    static = (heads, d, d**-0.5, window, shift, roll_first)

    def core(qkv, rel_bias, pad):
        row = None if pad is None else torch.cat([pad.new_zeros(heads * d), pad])
        return reference.window_attention_core(qkv, rel_bias, row, *static).contiguous()

    ours = window_attention(qkv, rel_bias, pad, *static, config=tile)
    truth = core(*cast((qkv, rel_bias, pad), torch.float64))
    assert_follows_rule(ours, core(qkv, rel_bias, pad), truth)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_shifts_and_tails(shape, tile):
    check(shape, torch.float16, TILES[tile])


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_in_fp32(shape):
    check(shape, torch.float32, TILES["at_once"])


@ROLL_FIRST
@pytest.mark.parametrize("padding", [False, True], ids=["zeros", "pad_kv"])
@pytest.mark.parametrize("shape", ["padded", "rectangular", "map_within_window"])
def test_padding_and_order_of_the_roll(shape, padding, roll_first):
    check(shape, torch.float32, TILES["groups_of_two"], roll_first, padding)


def test_what_a_table_leaves_to_pytorch():
    check("padded", torch.float16, VENDOR)


@FLOATS
@ROLL_FIRST
@pytest.mark.parametrize("absent", [(), (2, 6), (6,)], ids=["all", "no_bias", "padding_from_bias"])
def test_operator(absent, roll_first, dtype):
    tensors, static = operands(2, 5, 6, 20, 2, 10, (4, 4), (2, 2))
    tensors = tuple(None if i in absent else t for i, t in enumerate(tensors))
    check_operator(
        window_rep_attention, reference.window_rep_attention, tensors, dtype,
        norm_eps=1e-5, residual=True, roll_first=roll_first, **static,
    )  # fmt: skip


def test_operator_on_no_images_and_any_strides():
    tensors, static = operands(0, 8, 8, 16, 1, 16, (4, 4), (2, 2))
    check_operator(window_rep_attention, reference.window_rep_attention, tensors, torch.float32, **static)
    tensors, static = operands(2, 6, 8, 16, 1, 16, (4, 4), (2, 2))
    x, *weights = cast(tensors, torch.float32)
    weights[4] = weights[4].transpose(1, 2)
    expected = reference.window_rep_attention(x, *weights, **static)
    y = window_rep_attention(x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), *weights, **static)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
