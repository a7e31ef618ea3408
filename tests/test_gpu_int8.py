"""Products of bytes on a GPU: numbers of every operator, graphs that follow weights, whole models."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import CUDA, assert_graph_replays, every_dtype, to_gpu
from model_helpers import images, tiny_swin, tiny_vit
from op_helpers import randn
from test_gated_ffn import operands as gated_operands
from test_int8 import assert_same_numbers, attention_operands
from test_partial_gelu_ffn import SHAPES, operands

import repavit_ops
from repavit_ops import ops, reference

pytestmark = pytest.mark.gpu

LARGE = {"deit_tiny_128": (128 * 197, 192, 192), "deit_base_8": (8 * 197, 768, 768)}
OPTIONS = {"norm_eps": 1e-6, "residual": True, "quantize": "int8"}


@every_dtype
@pytest.mark.parametrize("shape", SHAPES | LARGE)
def test_ffn(shape, dtype):
    tensors = to_gpu(operands(*(SHAPES | LARGE)[shape]), dtype)
    ours = ops.partial_gelu_ffn(*tensors, **OPTIONS, backend="triton")
    assert_same_numbers(ours, reference.partial_gelu_ffn(*tensors, **OPTIONS), 0.6)


@every_dtype
def test_gated_ffn(dtype):
    tensors = to_gpu(gated_operands(400, 192, 512), dtype)
    ours = ops.gated_ffn(*tensors, activation="silu", **OPTIONS, backend="triton")
    assert_same_numbers(ours, reference.gated_ffn(*tensors, activation="silu", **OPTIONS), 0.6)


@every_dtype
@pytest.mark.parametrize("sizes", [(2, 197, 192, 3, 64), (4, 17, 48, 3, 16)], ids=str)
def test_attention(sizes, dtype):
    _, _, _, heads, d = sizes
    tensors, static = to_gpu(attention_operands(*sizes), dtype), {"num_heads": heads, "scale": d**-0.5, "d_qk": d}
    ours = ops.rep_attention(*tensors, **static, **OPTIONS, backend="triton")
    assert_same_numbers(ours, reference.rep_attention(*tensors, None, **static, **OPTIONS), 0.4)


@every_dtype
def test_windows(dtype):
    _, *weights = to_gpu(attention_operands(1, 1, 96, 3, 32), dtype)
    x, rel_bias = to_gpu((randn(2, 10, 13, 96), randn(3, 16, 16, seed=7)), dtype)
    static = {"num_heads": 3, "scale": 0.2, "window": (4, 4), "shift": (2, 1)}
    ours = ops.window_rep_attention(x, *weights, rel_bias=rel_bias, **static, **OPTIONS, backend="triton")
    wanted = reference.window_rep_attention(x, *weights, rel_bias, None, **static, **OPTIONS)
    assert_same_numbers(ours, wanted, 0.4)


def test_a_token_that_is_not_finite_is_nan_alone():
    x, *weights = to_gpu(operands(64, 192, 96), torch.bfloat16)
    plain = ops.partial_gelu_ffn(x, *weights, **OPTIONS)
    x[7, 3], x[9, 5] = float("nan"), float("inf")
    y = ops.partial_gelu_ffn(x, *weights, **OPTIONS)
    others = [i for i in range(64) if i not in (7, 9)]
    assert y[[7, 9]].isnan().all()
    assert torch.equal(y[others], plain[others])


def test_graphs_replay_and_follow_the_weights():
    x, *weights = to_gpu(operands(197, 192, 96), torch.bfloat16)
    assert_graph_replays(lambda x, *w: ops.partial_gelu_ffn(x, *w, **OPTIONS), x, *weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.partial_gelu_ffn(x, *weights, **OPTIONS)
    weights[0].data.mul_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, ops.partial_gelu_ffn(x, *weights, **OPTIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_models(name, dtype):
    model, x = (tiny_vit(), images(4)) if name == "vit" else (tiny_swin(), images(4, 64))
    fused = repavit_ops.fuse(model.to(CUDA), dtype=dtype, quantize="int8")
    report = repavit_ops.verify(model, fused, x.to(CUDA))
    assert report, str(report)
    calibrated = repavit_ops.fuse(model, dtype=dtype, quantize="int8", calibration=[x])
    assert repavit_ops.verify(model, calibrated, x.to(CUDA))
