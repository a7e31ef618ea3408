"""gated_ffn (SwiGLU) against every CPU peer: ``pytest bench/bench_gated_ffn.py [--results FILE]``.

Peers get the same weights in the same precision and the same threads: PyTorch eager, torch.compile (frozen,
max-autotune), oneDNN's fused linears, ONNX Runtime (fp32 only), OpenVINO. ``plain`` is our own partial_gelu_ffn of as
many products, on hidden channels half as many again: what the gate costs beyond them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repavit_ops import ops, reference
from repavit_ops.benchmarking import runtimes
from repavit_ops.benchmarking.harness import check, interleave, peak_provider, split_peak

TOKENS = 197
CASES = [(c, m, batch) for c, m in ((192, 512), (384, 1024), (768, 2048), (1024, 2730)) for batch in (1, 8)]


def operands(c: int, m: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, w_gate, b_gate, w_up, b_up, w_out, bias: x ~ N(0, 1), weights ~ 1/√fan_in, seeded."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    gates = [(randn(m, c, scale=c**-0.5), randn(m, scale=0.1)) for _ in range(2)]
    return randn(rows, c), *gates[0], *gates[1], randn(c, m, scale=m**-0.5), randn(c, scale=0.1)


def swiglu(
    x: Tensor, w_gate: Tensor, b_gate: Tensor, w_up: Tensor, b_up: Tensor, w_out: Tensor, bias: Tensor
) -> Tensor:
    """As models write it."""
    return F.linear(F.silu(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up), w_out, bias)


def onednn(
    x: Tensor, w_gate: Tensor, b_gate: Tensor, w_up: Tensor, b_up: Tensor, w_out: Tensor, bias: Tensor
) -> runtimes.Call:
    """oneDNN's fused linears as torch.compile reaches them: linear + SiLU, linear times that, linear."""
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0]) for w in (w_gate, w_up, w_out)]
    pointwise = torch.ops.mkldnn._linear_pointwise

    def call() -> Tensor:
        gate = pointwise.default(x, packed[0], b_gate, "swish", [], "none")
        hidden = pointwise.binary(x, gate, packed[1], b_up, "mul")
        return pointwise.default(hidden, packed[2], bias, "none", [], "")

    return call


def onnx_graph(weights: tuple[Tensor, ...], rows: int) -> bytes:
    """The FFN as ONNX, K-major weights."""
    from onnx import TensorProto, helper, numpy_helper

    names = ("w_gate", "b_gate", "w_up", "b_up", "w_out", "bias")
    constants = [
        numpy_helper.from_array(np.ascontiguousarray((w.t() if w.dim() == 2 else w).float().numpy()), name)
        for name, w in zip(names, weights, strict=True)
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w_gate"], ["g0"]),
        helper.make_node("Add", ["g0", "b_gate"], ["g1"]),
        helper.make_node("Sigmoid", ["g1"], ["g2"]),
        helper.make_node("Mul", ["g1", "g2"], ["g"]),
        helper.make_node("MatMul", ["x", "w_up"], ["u0"]),
        helper.make_node("Add", ["u0", "b_up"], ["u"]),
        helper.make_node("Mul", ["g", "u"], ["h"]),
        helper.make_node("MatMul", ["h", "w_out"], ["y0"]),
        helper.make_node("Add", ["y0", "bias"], ["y"]),
    ]
    c = weights[-1].shape[0]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, c]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "gated_ffn", value[:1], value[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


def plain_of_as_many_products(x: Tensor, c: int, m: int) -> runtimes.Call:
    hidden = m * 3 // 2
    w_in, w_out = (
        torch.randn(s, dtype=torch.float32).mul_(s[1] ** -0.5).to(x.dtype) for s in ((hidden, c), (c, hidden))
    )
    packed = torch.ops.repavit_ops.partial_gelu_ffn_pack(w_in, w_out, None)
    return lambda: ops.partial_gelu_ffn(x, w_in, None, w_out, None, None, packed=packed)


def providers(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, runtimes.Call]:
    x, w_gate, b_gate, w_up, b_up, w_out, bias = tensors
    packed = torch.ops.repavit_ops.gated_ffn_pack(w_gate, w_up, w_out, None)
    graph = onnx_graph(tensors[1:], rows=x.shape[0])
    weights = (w_gate, b_gate, w_up, b_up, w_out, None, bias)
    calls: dict[str, runtimes.Call | None] = {
        "repavit_ops": lambda: ops.gated_ffn(x, *weights, activation="silu", packed=packed),
        "eager": lambda: swiglu(*tensors),
        "compile": runtimes.compiled(swiglu, *tensors),
        "onednn": onednn(*tensors),
        "openvino": runtimes.openvino(graph, x, dtype),
    }
    if dtype == torch.float32:
        calls["onnxruntime"] = runtimes.onnx_runtime(graph, x)
    return {name: call for name, call in calls.items() if call is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("c", "m", "batch"), CASES, ids=[f"C{c}-m{m}-batch{b}" for c, m, b in CASES])
def test_gated_ffn(benchmark, report, c, m, batch, dtype):
    tensors = operands(c, m, TOKENS * batch, dtype)
    with torch.no_grad():
        calls = providers(tensors, dtype)
        x, *weights = (t.double() for t in tensors)
        truth = reference.gated_ffn(x, *weights[:5], None, weights[5], activation="silu")
        eager = calls["eager"]()
        check("repavit_ops", calls["repavit_ops"](), eager, truth)
        for name in calls:
            check(name, calls[name](), eager, truth, slack=8.0)
        calls["plain"] = plain_of_as_many_products(tensors[0], c, m)
        times, peak = split_peak(interleave(calls | peak_provider(dtype)), dtype)
        benchmark.pedantic(calls["repavit_ops"], rounds=10, warmup_rounds=2)
    ours, plain = times["repavit_ops"], times.pop("plain")
    ratios = {name: t.p50 / ours.p50 for name, t in times.items() if name != "repavit_ops"}
    flop = 6 * TOKENS * batch * c * m
    report(
        case=f"gated ffn C{c} m{m} batch {batch}",
        dtype=str(dtype).removeprefix("torch."),
        ratio=min(ratios.values()),
        ratios=ratios,
        gflops=flop / ours.p50 / 1e9,
        share_of_peak=None if peak is None else flop / ours.p20 / peak,
        plain_share_of_peak=None if peak is None else flop / plain.p20 / peak,
        seconds={name: [t.p20, t.p50, t.p80] for name, t in times.items()},
    )
    benchmark.extra_info.update(ratios)
