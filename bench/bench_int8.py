"""Products in int8 against our own floats and other libraries' int8:  ``pytest bench/bench_int8.py [--results FILE]``.

Speed and what it costs, in one table: every provider's cosine with the float64 truth stands beside its time; a peer
below 0.97 is not timed, and that is said. Peers: ONNX Runtime dynamic (weights per channel, activations per tensor) and
static (QDQ, per channel), OpenVINO on the QDQ graph and on NNCF's quantization for transformers, torchao's dynamic int8
under torch.compile, LiteRT's and ExecuTorch's dynamic int8. What is not installed is left out:
``pip install nncf torchao litert-torch executorch``, keeping the torch that is there.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_models import IMAGE, eager_model
from bench_partial_gelu_ffn import TOKENS, onnx_graph, operands
from torch import Tensor, nn

import repavit_ops
from repavit_ops import ops, reference
from repavit_ops.benchmarking import phones, runtimes
from repavit_ops.benchmarking.harness import interleave, peak_provider, split_peak

OWN = ("float32", "bfloat16", "eager")  # what is no peer of int8, beside it all the same
LEAST = 0.97  # cosine of what is worth timing
CALIBRATED_ON = 16  # images, for peers that need them


def cosine(ours: Tensor, truth: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(ours.double().flatten(), truth.double().flatten(), dim=0).item()


def checked(calls: dict[str, runtimes.Call], truth: Tensor) -> dict[str, float]:
    """The cosine of every provider; takes peers out of ``calls`` whose time nobody would want."""
    cosines = {name: cosine(call(), truth) for name, call in calls.items()}
    for name, value in cosines.items():
        if value >= LEAST:
            continue
        if name in ("int8", *OWN):
            raise AssertionError(f"{name}: cosine {value:.4f} with float64, wanted {LEAST}: not timed")
        print(f"{name}: cosine {value:.4f} with float64, wanted {LEAST}: not timed")
        del calls[name]
    return cosines


def quantized_onnx(graph: bytes, inputs: list[np.ndarray] | None) -> bytes:
    """The graph in int8, weights per channel: dynamic, or static from these inputs as QDQ."""
    import onnx
    from onnxruntime import quantization as q

    with tempfile.TemporaryDirectory() as folder:
        plain, ready, out = (str(Path(folder) / name) for name in ("plain.onnx", "ready.onnx", "int8.onnx"))
        Path(plain).write_bytes(graph)
        q.shape_inference.quant_pre_process(plain, ready, skip_symbolic_shape=True)
        if inputs is None:
            q.quantize_dynamic(ready, out, per_channel=True, weight_type=q.QuantType.QInt8)
        else:

            class Reader(q.CalibrationDataReader):
                def __init__(self) -> None:
                    self.left = iter(inputs)

                def get_next(self) -> dict[str, np.ndarray] | None:
                    return None if (x := next(self.left, None)) is None else {"x": x}

            q.quantize_static(
                ready,
                out,
                Reader(),
                per_channel=True,
                quant_format=q.QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm"],
            )
        return onnx.load(out).SerializeToString()


def nncf_openvino(graph: bytes, x: Tensor, inputs: list[np.ndarray]) -> runtimes.Call | None:
    """OpenVINO on NNCF's post-training quantization for transformers."""
    if any(importlib.util.find_spec(name) is None for name in ("nncf", "openvino")):
        return None
    import nncf
    import openvino as ov

    network = ov.Core().read_model(graph)
    network.reshape(list(x.shape))
    data = nncf.Dataset(inputs)
    small = nncf.quantize(network, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs))
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(small, "CPU", config).create_infer_request()
    request.set_input_tensor(ov.Tensor(np.ascontiguousarray(x.float().numpy())))

    def call() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return call


def torchao_compiled(model: nn.Module, x: Tensor) -> runtimes.Call | None:
    """torchao's dynamic int8 (per token) of every linear layer, under torch.compile."""
    if importlib.util.find_spec("torchao") is None:
        return None
    import copy

    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    small = copy.deepcopy(model)
    quantize_(small, Int8DynamicActivationInt8WeightConfig())
    return runtimes.compiled_module(small, x)


