"""The operator partial_gelu_ffn on every backend this machine has: shapes, tails, strides, options, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_helpers import DTYPES, cast, check_operator, randn, weight

from repavit_ops import ops, reference

SHAPES = {  # tokens, C, m
    "deit_tiny": (197, 192, 192),
    "deit_small_half_idle": (197, 384, 768),
    "deit_tiny_vanilla": (50, 192, 768),
    "swin_stage1": (3136 // 8, 96, 96),
    "window": (49, 128, 128),
    "huge": (33, 1280, 1280),
    "m_zero": (17, 48, 0),
    "m_one": (17, 48, 1),
    "primes": (13, 37, 29),
    "one_token": (1, 64, 64),
    "one_channel": (5, 1, 3),
    "no_tokens": (0, 32, 32),
    "no_channels": (4, 0, 8),
    "off_by_one": (15, 65, 33),
}


def formula(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """GELU as models write it."""
    return x * torch.sigmoid(1.702 * x) if approximate == "quick" else F.gelu(x, approximate=approximate)


def operands(tokens: int, c: int, m: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, w_in, b_in, w_out, w_merged, bias in float64."""
    return (
        randn(tokens, c, seed=seed),
        weight(m, c, seed + 1),
        randn(m, seed=seed + 2, scale=0.5),
        weight(c, m, seed + 3),
        weight(c, c, seed + 4),
        randn(c, seed=seed + 5, scale=0.5),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_truth_at_every_shape(shape, dtype):
    check_operator(ops.partial_gelu_ffn, reference.partial_gelu_ffn, operands(*shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["no_norm", "norm"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_every_option(dtype, norm_eps, residual, approximate):
    static = {"norm_eps": norm_eps, "residual": residual, "approximate": approximate}
    check_operator(ops.partial_gelu_ffn, reference.partial_gelu_ffn, operands(29, 70, 45), dtype, **static)


@pytest.mark.parametrize("absent", [(2,), (4,), (5,), (2, 4, 5)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_absent_operands_add_nothing(absent, residual):
    tensors = tuple(None if i in absent else t for i, t in enumerate(operands(21, 40, 24)))
    check_operator(ops.partial_gelu_ffn, reference.partial_gelu_ffn, tensors, torch.float32, residual=residual)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 2, 3), (0, 5)], ids=str)
def test_any_batch_shape(batch):
    _, *weights = operands(1, 36, 20)
    check_operator(
        ops.partial_gelu_ffn, reference.partial_gelu_ffn, (randn(*batch, 36), *weights), torch.float32, residual=True
    )


def test_strided_and_misaligned_inputs_equal_contiguous_ones():
    x, *weights = cast(operands(24, 40, 24), torch.float32)
    expected = ops.partial_gelu_ffn(x, *weights)
    transposed = x.t().contiguous().t()
    wide = torch.zeros(24, 80)
    wide[:, ::2] = x
    shifted = torch.zeros(24 * 40 + 1)[1:].view(24, 40).copy_(x)
    for variant in (transposed, wide[:, ::2], shifted, x.expand(2, 24, 40)[1]):
        torch.testing.assert_close(ops.partial_gelu_ffn(variant, *weights), expected, rtol=0, atol=0)
    strided = [w.t().contiguous().t() if w.dim() == 2 else w for w in weights]
    torch.testing.assert_close(ops.partial_gelu_ffn(x, *strided), expected, rtol=0, atol=0)


def test_output_never_aliases_and_inputs_are_untouched():
    tensors = cast(operands(19, 32, 16), torch.float32)
    before = [t.clone() for t in tensors]
    y = ops.partial_gelu_ffn(*tensors, residual=True)
    assert all(y.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in tensors)
    y.fill_(float("nan"))
    for t, copy in zip(tensors, before, strict=True):
        assert torch.equal(t, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_input_gives_the_same_bits_alone_or_in_a_batch(dtype):
    x, *weights = cast(operands(197, 96, 96), dtype)
    neighbours = torch.cat([cast((randn(3, 197, 96, seed=9),), dtype)[0], x[None]])
    first = ops.partial_gelu_ffn(x, *weights)
    assert torch.equal(first, ops.partial_gelu_ffn(x, *weights))
    assert torch.equal(first, ops.partial_gelu_ffn(neighbours, *weights)[3])


@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_gelu_itself_with_tails(approximate):
    """Identity weights show the activation alone: its accuracy, and NaN, ±Inf, ±0, the greatest as PyTorch has them."""
    c = 64
    grid = torch.cat([torch.linspace(-9, 9, 64 * 63), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 38.0, -38.0] * 11)[:64]])
    x = grid.view(-1, 1).expand(-1, c).contiguous()
    eye, zeros = torch.eye(c), torch.zeros(c, c)
    y = ops.partial_gelu_ffn(x, eye, None, eye, zeros, None, approximate=approximate)
    truth = formula(x.double(), approximate)
    assert (y.double() - truth).abs().max() <= 2e-7 + 4e-7 * truth.abs().max()  # the products add their own rounding
    one = torch.ones(1, 1)
    for value in (float("nan"), float("inf"), float("-inf")):
        got = ops.partial_gelu_ffn(torch.tensor([[value]]), one, None, one, None, None, approximate=approximate)
        torch.testing.assert_close(got, formula(torch.tensor([[value]]), approximate), equal_nan=True)
    for dtype in DTYPES:
        huge = torch.tensor([[torch.finfo(dtype).max], [torch.finfo(dtype).min]], dtype=dtype)
        got = ops.partial_gelu_ffn(huge, one.to(dtype), None, one.to(dtype), None, None, approximate=approximate)
        assert torch.equal(got, huge.clamp(min=0))


def test_m_zero_is_linear_and_m_hidden_is_the_plain_ffn():
    x, _, _, _, w_merged, bias = cast(operands(11, 24, 0), torch.float64)
    empty = torch.empty(0, 24, dtype=torch.float64)
    y = ops.partial_gelu_ffn(x, empty, empty[:, 0], empty.t(), w_merged, bias)
    torch.testing.assert_close(y, F.linear(x, w_merged, bias))
    x, w_in, b_in, w_out, _, bias = cast(operands(11, 24, 96), torch.float64)
    y = ops.partial_gelu_ffn(x, w_in, b_in, w_out, None, bias, residual=True)
    torch.testing.assert_close(y, F.linear(F.gelu(F.linear(x, w_in, b_in)), w_out, bias) + x)


def test_permuting_active_channels_changes_nothing():
    x, w_in, b_in, w_out, w_merged, bias = operands(11, 24, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ops.partial_gelu_ffn(x, w_in[order], b_in[order], w_out[:, order], w_merged, bias),
        ops.partial_gelu_ffn(x, w_in, b_in, w_out, w_merged, bias),
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_follows_torch_threads(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_operator(ops.partial_gelu_ffn, reference.partial_gelu_ffn, operands(197, 64, 64), torch.float32)
    finally:
        torch.set_num_threads(before)


BAD = {
    "x_channels": (lambda t: (t[0][:, :-1], *t[1:]), "x: got 7 channels"),
    "w_out_shape": (lambda t: (*t[:3], t[3].t(), *t[4:]), "w_out: got shape"),
    "w_merged_shape": (lambda t: (*t[:4], t[4][:-1], t[5]), "w_merged: got shape"),
    "b_in_shape": (lambda t: (*t[:2], t[2][:-1], *t[3:]), "b_in: got shape"),
    "bias_shape": (lambda t: (*t[:5], t[5][:-1]), "bias: got shape"),
    "dtype": (lambda t: (t[0], t[1].half(), *t[2:]), "w_in: got torch.float16, but x is torch.float64"),
    "integer": (lambda t: (t[0].long(), *t[1:]), "x: got torch.int64"),
    "device": (lambda t: (t[0], t[1].to("meta"), *t[2:]), "w_in: on meta, but x is on cpu"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_bad_operands_are_named(spoil, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ops.partial_gelu_ffn(*spoil(operands(3, 8, 5)))


def test_bad_options_are_named():
    tensors = operands(3, 8, 5)
    with pytest.raises(ValueError, match="approximate: got 'erf'"):
        ops.partial_gelu_ffn(*tensors, approximate="erf")
    with pytest.raises(ValueError, match="norm_eps: got -1"):
        ops.partial_gelu_ffn(*tensors, norm_eps=-1.0)
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        ops.partial_gelu_ffn(*tensors, backend="cuda")
    with pytest.raises(ValueError, match="'triton' runs on cuda tensors"):
        ops.partial_gelu_ffn(*tensors, backend="triton")


def test_meta_tensors_give_shapes():
    tensors = tuple(t.to("meta") for t in operands(3, 8, 5))
    assert ops.partial_gelu_ffn(*tensors).shape == (3, 8)


def test_mixed_floats_pass_the_checks_under_autocast_only():
    x, *weights = cast(operands(3, 8, 5), torch.float32)
    with pytest.raises(ValueError, match="cast one with"):
        ops.partial_gelu_ffn(x.bfloat16(), *weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.partial_gelu_ffn(x.bfloat16(), *weights).dtype == torch.bfloat16
