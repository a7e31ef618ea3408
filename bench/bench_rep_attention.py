"""Attention against its CPU peers: ``pytest bench/bench_rep_attention.py [--results FILE] [--threads N]``.

Three things are timed: the core alone (softmax(q kᵀ) v on given q, k, v) against torch SDPA; the window core with bias
and shift mask against SDPA, which gets the mask added up and the map partitioned; and the whole block (norm, q k v,
attention, projection, residual) against eager, torch.compile, ONNX Runtime and OpenVINO: the latter two from an export
with explicit products, OpenVINO from one with SDPA as well.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repavit_ops import ops, reference
from repavit_ops.benchmarking import runtimes
from repavit_ops.benchmarking.harness import check, interleave, peak_provider, split_peak

OP = torch.ops.repavit_ops
TOKENS = 197
DTYPES = [torch.float32, torch.bfloat16]
CORES = [(heads, d, batch) for heads, d in ((3, 64), (6, 64), (12, 64), (16, 80)) for batch in (1, 8)]
STAGES = [(size, c, batch) for size, c in ((56, 96), (28, 192), (14, 384), (7, 768)) for batch in (1, 8)]  # Swin-T
BLOCKS = [(c, batch) for c in (192, 384, 768) for batch in (1, 8)]
WINDOW, WINDOW_HEAD = (7, 7), 32


def randn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def record(
    benchmark: Any, report: Any, calls: dict[str, runtimes.Call], case: str, dtype: torch.dtype, flop: float
) -> None:
    """Time what has been checked, ratios to every peer."""
    times, peak = split_peak(interleave(calls | peak_provider(dtype), seconds=2.0), dtype)
    benchmark.pedantic(calls["repavit_ops"], rounds=10, warmup_rounds=2)
    ours = times["repavit_ops"].p50
    ratios = {name: t.p50 / ours for name, t in times.items() if name != "repavit_ops"}
    report(
        case=case,
        dtype=str(dtype).removeprefix("torch."),
        ratio=min(ratios.values()),
        ratios=ratios,
        gflops=flop / ours / 1e9,
        share_of_peak=None if peak is None else flop / times["repavit_ops"].p20 / peak,
        seconds={name: [t.p20, t.p50, t.p80] for name, t in times.items()},
    )
    benchmark.extra_info.update(ratios)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "d", "batch"), CORES, ids=[f"{TOKENS}x{d}-heads{h}-batch{b}" for h, d, b in CORES])
def test_core(benchmark, report, heads, d, batch, dtype):
    qkv = randn(batch, TOKENS, 3 * heads * d, dtype=dtype, seed=0)
    q, k, v = (t.view(batch, TOKENS, heads, d).transpose(1, 2).contiguous() for t in qkv.split(heads * d, -1))
    calls = {
        "repavit_ops": lambda: OP.attention_core(qkv, None, num_heads=heads, d_qk=d, scale=d**-0.5),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    eager, truth = (reference.attention_core(t, None, heads, d, d**-0.5) for t in (qkv, qkv.double()))
    check("repavit_ops", calls["repavit_ops"](), eager, truth)
    flop = 4 * batch * heads * TOKENS**2 * d
    record(benchmark, report, calls, f"core {TOKENS}x{d} heads {heads} batch {batch}", dtype, flop)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "c", "batch"), STAGES, ids=[f"{s}x{s}-C{c}-batch{b}" for s, c, b in STAGES])
def test_window_core(benchmark, report, size, c, batch, dtype):
    heads, tokens = c // WINDOW_HEAD, WINDOW[0] * WINDOW[1]
    shift = (3, 3) if size > WINDOW[0] else (0, 0)
    qkv = randn(batch, size, size, 3 * c, dtype=dtype, seed=0)
    rel_bias = randn(heads, tokens, tokens, dtype=dtype, seed=1)
    scale = WINDOW_HEAD**-0.5

    rolled = torch.roll(qkv, (-shift[0], -shift[1]), (1, 2))
    parts = reference.window_partition(rolled, WINDOW).split(c, -1)
    q, k, v = (t.view(-1, tokens, heads, WINDOW_HEAD).transpose(1, 2).contiguous() for t in parts)
    mask = rel_bias.unsqueeze(0)
    if any(shift):
        mask = mask + reference.shift_mask((size, size), WINDOW, shift, dtype, qkv.device).unsqueeze(1)
        mask = mask.repeat(batch, 1, 1, 1)
    calls = {
        "repavit_ops": lambda: OP.window_attention_core(
            qkv, rel_bias, None, num_heads=heads, d_qk=WINDOW_HEAD, scale=scale, window=WINDOW, shift=shift
        ),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }
    eager, truth = (
        reference.window_attention_core(x, b, None, heads, WINDOW_HEAD, scale, WINDOW, shift, False)
        for x, b in ((qkv, rel_bias), (qkv.double(), rel_bias.double()))
    )
    check("repavit_ops", calls["repavit_ops"](), eager, truth)
    flop = 4 * q.shape[0] * heads * tokens**2 * WINDOW_HEAD
    record(benchmark, report, calls, f"windows {size}x{size}x{c} batch {batch}", dtype, flop)


class SdpaBlock(torch.nn.Module):
    """The block in float32 PyTorch with one SDPA, as a converter likes it."""

    def __init__(self, w_qkv: Tensor, b_qkv: Tensor, w_proj: Tensor, b_proj: Tensor, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name, t in (("w_qkv", w_qkv), ("b_qkv", b_qkv), ("w_proj", w_proj), ("b_proj", b_proj)):
            self.register_buffer(name, t.float())

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, c = x.shape
        qkv = F.linear(F.layer_norm(x, (c,), eps=1e-6), self.w_qkv, self.b_qkv)
        q, k, v = qkv.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, c)
        return x + F.linear(o, self.w_proj, self.b_proj)


def onnx_block(w_qkv: Tensor, b_qkv: Tensor, w_proj: Tensor, b_proj: Tensor, tokens: int, heads: int) -> bytes:
    """The block in ONNX: norm core, one product for q | k | v, explicit products and softmax, projection, residual."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, value: np.ndarray) -> onnx.TensorProto:
        return numpy_helper.from_array(value.copy(order="C"), name)  # keeps a scalar a scalar

    c = w_proj.shape[0]
    d = c // heads
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "one", "zero"], ["z"], axis=-1, epsilon=1e-6),
        node("MatMul", ["z", "w_qkv"], ["a"]),
        node("Add", ["a", "b_qkv"], ["qkv"]),
        node("Reshape", ["qkv", "split"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[2, 0, 3, 1, 4]),
        *(node("Gather", ["t", f"i{i}"], [name], axis=0) for i, name in enumerate("qkv")),
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], ["s0"]),
        node("Mul", ["s0", "scale"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["o0"]),
        node("Transpose", ["o0"], ["o1"], perm=[0, 2, 1, 3]),
        node("Reshape", ["o1", "join"], ["o"]),
        node("MatMul", ["o", "w_proj"], ["y0"]),
        node("Add", ["y0", "b_proj"], ["y1"]),
        node("Add", ["y1", "x"], ["y"]),
    ]
    weights = {"w_qkv": w_qkv.t(), "b_qkv": b_qkv, "w_proj": w_proj.t(), "b_proj": b_proj}
    weights |= {"one": torch.ones(c), "zero": torch.zeros(c), "scale": torch.tensor(d**-0.5)}
    constants = [constant(name, t.float().numpy()) for name, t in weights.items()]
    constants += [constant("split", np.array([0, tokens, 3, heads, d])), constant("join", np.array([0, tokens, c]))]
    constants += [constant(f"i{i}", np.array(i)) for i in range(3)]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", tokens, c]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "attention", value[:1], value[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("c", "batch"), BLOCKS, ids=[f"C{c}-batch{b}" for c, b in BLOCKS])
