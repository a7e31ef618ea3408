"""linear: masks, tails, strides, activations and LayerNorm cores against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_helpers import assert_follows_rule, randn, weight

from repavit_ops import reference
from repavit_ops.kernels.layer_norm import core, layer_norm_core
from repavit_ops.kernels.linear import linear
from repavit_ops.kernels.on_chip_ffn import on_chip_ffn
from repavit_ops.kernels.operands import are_aligned
from repavit_ops.kernels.tuning import Config, OnChip

SMALL = Config(16, 32, 16, warps=1, stages=1, split=False)
SPLIT = Config(16, 32, 16, warps=1, stages=1, split=True)
DESCRIPTORS = Config(16, 32, 16, warps=1, stages=1, tma=True)
ONE_PROGRAM_EACH = Config(16, 32, 16, warps=1, stages=1, persistent=True)
TILES = {"small": SMALL, "split": SPLIT, "descriptors": DESCRIPTORS, "persistent": ONE_PROGRAM_EACH}

SHAPES = {
    "one": (1, 1, 1),
    "no_rows": (0, 3, 4),
    "no_columns": (3, 0, 4),
    "no_terms": (3, 5, 0),
    "primes": (37, 53, 19),
    "exact": (32, 64, 32),
    "tail_of_rows": (17, 32, 16),
    "aligned_tails": (33, 72, 40),
}


def formula(x, w, b=None, *, activation="none", norm_eps=None, residual=None):
    z = x if norm_eps is None else F.layer_norm(x, x.shape[-1:], eps=norm_eps)
    y = F.linear(z, w, b)
    if activation != "none":
        y = reference.gelu(y, {"gelu": "none", "gelu_tanh": "tanh", "gelu_quick": "quick"}[activation])
    return y if residual is None else y + residual


def operands(m, n, k, dtype):
    tensors = randn(m, k), weight(n, k, 1), randn(n, seed=2), randn(m, n, seed=3)
    return tuple(t.to(dtype) for t in tensors)


def check(x, w, b, residual, config=SMALL, **static):
    ours = linear(x, w, b, residual=residual, config=config, **static)
    eager = formula(x, w, b, residual=residual, **static)
    wide = tuple(None if t is None else t.double() for t in (x, w, b, residual))
    assert_follows_rule(ours, eager, formula(*wide[:3], residual=wide[3], **static))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_and_tails(shape, tile, dtype):
    check(*operands(*SHAPES[shape], dtype), TILES[tile], activation="gelu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "gelu_quick"])
def test_activations_over_their_whole_range(activation, dtype):
    x = torch.linspace(-12, 12, 320, dtype=torch.float64).to(dtype).view(20, 16)
    check(x, torch.eye(16, dtype=dtype), None, None, activation=activation)
    far = torch.tensor([[-6e4, 6e4, -1e3, 1e3, -0.0, 0.0, -30.0, 30.0]], dtype=dtype)
    check(far, torch.eye(8, dtype=dtype), None, None, activation=activation)


@pytest.mark.parametrize("prologue", [False, True], ids=["kernel_in_front", "prologue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("k", [1, 16, 37, 64])
def test_layer_norm_core(k, dtype, prologue):
    x, w, b, residual = operands(19, 12, k, dtype)
    for rows in (x, x + 30, x * 1e-3):  # ordinary, far from zero, small
        check(rows, w, b, residual, Config(16, 32, 16, 1, 1, norm_prologue=prologue), norm_eps=1e-6)


def huge_rows(k, number):
    """Rows whose sums or squares are beyond fp32, one that is constant, and an ordinary one among them."""
    x = randn(5, k).float()
    x[0] = number
    x[1, ::2], x[1, 1::2] = number, -number
    x[2, 0], x[3, -1] = number, -number
    return x


@pytest.mark.parametrize("number", [1e19, 3e38])
@pytest.mark.parametrize("way", ["kernel_in_front", "prologue", "descriptors", "on_chip"])
def test_layer_norm_core_beyond_the_sums_of_fp32(way, number):
    for k in (37, 64):
        x, eye = huge_rows(k, number), torch.eye(k)
        truth = F.layer_norm(x.double(), (k,), eps=1e-6)
        if way == "on_chip":
            y = on_chip_ffn(x, eye[:0], None, eye[:, :0], eye, None, 1e-6, False, "gelu", OnChip(16, 16, 16, 1, 1))
        else:
            config = Config(16, 32, 16, 1, 1, tma=way == "descriptors", norm_prologue=way != "kernel_in_front")
            y = linear(x, eye, norm_eps=1e-6, config=config)
        assert torch.count_nonzero(y[0]) == 0
        assert (y.double() - truth).abs().max() <= 1e-5 * truth.abs().max()
        assert (y[4].double() - truth[4]).abs().max() <= 1e-6 * truth[4].abs().max()
        x[1, 3] = float("inf")
        assert linear(x, eye, norm_eps=1e-6, config=SMALL)[1].isnan().all()


def test_constant_rows_beyond_the_sums_of_fp32():
    """Whatever their mean was rounded to."""
    x = torch.linspace(1e37, 3e38, 48)[:, None].expand(48, 37)
    assert torch.count_nonzero(layer_norm_core(x.contiguous(), 1e-6)) == 0


def test_root_mean_square_beyond_the_sums_of_fp32():
    x = huge_rows(37, 3e38)
    truth = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt()
    error = (core(x, 1e-6, "rms").double() - truth).abs().max()
    assert error <= 1e-6 * truth.abs().max()


def test_optional_arguments_and_batch_dimensions():
    x, w, b, residual = operands(24, 10, 12, torch.float32)
    check(x, w, None, None)
    check(x.view(2, 3, 4, 12), w, b, residual.view(2, 3, 4, 10))
    assert linear(x[0], w, b, config=SMALL).shape == (10,)


def test_any_strides_and_offsets():
    x, w, b, residual = operands(20, 12, 16, torch.float32)
    wide = torch.zeros(20, 33)
    wide[:, 1:17] = x
    check(wide[:, 1:17], w, b, residual)  # misaligned rows inside a wider buffer
    check(x.t().contiguous().t(), w.t().contiguous().t(), b, residual.t().contiguous().t())
    check(x.view(4, 5, 16).transpose(0, 1), w, b, None)
    check(x[:1].expand(20, 16), w, torch.stack([b, b], 1)[:, 0], residual)
    wide_residual = torch.zeros(20, 40)
    wide_residual[:, 5:17] = residual
    check(x, w, b, wide_residual[:, 5:17])
    check(wide[:, 1:17], w, b, residual, DESCRIPTORS)  # descriptors cannot: pointers, unasked and right


def test_writes_nothing_beyond_and_reads_nothing_beyond():
    """Rows and columns around the operands hold NaN; none may reach the result, by pointers or descriptors."""
    x, w, b, residual = operands(19, 20, 18, torch.float32)
    padded_x, padded_w = torch.full((25, 40), float("nan")), torch.full((30, 40), float("nan"))
    padded_x[3:22, 8:26], padded_w[2:22, 4:22] = x, w
    assert are_aligned(padded_x[3:22, 8:26], padded_w[2:22, 4:22], residual)  # so that descriptors are made
    for config in TILES.values():
        y = linear(padded_x[3:22, 8:26], padded_w[2:22, 4:22], b, residual=residual, config=config)
        torch.testing.assert_close(y, linear(x, w, b, residual=residual, config=SMALL), rtol=0, atol=0)


def test_result_of_a_row_is_independent_of_its_neighbours():
    x, w, b, residual = operands(40, 16, 24, torch.float16)
    whole = linear(x, w, b, residual=residual, activation="gelu", norm_eps=1e-6, config=SMALL)
    part = linear(x[5:9], w, b, residual=residual[5:9], activation="gelu", norm_eps=1e-6, config=SMALL)
    assert torch.equal(whole[5:9], part)


def test_more_row_tiles_than_a_group():
    """Tiles go column by column within groups of eight row tiles; here are ten and two."""
    check(*operands(150, 33, 16, torch.float32))


def test_tile_of_the_default_rule():
    x, w, b, residual = operands(50, 40, 24, torch.float32)
    check(x, w, b, residual, config=None, activation="gelu", norm_eps=1e-5)
