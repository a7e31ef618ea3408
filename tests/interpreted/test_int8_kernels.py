"""Quantized rows and weights, and the products of bytes, against their definition in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from op_helpers import cast, randn, weight
from test_gated_ffn import operands as gated_operands
from test_int8 import assert_same_numbers, attention_operands
from test_partial_gelu_ffn import operands as ffn_operands
from test_rotary_attention import operands as turned_operands
from test_rotary_attention import static_of

from repavit_ops import nn, reference, reference_int8, stack_plan
from repavit_ops.kernels.fused_blocks import fused_blocks
from repavit_ops.kernels.gated_ffn import gated_ffn
from repavit_ops.kernels.int8 import int8_gated, int8_linear
from repavit_ops.kernels.partial_gelu_ffn import partial_gelu_ffn
from repavit_ops.kernels.quantize_rows import quantize_rows, quantize_weights
from repavit_ops.kernels.rep_attention import rep_attention
from repavit_ops.kernels.tuning import Config
from repavit_ops.kernels.window_rep_attention import window_rep_attention

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
SHAPES = pytest.mark.parametrize("shape", [(19, 37, 23), (16, 64, 32), (1, 1, 1), (5, 5000, 3)], ids=str)
TILES = {
    "plain": Config(16, 16, 32, 1, 1, split=False),
    "descriptors": Config(16, 32, 32, 1, 1, tma=True),
    "persistent": Config(16, 16, 64, 1, 1, persistent=1),
}


def odd_rows(m: int, k: int) -> torch.Tensor:
    """Random rows; some are one number, zero, tiny, huge, span more than floats do, or hold a NaN or an infinity."""
    x = randn(m, k).float()
    for row, number in enumerate((0.0, 7.25, 1e-38, -3e38)):
        x[row] = number
    x[4, 0], x[4, 1], x[5, k - 1], x[6, k // 2] = 3e38, -3e38, float("nan"), float("-inf")
    x[7] *= 1e30
    return x


@SHAPES
@FLOATS
def test_rows_are_the_definitions(shape, dtype):
    m, k, _ = shape
    x = randn(m, k).to(dtype)
    ours, wanted = quantize_rows(x), reference_int8.rows(x.float())
    assert torch.equal(ours.q[:, :k].float() + 128, wanted.q)
    assert not ours.q[:, k:].any()
    assert torch.equal(ours.scale, wanted.scale.squeeze(-1))
    assert torch.equal(ours.offset, wanted.offset.squeeze(-1))


@pytest.mark.parametrize("of", ["rows", "weights"])
def test_odd_rows_are_the_definitions(of):
    x = odd_rows(11, 37)
    if of == "rows":
        ours, wanted = quantize_rows(x), reference_int8.rows(x)
        assert torch.equal(ours.q[:, :37].float() + 128, wanted.q)
        torch.testing.assert_close(ours.offset, wanted.offset.squeeze(-1), rtol=0, atol=0)
    else:
        ours, wanted = quantize_weights(x), reference_int8.weights(x)
        assert torch.equal(ours.q[:, :37].float(), wanted.q)
        assert torch.equal(ours.sums.float(), wanted.q.sum(-1))
    torch.testing.assert_close(ours.scale, wanted.scale.squeeze(-1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rows_behind_their_norm(norm):
    x = randn(9, 37).float() * 3 + 1
    ours, wanted = quantize_rows(x, 1e-6, norm), reference_int8.rows(reference.normed(x, 1e-6, norm))
    assert (ours.q[:, :37].float() + 128 - wanted.q).abs().max() <= 1
    assert (ours.q[:, :37].float() + 128 == wanted.q).double().mean() > 0.95
    torch.testing.assert_close(ours.scale, wanted.scale.squeeze(-1))


@SHAPES
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("second", [False, True], ids=["", "two_segments"])
def test_products_are_exact(shape, tile, second):
    m, k, n = shape
    x, w, bias, shortcut = randn(m, k).float(), weight(n, k, 1).float(), randn(n, seed=2).float(), randn(m, n).float()
    x2, w2 = randn(m, 21, seed=3).float() * 5, weight(n, 21, 4).float()
    wanted = reference_int8.linear(x, w, bias) + shortcut
    segment = None
    if second:
        wanted, segment = wanted + reference_int8.linear(x2, w2, None), (quantize_rows(x2), quantize_weights(w2))
    ours = int8_linear(
        quantize_rows(x),
        quantize_weights(w),
        bias,
        torch.float32,
        residual=shortcut,
        second=segment,
        config=TILES[tile],
    )
    torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=4e-6)


@SHAPES
@pytest.mark.parametrize("tile", TILES)
def test_gates_are_exact(shape, tile):
    x, w_gate, b_gate, w_up, b_up, *_ = cast(gated_operands(*shape), torch.float32)
    gate, up = reference_int8.linear(x, w_gate, b_gate), reference_int8.linear(x, w_up, b_up)
    columns = quantize_weights(w_gate), b_gate, quantize_weights(w_up), b_up
    ours = int8_gated(quantize_rows(x), *columns, "silu", True, config=TILES[tile])
    torch.testing.assert_close(ours, torch.nn.functional.silu(gate) * up, rtol=4e-6, atol=1e-5)


@FLOATS
@pytest.mark.parametrize("absent", [(), (2, 4, 5)], ids=["", "no_biases_no_merged"])
@pytest.mark.parametrize("norm", [None, "layer", "rms"], ids=str)
def test_ffn(norm, absent, dtype):
    tensors = [None if i in absent else t for i, t in enumerate(cast(ffn_operands(29, 70, 45), dtype))]
    static = {"norm_eps": norm and 1e-6, "norm": norm or "layer", "residual": norm != "rms", "quantize": "int8"}
    assert_same_numbers(partial_gelu_ffn(*tensors, **static), reference.partial_gelu_ffn(*tensors, **static), 0.8)


@FLOATS
@pytest.mark.parametrize("inner_norm_eps", [None, 1e-2], ids=["", "inner_norm"])
def test_gated_ffn(inner_norm_eps, dtype):
    tensors = cast(gated_operands(29, 70, 45), dtype)
    static = {"activation": "silu", "inner_norm_eps": inner_norm_eps, "norm_eps": 1e-6, "residual": True}
    ours = gated_ffn(*tensors, **static, quantize="int8")
    assert_same_numbers(ours, reference.gated_ffn(*tensors, **static, quantize="int8"), 0.6)


@pytest.mark.parametrize("shape", [(0, 8, 4), (3, 0, 4), (3, 8, 0)], ids=str)
def test_empty_sizes(shape):
    tensors = cast(ffn_operands(*shape), torch.float32)
    ours = partial_gelu_ffn(*tensors, quantize="int8")
    assert_same_numbers(ours, reference.partial_gelu_ffn(*tensors, quantize="int8"))


@FLOATS
@pytest.mark.parametrize("inner_norm_eps", [None, 1e-2], ids=["", "inner_norm"])
def test_attention(inner_norm_eps, dtype):
    tensors = cast(attention_operands(2, 19, 24, 2, 12), dtype)
    static = {"num_heads": 2, "scale": 0.3, "d_qk": 12, "norm_eps": 1e-6, "residual": True, "quantize": "int8"}
    static |= {"inner_norm_eps": inner_norm_eps}
    bias = randn(2, 19, 19, seed=9).to(dtype)
    ours = rep_attention(*tensors, bias, **static)
    assert_same_numbers(ours, reference.rep_attention(*tensors, bias, **static), 0.8 if dtype == torch.float32 else 0.5)


def test_turned_queries_and_keys():
    operands = turned_operands(2, 19, 24, 2, 12, 8, 1, 6, "each", 1e-5)
    tensors = {name: None if t is None else t.float() for name, t in operands.items()}
    static = static_of(2, 12, norm_eps=1e-6, residual=True, qk_norm="rms", qk_norm_eps=1e-5) | {"quantize": "int8"}
    assert_same_numbers(rep_attention(**tensors, **static), reference.rep_attention(**tensors, **static), 0.8)


def test_windows():
    _, *weights = cast(attention_operands(1, 1, 24, 2, 12), torch.float32)
    x, rel_bias = randn(2, 5, 7, 24).float(), randn(2, 16, 16, seed=7).float()
    static = {"num_heads": 2, "scale": 0.3, "window": (4, 4), "shift": (2, 1), "norm_eps": 1e-6, "quantize": "int8"}
    ours = window_rep_attention(x, *weights, rel_bias, None, **static)
    assert_same_numbers(ours, reference.window_rep_attention(x, *weights, rel_bias, None, **static), 0.8)


def test_a_run_of_blocks():
    ffn = nn.PartialGELUFFN(16, 8, norm_eps=1e-5, residual=True, quantize="int8").requires_grad_(False)
    attn = nn.RepAttention(16, 1, norm_eps=1e-5, residual=True, quantize="int8").requires_grad_(False)
    x = randn(2, 9, 16).float()
    weights, plan, scalars = stack_plan.encode([attn.step(), ffn.step()])
    ours = fused_blocks(x, weights, plan=plan, scalars=scalars)
    assert_same_numbers(ours, reference.fused_blocks(x, weights, plan=plan, scalars=scalars))
