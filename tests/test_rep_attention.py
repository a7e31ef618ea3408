"""The operator rep_attention on every backend this machine has: head shapes, long rows, masks, options, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_helpers import DTYPES, cast, check_operator, randn, weight
from torch.nn.attention import SDPBackend, sdpa_kernel

from repavit_ops import ops, reference

SHAPES = {  # batch, tokens, C, heads, d_qk, d_v
    "deit_tiny": (2, 197, 192, 3, 64, 64),
    "deit_small": (1, 197, 384, 6, 64, 64),
    "huge_heads_of_80": (1, 197, 160, 2, 80, 80),
    "clip_b32": (3, 50, 128, 2, 64, 64),
    "dino_s14": (1, 257, 128, 2, 64, 64),
    "swin_window": (4, 49, 96, 3, 32, 32),
    "long_row": (1, 1025, 64, 1, 64, 64),
    "head_of_16": (2, 33, 32, 2, 16, 16),
    "head_of_128": (1, 40, 128, 1, 128, 128),
    "wide_keys": (2, 37, 48, 2, 72, 24),
    "wide_values": (2, 37, 48, 2, 24, 72),
    "primes": (3, 13, 23, 3, 7, 5),
    "one_token": (2, 1, 32, 2, 16, 16),
    "two_tokens": (1, 2, 16, 1, 16, 16),
    "no_images": (0, 9, 16, 1, 16, 16),
    "no_tokens": (2, 0, 16, 1, 16, 16),
}


def operands(batch, tokens, c, heads, d_qk, d_v, c_out=None, seed=0):
    """Tensors (x, w_qkv, b_qkv, w_proj, b_proj) in float64 and the static arguments."""
    width = heads * (2 * d_qk + d_v)
    c_out = c if c_out is None else c_out
    tensors = (
        randn(batch, tokens, c, seed=seed),
        weight(width, c, seed + 1),
        randn(width, seed=seed + 2, scale=0.5),
        weight(c_out, heads * d_v, seed + 3),
        randn(c_out, seed=seed + 4, scale=0.5),
    )
    return tensors, {"num_heads": heads, "scale": d_qk**-0.5, "d_qk": d_qk}


def op(*tensors, **static):
    """The functional operator with all its tensors positional, as the reference takes them."""
    names = ("attn_bias", "rotary_cos", "rotary_sin", "q_norm", "k_norm")
    return ops.rep_attention(*tensors[:5], **dict(zip(names, tensors[5:], strict=False)), **static)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_truth_at_every_shape(shape, dtype):
    tensors, static = operands(*shape)
    check_operator(op, reference.rep_attention, tensors, dtype, **static)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-5], ids=["no_norm", "norm"])
@pytest.mark.parametrize("inner_norm_eps", [None, 1e-5], ids=["", "inner_norm"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_every_option(dtype, norm_eps, inner_norm_eps, residual):
    tensors, static = operands(2, 29, 40, 2, 20, 20)
    static |= {"norm_eps": norm_eps, "inner_norm_eps": inner_norm_eps, "residual": residual}
    check_operator(op, reference.rep_attention, tensors, dtype, **static)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_an_inner_norm_at_every_shape(shape, dtype):
    tensors, static = operands(*shape)
    check_operator(op, reference.rep_attention, tensors, dtype, inner_norm_eps=1e-2, **static)


def test_the_inner_norm_is_over_all_heads_of_a_token():
    (x, w_qkv, b_qkv, w_proj, b_proj), static = operands(2, 21, 32, 4, 8, 6)
    heads = ops.rep_attention(x, w_qkv, b_qkv, torch.eye(24, dtype=torch.float64), None, **static)
    y = ops.rep_attention(x, w_qkv, b_qkv, w_proj, b_proj, inner_norm_eps=1e-3, **static)
    torch.testing.assert_close(y, F.linear(F.layer_norm(heads, (24,), eps=1e-3), w_proj, b_proj))


@pytest.mark.parametrize("absent", [(2,), (4,), (2, 4)], ids=str)
def test_absent_biases_add_nothing(absent):
    tensors, static = operands(2, 21, 32, 2, 16, 16)
    tensors = tuple(None if i in absent else t for i, t in enumerate(tensors))
    check_operator(op, reference.rep_attention, tensors, torch.float32, **static)


def test_projection_may_change_the_channels():
    tensors, static = operands(2, 21, 32, 2, 16, 16, c_out=45)
    assert check_operator(op, reference.rep_attention, tensors, torch.float32, **static).shape == (2, 21, 45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(23, 23), (2, 23, 23), (1, 1, 1, 23), (3, 2, 23, 23), (3, 1, 23, 1), (1,)], ids=str)
def test_bias_of_any_broadcastable_shape(shape, dtype):
    tensors, static = operands(3, 23, 32, 2, 16, 16)
    check_operator(op, reference.rep_attention, (*tensors, randn(*shape, seed=5)), dtype, **static)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [19, 700], ids=["single_pass", "online"])
def test_minus_infinity_masks_and_wholly_masked_rows_give_what_sdpa_gives(tokens, dtype):
    tensors, static = operands(2, tokens, 32, 2, 16, 16)
    mask = torch.full((tokens, tokens), float("-inf"), dtype=torch.float64).triu(1)
    mask[tokens // 2] = float("-inf")
    y = check_operator(op, reference.rep_attention, (*tensors, mask), dtype, **static)
    bias = tensors[4].to(dtype)
    torch.testing.assert_close(y[:, tokens // 2], bias.expand(2, -1))  # attends to nothing: only b_proj is left


def masks_of(dtype, tokens):
    """Rows of masks as people write them: -inf, finfo.min and other large values, for some keys or for all."""
    least, most = torch.finfo(dtype).min, torch.finfo(dtype).max
    rows = {
        "all_least": (least, least),
        "some_least": (least, 0.0),
        "minus_infinity_and_least": (-float("inf"), least),
        "all_most": (most, most),
        "some_most": (0.0, most),
        "least_and_most": (least, most),
        "two_large_values": (least, least / 1.25),
        "most_after_large": (most / 1.25, most),
        "all_minus_1e4": (-1e4, -1e4),
        "all_minus_infinity": (-float("inf"), -float("inf")),
    }
    first = torch.arange(tokens) < tokens // 2
    return {
        name: torch.where(first, *(torch.tensor(v, dtype=torch.float64) for v in row)) for name, row in rows.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [19, 700], ids=["single_pass", "online"])
def test_masks_as_people_make_them(tokens, dtype):
    """No value of a mask overflows: a row wholly finfo.min attends to all tokens alike, as scores vanish beside it."""
    tensors, static = operands(2, tokens, 32, 2, 16, 16)
    for name, row in masks_of(dtype, tokens).items():
        mask = torch.zeros(tokens, tokens, dtype=torch.float64)
        mask[1::2] = row
        y = check_operator(op, reference.rep_attention, (*tensors, mask), dtype, **static)
        assert y.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_row_wholly_at_the_least_number_gives_the_mean_of_the_values(dtype):
    tensors, static = operands(2, 19, 32, 2, 16, 16)
    x, w_qkv, b_qkv, w_proj, b_proj = cast(tensors, dtype)
    y = ops.rep_attention(
        x,
        w_qkv,
        b_qkv,
        w_proj,
        b_proj,
        attn_bias=torch.full((1, 1, 1, 19), torch.finfo(dtype).min, dtype=dtype),
        **static,
    )
    values = F.linear(tensors[0], w_qkv[-32:].double(), b_qkv[-32:].double()).mean(1, keepdim=True)
    expected = F.linear(values, w_proj.double(), b_proj.double()).expand(-1, 19, -1)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol={torch.bfloat16: 3e-2}.get(dtype, 1e-5))


def test_a_learned_bias_takes_the_formula_down_the_same_way_as_a_constant_one():
    """PyTorch's SDPA has another, slower one for masks that could get a gradient; without grad mode none can."""
    tensors, static = operands(1, 49, 32, 2, 16, 16)
    bias = torch.nn.Parameter(randn(2, 49, 49, seed=9))
    with torch.no_grad():
        learned = op(*tensors, bias, backend="reference", **static)
        assert torch.equal(learned, op(*tensors, bias.detach(), backend="reference", **static))