def test_block(benchmark, report, c, batch, dtype):
    heads = c // 64
    x = randn(batch, TOKENS, c, dtype=dtype, seed=0)
    weights = (
        randn(3 * c, c, dtype=dtype, seed=1, scale=c**-0.5),
        randn(3 * c, dtype=dtype, seed=2, scale=0.1),
        randn(c, c, dtype=dtype, seed=3, scale=c**-0.5),
        randn(c, dtype=dtype, seed=4, scale=0.1),
    )
    static: dict[str, Any] = {"num_heads": heads, "scale": 64**-0.5, "d_qk": 64, "norm_eps": 1e-6, "residual": True}
    packed = OP.rep_attention_pack(weights[0], weights[2], num_heads=heads, d_qk=64)

    def eager(x: Tensor, *weights: Tensor) -> Tensor:
        return reference.rep_attention(x, *weights, **static)

    with torch.no_grad():
        calls: dict[str, runtimes.Call | None] = {
            "repavit_ops": lambda: ops.rep_attention(x, *weights, packed=packed, **static),
            "eager": lambda: eager(x, *weights),
            "compile": runtimes.compiled(eager, x, *weights),
        }
        if importlib.util.find_spec("onnx") is not None:
            graph = onnx_block(*weights, tokens=TOKENS, heads=heads)
            calls["openvino"] = runtimes.openvino(graph, x, dtype)
            calls["openvino sdpa"] = runtimes.openvino(SdpaBlock(*weights, heads=heads), x, dtype)
            if dtype == torch.float32:
                calls["onnxruntime"] = runtimes.onnx_runtime(graph, x)
        present = {name: call for name, call in calls.items() if call is not None}
        truth = eager(x.double(), *(w.double() for w in weights))
        plain = eager(x, *weights)
        for name, call in present.items():
            check(name, call(), plain, truth, slack=2.0 if name == "repavit_ops" else 8.0)
        rows = batch * TOKENS
        flop = 2 * rows * c * (4 * c) + 4 * rows * TOKENS * c
        record(benchmark, report, present, f"block C{c} batch {batch}", dtype, flop)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("c", "batch"), BLOCKS, ids=[f"C{c}-batch{b}" for c, b in BLOCKS])
