"""FFN kernels: both launches, the special cases of m and w_merged, and the one-launch form, against the reference."""

from __future__ import annotations

import pytest
import torch
from op_helpers import assert_follows_rule, cast, check_operator
from test_partial_gelu_ffn import operands

from repavit_ops import reference
from repavit_ops.kernels import partial_gelu_ffn as ffn
from repavit_ops.kernels.on_chip_ffn import on_chip_ffn
from repavit_ops.kernels.tuning import Config, OnChip

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
TILES = {
    "plain": Config(16, 32, 16, 1, 1, split=False),
    "split": Config(16, 32, 16, 1, 1),
    "descriptors": Config(16, 32, 16, 1, 1, tma=True),
    "persistent": Config(16, 32, 16, 1, 1, persistent=1),
}
# rows, C, H
SHAPES = {"one": (1, 1, 1), "primes": (19, 37, 23), "exact": (16, 32, 32), "tails": (33, 40, 24), "wide": (17, 16, 72)}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
BOTH = {"norm_eps": 1e-6, "residual": True}
STATIC = {
    "plain": {},
    "norm_residual": BOTH,
    "tanh": {"approximate": "tanh"},
    "quick": {"approximate": "quick", **BOTH},
}


@FLOATS
@EVERY_SHAPE
@pytest.mark.parametrize("tile", TILES)
def test_two_sources(tile, shape, dtype):
    """One sum over both sources: never worse than products rounded one by one."""
    x, w_in, _, w_out, w_merged, bias = cast(operands(*SHAPES[shape]), dtype)
    h = torch.nn.functional.gelu(x @ w_in.t())

    def formula(z, w_merged, h, w_out, bias):
        return z @ w_merged.t() + h @ w_out.t() + bias + z

    tensors = (x, w_merged, h, w_out, bias)
    ours = ffn.two_source(*tensors, residual=x, config=TILES[tile])
    assert_follows_rule(ours, formula(*tensors), formula(*cast(tensors, torch.float64)))


@FLOATS
@pytest.mark.parametrize("static", STATIC.values(), ids=STATIC.keys())
@pytest.mark.parametrize("shape", [(19, 37, 23), (0, 8, 4), (3, 0, 4), (3, 8, 0), (1, 1, 1)], ids=str)
def test_operator(shape, static, dtype):
    check_operator(ffn.partial_gelu_ffn, reference.partial_gelu_ffn, operands(*shape), dtype, **static)


@pytest.mark.parametrize("static", [{}, BOTH], ids=["plain", "norm_residual"])
@pytest.mark.parametrize("missing", [{2}, {4}, {5}, {2, 4, 5}], ids=["b_in", "w_merged", "bias", "all"])
def test_optional_tensors(missing, static):
    tensors = tuple(None if i in missing else t for i, t in enumerate(operands(19, 37, 23)))
    check_operator(ffn.partial_gelu_ffn, reference.partial_gelu_ffn, tensors, torch.float32, **static)


def test_any_strides_and_batch_dimensions():
    x, *weights = cast(operands(24, 18, 10), torch.float32)
    check_operator(ffn.partial_gelu_ffn, reference.partial_gelu_ffn, (x.view(2, 3, 4, 18), *weights), torch.float32)
    strided = (x.view(4, 6, 18).transpose(0, 1), *(w.t().contiguous().t() if w.dim() == 2 else w for w in weights))
    expected = reference.partial_gelu_ffn(*strided, **BOTH)
    torch.testing.assert_close(ffn.partial_gelu_ffn(*strided, **BOTH), expected, rtol=1e-5, atol=1e-5)


def one_launch(config):
    def run(x, w_in, b_in, w_out, w_merged, bias, *, norm_eps=None, residual=False, approximate="none"):
        activation = {"none": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}[approximate]
        return on_chip_ffn(x, w_in, b_in, w_out, w_merged, bias, norm_eps, residual, activation, config)

    return run


@FLOATS
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("static", STATIC.values(), ids=STATIC.keys())
@pytest.mark.parametrize("shape", [(19, 37, 23), (33, 48, 16), (16, 40, 72), (3, 8, 0), (1, 1, 1)], ids=str)
def test_on_chip(shape, static, tma, dtype):
    run = one_launch(OnChip(16, 16, 16, 1, 1, tma=tma))
    check_operator(run, reference.partial_gelu_ffn, operands(*shape), dtype, **static)


@pytest.mark.parametrize("static", [{}, BOTH], ids=["plain", "norm_residual"])
def test_on_chip_without_optional_tensors(static):
    x, w_in, _, w_out, _, _ = operands(19, 37, 23)
    run = one_launch(OnChip(16, 16, 16, 1, 1))
    check_operator(run, reference.partial_gelu_ffn, (x, w_in, None, w_out, None, None), torch.float32, **static)