def test_a_learned_bias_keeps_its_tangent_without_grad_mode():
    tensors, static = operands(1, 7, 16, 2, 8, 8)
    bias, tangent = torch.nn.Parameter(randn(2, 7, 7, seed=9)), randn(2, 7, 7, seed=10)

    def tangents():
        return torch.func.jvp(lambda bias: reference.rep_attention(*tensors, bias, **static), (bias,), (tangent,))[1]

    with sdpa_kernel(SDPBackend.MATH):
        expected = tangents()
        with torch.no_grad():
            torch.testing.assert_close(tangents(), expected)


def test_large_scores_do_not_overflow():
    tensors, static = operands(1, 40, 32, 2, 16, 16)
    tensors = (tensors[0] * 60, *tensors[1:])
    check_operator(op, reference.rep_attention, tensors, torch.float32, **static)


def test_long_rows_of_4096_tokens():
    tensors, static = operands(1, 4096, 16, 1, 16, 16)
    check_operator(op, reference.rep_attention, tensors, torch.float32, norm_eps=1e-6, residual=True, **static)


def test_strided_inputs_equal_contiguous_ones_and_nothing_is_aliased():
    tensors, static = operands(2, 24, 32, 2, 16, 16)
    x, *weights = cast(tensors, torch.float32)
    expected = ops.rep_attention(x, *weights, residual=True, **static)
    variant = x.transpose(0, 1).contiguous().transpose(0, 1)
    shifted = torch.zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    for other in (variant, shifted):
        torch.testing.assert_close(
            ops.rep_attention(other, *weights, residual=True, **static), expected, rtol=0, atol=0
        )
    assert expected.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_input_gives_the_same_bits_alone_or_in_a_batch(dtype):
    tensors, static = operands(4, 50, 64, 2, 32, 32)
    x, *weights = cast(tensors, dtype)
    together = ops.rep_attention(x, *weights, **static)
    assert torch.equal(together, ops.rep_attention(x, *weights, **static))
    swapped = torch.cat([x[:1], cast((randn(3, 50, 64, seed=8),), dtype)[0]])
    assert torch.equal(ops.rep_attention(swapped, *weights, **static)[0], together[0])


