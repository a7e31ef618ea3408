"""partial_gelu_ffn against every CPU peer: ``pytest bench/bench_partial_gelu_ffn.py [--results FILE]``.

Peers get the same weights in the same precision and the same threads: PyTorch eager, torch.compile (frozen,
max-autotune), oneDNN's fused linears, ONNX Runtime (fp32 only), OpenVINO.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from repavit_ops import ops, reference
from repavit_ops.benchmarking import runtimes
from repavit_ops.benchmarking.harness import check, interleave, peak_provider, split_peak

TOKENS = 197
CASES = [(c, batch, 1) for c in (192, 384, 768, 1024, 1280) for batch in (1, 8)] + [(384, 1, 2), (384, 8, 2)]


def operands(c: int, m: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, w_in, b_in, w_out, w_merged, bias: x ~ N(0, 1), weights ~ 1/√fan_in, seeded."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    return (
        randn(rows, c),
        randn(m, c, scale=c**-0.5),
        randn(m, scale=0.1),
        randn(c, m, scale=m**-0.5),
        randn(c, c, scale=c**-0.5),
        randn(c, scale=0.1),
    )


def onednn(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, w_merged: Tensor, bias: Tensor) -> runtimes.Call:
    """oneDNN's fused linears as torch.compile reaches them: linear + GELU, linear, linear + add."""
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0]) for w in (w_in, w_out, w_merged)]
    pointwise = torch.ops.mkldnn._linear_pointwise

    def call() -> Tensor:
        h = pointwise.default(x, packed[0], b_in, "gelu", [], "none")
        idle = pointwise.default(x, packed[2], bias, "none", [], "")
        return pointwise.binary(h, idle, packed[1], None, "add")

    return call


def onnx_graph(w_in: Tensor, b_in: Tensor, w_out: Tensor, w_merged: Tensor, bias: Tensor, rows: int) -> bytes:
    """The FFN as ONNX, K-major weights, erf GELU as one node."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, t: Tensor) -> onnx.TensorProto:
        return numpy_helper.from_array(np.ascontiguousarray(t.float().numpy()), name)

    c = w_merged.shape[0]
    nodes = [
        helper.make_node("MatMul", ["x", "w_in"], ["h0"]),
        helper.make_node("Add", ["h0", "b_in"], ["h1"]),
        helper.make_node("Gelu", ["h1"], ["h"]),
        helper.make_node("MatMul", ["h", "w_out"], ["y0"]),
        helper.make_node("MatMul", ["x", "w_merged"], ["y1"]),
        helper.make_node("Add", ["y1", "bias"], ["y2"]),
        helper.make_node("Add", ["y0", "y2"], ["y"]),
    ]
    weights = {"w_in": w_in.t(), "b_in": b_in, "w_out": w_out.t(), "w_merged": w_merged.t(), "bias": bias}
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, c]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "ffn", value[:1], value[1:], [constant(k, v) for k, v in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


def providers(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, runtimes.Call]:
    x, *weights = tensors
    packed = torch.ops.repavit_ops.partial_gelu_ffn_pack(weights[0], weights[2], weights[3])
    graph = onnx_graph(*weights, rows=x.shape[0])
    calls: dict[str, runtimes.Call | None] = {
        "repavit_ops": lambda: ops.partial_gelu_ffn(x, *weights, packed=packed),
        "eager": lambda: reference.partial_gelu_ffn(x, *weights),
        "compile": runtimes.compiled(reference.partial_gelu_ffn, *tensors),
        "onednn": onednn(*tensors),
        "openvino": runtimes.openvino(graph, x, dtype),
    }
    if dtype == torch.float32:
        calls["onnxruntime"] = runtimes.onnx_runtime(graph, x)
    return {name: call for name, call in calls.items() if call is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("c", "batch", "mu"), CASES, ids=[f"C{c}-batch{b}-mu{mu}" for c, b, mu in CASES])
def test_partial_gelu_ffn(benchmark, report, c, batch, mu, dtype):
    tensors = operands(c, mu * c, TOKENS * batch, dtype)
    with torch.no_grad():
        calls = providers(tensors, dtype)
        truth = reference.partial_gelu_ffn(*(t.double() for t in tensors))
        eager = calls["eager"]()
        check("repavit_ops", calls["repavit_ops"](), eager, truth)
        for name in calls:
            check(name, calls[name](), eager, truth, slack=8.0)
        times, peak = split_peak(interleave(calls | peak_provider(dtype)), dtype)
        benchmark.pedantic(calls["repavit_ops"], rounds=10, warmup_rounds=2)
    ours = times["repavit_ops"].p50
    ratios = {name: t.p50 / ours for name, t in times.items() if name != "repavit_ops"}
    flop = 2 * TOKENS * batch * c * c * (2 * mu + 1)
    report(
        case=f"ffn C{c} batch {batch} mu {mu}",
        dtype=str(dtype).removeprefix("torch."),
        ratio=min(ratios.values()),
        ratios=ratios,
        gflops=flop / ours / 1e9,
        share_of_peak=None if peak is None else flop / times["repavit_ops"].p20 / peak,
        seconds={name: [t.p20, t.p50, t.p80] for name, t in times.items()},
    )
    benchmark.extra_info.update(ratios)