def safely(what: str, make: Callable[[], Any]) -> Any:
    """What a peer gives; where it fails on this model that is said, and it is left out."""
    try:
        return make()
    except Exception as error:
        print(f"{what}: left out, {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return None


def int8_peers(graph: bytes, model: nn.Module | None, x: Tensor, inputs: list[np.ndarray]) -> dict[str, runtimes.Call]:
    have = {name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name) is not None}
    calls: dict[str, runtimes.Call | None] = {}
    if "onnxruntime" in have:
        static = safely("onnxruntime static", lambda: quantized_onnx(graph, inputs))
        calls["onnxruntime dynamic"] = safely(
            "onnxruntime dynamic", lambda: runtimes.onnx_runtime(quantized_onnx(graph, None), x)
        )
        if static is not None:
            calls["onnxruntime static"] = safely("onnxruntime static", lambda: runtimes.onnx_runtime(static, x))
            if "openvino" in have:
                calls["openvino QDQ"] = safely("openvino QDQ", lambda: runtimes.openvino(static, x, torch.float32))
    calls["openvino NNCF"] = safely("openvino NNCF", lambda: nncf_openvino(graph, x, inputs))
    if model is not None:
        calls["torchao"] = safely("torchao", lambda: torchao_compiled(model, x))
        for name, package, make in (
            ("litert dynamic", "litert_torch", phones.litert),
            ("executorch dynamic", "executorch", phones.executorch),
        ):
            if importlib.util.find_spec(package) is not None:
                calls[name] = safely(name, functools.partial(make, model, x, int8=True))
    return {name: call for name, call in calls.items() if call is not None}


@pytest.mark.parametrize("batch", [1, 8], ids=lambda batch: f"batch{batch}")
@pytest.mark.parametrize("c", [192, 384, 768], ids=lambda c: f"C{c}")
@torch.no_grad()
def test_partial_gelu_ffn(benchmark, report, c, batch):
    tensors = operands(c, c, TOKENS * batch, torch.float32)
    x, *weights = tensors
    pack = torch.ops.repavit_ops.partial_gelu_ffn_pack
    calls: dict[str, runtimes.Call] = {}
    for form, dtype in (("int8", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        cast, quantize = [t.to(dtype) for t in tensors], "int8" if form == "int8" else "none"
        packed = pack(cast[1], cast[3], cast[4], quantize=quantize)
        calls[form] = lambda t=cast, p=packed, q=quantize: ops.partial_gelu_ffn(*t, packed=p, quantize=q)
    calls |= int8_peers(onnx_graph(*weights, rows=x.shape[0]), None, x, [x.numpy()])
    cosines = checked(calls, reference.partial_gelu_ffn(*(t.double() for t in tensors)))
    times, peak = split_peak(interleave(calls | peak_provider(torch.int8)), torch.int8)
    benchmark.pedantic(calls["int8"], rounds=5, warmup_rounds=1)
    ours = times["int8"].p50
    ratios = {name: t.p50 / ours for name, t in times.items() if name != "int8"}
    flop = 6 * TOKENS * batch * c * c
    report(
        case=f"ffn int8 C{c} batch {batch}",
        dtype="int8",
        ratio=min((ratio for name, ratio in ratios.items() if name not in OWN), default=ratios["float32"]),
        ratios=ratios,
        cosines=cosines,
        gflops=flop / ours / 1e9,
        share_of_peak=None if peak is None else flop / times["int8"].p20 / peak,
        seconds={name: [t.p20, t.p50, t.p80] for name, t in times.items()},
    )


MODELS = [
    ("deit_tiny", "merged"),
    ("deit_small", "merged"),
    ("deit_base", "merged"),
    ("swin_tiny", "merged"),
    ("deit_base", "vanilla"),
]


@pytest.mark.parametrize("batch", [1, 8], ids=lambda batch: f"batch{batch}")
@pytest.mark.parametrize(("family", "weights"), MODELS, ids=[f"{f}-{w}" for f, w in MODELS])
@torch.no_grad()
def test_model(benchmark, report, family, weights, batch):
    model = eager_model(family, weights)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    inputs = [torch.randn(batch, 3, IMAGE, IMAGE, generator=generator).numpy() for _ in range(CALIBRATED_ON // batch)]
    calls: dict[str, runtimes.Call] = {"eager": lambda: model(x)}
    for form, dtype in (("int8", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        fused = repavit_ops.fuse(model, dtype=dtype, quantize="int8" if form == "int8" else "none")
        calls[form] = functools.partial(fused, x.to(dtype))
    calls |= int8_peers(runtimes.onnx_bytes(model, x), model, x, inputs)
    cosines = checked(calls, repavit_ops.reparameterize(model).double()(x.double()))
    times = interleave(calls, seconds=2.0, rounds=5)
    benchmark.pedantic(calls["int8"], rounds=1)
    ours = times["int8"].p50
    ratios = {name: t.p50 / ours for name, t in times.items() if name != "int8"}
    report(
        case=f"{family} {weights} int8 batch {batch}",
        dtype="int8",
        ratio=min((ratio for name, ratio in ratios.items() if name not in OWN), default=ratios["float32"]),
        ratios=ratios,
        cosines=cosines,
        images_per_second={name: batch / t.p50 for name, t in times.items()},
        seconds={name: [t.p20, t.p50, t.p80] for name, t in times.items()},
    )