def test_permuting_tokens_permutes_the_output():
    tensors, static = operands(1, 30, 32, 2, 16, 16)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    y = ops.rep_attention(*tensors, **static)
    torch.testing.assert_close(ops.rep_attention(tensors[0][:, order], *tensors[1:], **static), y[:, order])


def test_equals_scaled_dot_product_attention_by_hand():
    (x, w_qkv, b_qkv, w_proj, b_proj), static = operands(2, 11, 24, 2, 12, 12)
    q, k, v = (t.view(2, 11, 2, 12).transpose(1, 2) for t in F.linear(x, w_qkv, b_qkv).chunk(3, -1))
    p = torch.softmax(q @ k.transpose(-1, -2) * static["scale"], -1)
    by_hand = F.linear((p @ v).transpose(1, 2).reshape(2, 11, 24), w_proj, b_proj)
    torch.testing.assert_close(ops.rep_attention(x, w_qkv, b_qkv, w_proj, b_proj, **static), by_hand)


BAD = {
    "x_shape": (lambda t, s: ((t[0][0], *t[1:]), s), "x: got shape"),
    "w_qkv_rows": (lambda t, s: ((t[0], t[1][:-1], *t[2:]), s), "w_qkv: got shape"),
    "b_qkv": (lambda t, s: ((*t[:2], t[2][:-1], *t[3:]), s), "b_qkv: got shape"),
    "w_proj": (lambda t, s: ((*t[:3], t[3][:, :-1], t[4]), s), "w_proj: got shape"),
    "b_proj": (lambda t, s: ((*t[:4], t[4][:-1]), s), "b_proj: got shape"),
    "no_heads": (lambda t, s: (t, {**s, "num_heads": 0}), "num_heads: got 0"),
    "bool_mask": (lambda t, s: ((*t, torch.ones(5, 5, dtype=torch.bool)), s), "attn_bias: got a bool mask"),
    "bias_shape": (lambda t, s: ((*t, torch.zeros(4, 5).double()), s), "attn_bias: got shape"),
    "dtype": (lambda t, s: ((t[0].float(), *t[1:]), s), "w_qkv: got torch.float64, but x is torch.float32"),
    "inner_norm_eps": (lambda t, s: (t, {**s, "inner_norm_eps": float("nan")}), "inner_norm_eps: got nan, wanted None"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(spoil, message):
    tensors, static = spoil(*operands(2, 5, 8, 2, 4, 4))
    with pytest.raises(ValueError, match=message):
        op(*tensors, **static)


def test_residual_needs_equal_channels():
    tensors, static = operands(2, 5, 8, 2, 4, 4, c_out=9)
    with pytest.raises(ValueError, match="residual: x has 8 channels but w_proj gives 9"):
        ops.rep_attention(*tensors, residual=True, **static)


@pytest.mark.parametrize("tokens", [530, 600])
def test_a_bias_of_a_row_alone_shifts_no_weight(tokens):
    """One number for all keys of a query, of which there are more than one block: the softmax does not see it."""
    tensors, static = operands(1, tokens, 16, 2, 8, 8)
    tensors = cast(tensors, torch.float32)
    bias = randn(tokens, 1).float() * 3
    torch.testing.assert_close(op(*tensors, bias, **static), op(*tensors, None, **static), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("tokens", [1, 3, 6, 17])
def test_a_scale_that_is_not_positive(tokens, scale):
    """Keys that only fill up a vector must not weigh, though their scores would be the greatest."""
    tensors, static = operands(2, tokens, 8, 2, 4, 4)
    static["scale"] = scale
    truth = op(*tensors, None, **static, backend="reference")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        y = op(*cast(tensors, dtype), None, **static, backend="cpp")
        torch.testing.assert_close(y.double(), truth, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-4)
