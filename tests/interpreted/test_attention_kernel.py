"""Attention of images: every form of the softmax over masks and tails, biases, head widths, against the reference."""

from __future__ import annotations

import pytest
import torch
from op_helpers import assert_follows_rule, cast, check_operator, randn
from test_rep_attention import masks_of, operands

from repavit_ops import reference
from repavit_ops.kernels.attention import attention
from repavit_ops.kernels.attention_tiles import VENDOR, AttentionTile
from repavit_ops.kernels.rep_attention import rep_attention

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
TILES = {
    "at_once": AttentionTile(32, warps=1),
    "with_tail": AttentionTile(32, tail=True, warps=1),
    "online": AttentionTile(16, keys=32, warps=1, stages=2),
    "grouped": AttentionTile(64, warps=1, group=2),
}
SHAPES = {  # images, tokens, heads, d_qk, d_v
    "one_token": (2, 1, 1, 16, 16),
    "primes": (3, 13, 2, 7, 5),
    "exact": (1, 32, 2, 16, 16),
    "tail_of_one": (1, 33, 1, 16, 32),
    "chunks_of_keys": (1, 133, 1, 16, 16),
    "head_of_80": (1, 21, 2, 80, 80),
    "wide_keys": (2, 37, 1, 72, 24),
}


def qkv_of(images, tokens, heads, d_qk, d_v):
    return randn(images, tokens, heads * (2 * d_qk + d_v))


def check(qkv, bias, heads, d_qk, dtype, tile, scale=None):
    scale = d_qk**-0.5 if scale is None else scale
    q = cast((qkv, bias), dtype)
    ours = attention(*q, heads, d_qk, scale, config=tile)
    truth = reference.attention_core(*cast(q, torch.float64), heads, d_qk, scale)
    assert_follows_rule(ours, reference.attention_core(*q, heads, d_qk, scale), truth)
    return ours


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_and_tails(shape, tile):
    _, _, heads, d_qk, _ = SHAPES[shape]
    check(qkv_of(*SHAPES[shape]), None, heads, d_qk, torch.float16, TILES[tile])


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_and_tails_in_fp32(shape):
    _, _, heads, d_qk, _ = SHAPES[shape]
    check(qkv_of(*SHAPES[shape]), None, heads, d_qk, torch.float32, TILES["with_tail"])


@pytest.mark.parametrize("tile", ["at_once", "online"])
@pytest.mark.parametrize("shape", [(23, 23), (2, 23, 23), (1, 1, 1, 23), (3, 2, 23, 23), (3, 1, 23, 1), (1,)], ids=str)
def test_bias_is_read_by_its_own_strides(shape, tile):
    check(qkv_of(3, 23, 2, 16, 16), randn(*shape, seed=5), 2, 16, torch.float16, TILES[tile])


@pytest.mark.parametrize("tile", TILES)
def test_rows_of_minus_infinity_give_zero(tile):
    mask = torch.full((37, 37), float("-inf"), dtype=torch.float64).triu(1)
    mask[20] = float("-inf")
    y = check(qkv_of(2, 37, 1, 16, 16), mask, 1, 16, torch.float32, TILES[tile])
    assert not y[:, 20].any()


@FLOATS
@pytest.mark.parametrize("tile", TILES)
def test_masks_as_people_make_them(tile, dtype):
    for name, row in masks_of(dtype, 37).items():
        mask = torch.zeros(37, 37, dtype=torch.float64)
        mask[1::2] = row
        y = check(qkv_of(1, 37, 1, 16, 16), mask, 1, 16, dtype, TILES[tile])
        assert y.isfinite().all(), name


@pytest.mark.parametrize("tile", ["at_once", "online"])
@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
def test_every_scale(scale, tile):
    check(qkv_of(1, 23, 1, 16, 16), None, 1, 16, torch.float32, TILES[tile], scale)


@pytest.mark.parametrize("tile", TILES)
def test_large_scores_do_not_overflow(tile):
    check(12 * qkv_of(1, 40, 1, 16, 16), None, 1, 16, torch.float32, TILES[tile])


@pytest.fixture
def results_start_as_nan():
    """``torch.empty`` and its like give NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("results_start_as_nan")
@pytest.mark.parametrize("tile", TILES)
def test_reads_only_its_rows_and_writes_all_of_them(tile):
    """NaN before and after the operand: none may reach the result, of which every element is written."""
    qkv = qkv_of(3, 13, 2, 7, 5).float()
    guarded = torch.full((5, *qkv.shape[1:]), float("nan"))
    guarded[1:4] = qkv
    y = attention(guarded[1:4], None, 2, 7, 0.4, config=TILES[tile])
    torch.testing.assert_close(y, attention(qkv, None, 2, 7, 0.4, config=TILES[tile]), rtol=0, atol=0)
    assert y.isfinite().all()


@pytest.mark.parametrize("tile", TILES)
def test_an_image_is_independent_of_its_neighbours(tile):
    qkv = qkv_of(3, 13, 2, 7, 5).half()
    together = attention(qkv, None, 2, 7, 0.4, config=TILES[tile])
    assert torch.equal(together[1:2], attention(qkv[1:2], None, 2, 7, 0.4, config=TILES[tile]))


def test_heads_too_wide_and_what_a_table_leaves_to_pytorch():
    check(qkv_of(1, 5, 1, 260, 16), None, 1, 260, torch.float32, None)
    check(qkv_of(2, 9, 2, 16, 16), randn(9, 9), 2, 16, torch.float16, VENDOR)


# --- the operator -----------------------------------------------------------------------------------------------------


@FLOATS
@pytest.mark.parametrize(
    "static",
    [{}, {"norm_eps": 1e-5, "residual": True}, {"inner_norm_eps": 1e-2, "residual": True}],
    ids=["plain", "norm_residual", "inner_norm"],
)
@pytest.mark.parametrize("shape", [(2, 50, 32, 2, 16, 16), (3, 13, 23, 3, 7, 5), (0, 9, 16, 1, 16, 16)], ids=str)
def test_operator(shape, static, dtype):
    tensors, heads = operands(*shape)
    check_operator(rep_attention, reference.rep_attention, tensors, dtype, **heads, **static)


@pytest.mark.parametrize("shape", [(2, 0, 16, 1, 16, 16), (1, 1, 16, 1, 16, 16)], ids=["no_tokens", "one_token"])
def test_operator_on_hardly_anything(shape):
    tensors, heads = operands(*shape)
    check_operator(rep_attention, reference.rep_attention, tensors, torch.float32, **heads)


@pytest.mark.parametrize("absent", [(2,), (4,), (2, 4)], ids=str)
def test_operator_without_biases(absent):
    tensors, heads = operands(2, 21, 32, 2, 16, 16, c_out=45)
    tensors = tuple(None if i in absent else t for i, t in enumerate(tensors))
    check_operator(rep_attention, reference.rep_attention, tensors, torch.float32, **heads)


def test_operator_takes_masks_and_any_strides():
    tensors, heads = operands(3, 20, 32, 2, 16, 16)
    x, *weights = cast((*tensors, randn(20, 20, seed=5).t()), torch.float32)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = reference.rep_attention(x, *weights, residual=True, **heads)
    y = rep_attention(strided, *weights, residual=True, **heads)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