def test_turned_block(benchmark, report, c, batch, dtype):
    """Rotary embedding of all but the class token, and QK-norm on top: over the block without, and over eager."""
    heads = c // 64
    x = randn(batch, TOKENS, c, dtype=dtype, seed=0)
    weights = (
        randn(3 * c, c, dtype=dtype, seed=1, scale=c**-0.5),
        randn(3 * c, dtype=dtype, seed=2, scale=0.1),
        randn(c, c, dtype=dtype, seed=3, scale=c**-0.5),
        randn(c, dtype=dtype, seed=4, scale=0.1),
    )
    angles = randn(TOKENS - 1, 64, dtype=torch.float32, seed=5)
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    norm = {"q_norm": torch.ones(2, 64, dtype=dtype), "k_norm": torch.ones(2, 64, dtype=dtype), "qk_norm_eps": 1e-6}
    static: dict[str, Any] = {"num_heads": heads, "scale": 64**-0.5, "d_qk": 64, "norm_eps": 1e-6, "residual": True}
    packed = OP.rep_attention_pack(weights[0], weights[2], num_heads=heads, d_qk=64)

    def block(**more: Any) -> runtimes.Call:
        return lambda: ops.rep_attention(x, *weights, packed=packed, **static, **more)

    def eager() -> Tensor:
        return reference.rep_attention(x, *weights, **rotary, **norm, **static)

    with torch.no_grad():
        calls = {
            "repavit_ops": block(**rotary, **norm),
            "without both": block(),
            "rotary alone": block(**rotary),
            "qk-norm alone": block(**norm),
            "eager": eager,
        }
        wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in {**rotary, **norm}.items()}
        truth = reference.rep_attention(x.double(), *(w.double() for w in weights), **wide, **static)
        check("repavit_ops", calls["repavit_ops"](), eager(), truth)
        rows = batch * TOKENS
        flop = 2 * rows * c * (4 * c) + 4 * rows * TOKENS * c
        record(benchmark, report, calls, f"turned block C{c} batch {batch}", dtype, flop)
