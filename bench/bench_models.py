"""Whole models against every CPU peer: ``pytest bench/bench_models.py [-k "deit_tiny and batch1"] [--results FILE]``.

Every family with the method's weights (merged: peers get the merged model too) and vanilla (no retraining), batch 1, 8
and 32, float32 and bfloat16, 224 pixels. Peers: PyTorch eager, torch.compile with frozen weights, and an ONNX export of
the same model in OpenVINO and, in float32, ONNX Runtime; ``--peers openvino`` leaves others out (max-autotune takes
minutes).
"""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from torch import Tensor, nn

import repavit_ops
from repavit_ops.benchmarking import runtimes
from repavit_ops.benchmarking.harness import check, interleave
from repavit_ops.benchmarking.models import CHECKED, FAMILIES, seeded_model
from repavit_ops.models import complexity

PREFIXES = {"merged": "repa", "vanilla": "vanilla"}
IMAGE = 224  # pixels
ROUNDS = {1: 5, 8: 5, 32: 3}  # by batch, at least; a call of ViT-L on 32 images takes 20 seconds
PARTS = "part by part"  # the fused model without its one call; no peer


@functools.lru_cache(maxsize=1)
def eager_model(family: str, weights: str) -> nn.Module:
    """The plain PyTorch model that the peers get, merged."""
    return repavit_ops.reparameterize(seeded_model(f"{PREFIXES[weights]}_{family}"), inplace=True)


def providers(model: nn.Module, x: Tensor, dtype: torch.dtype, wanted: tuple[str, ...]) -> dict[str, runtimes.Call]:
    """Ours and every wanted peer on the same model; images are in ``dtype``."""
    own = repavit_ops.fuse(model, dtype=dtype)
    cast = model if dtype == torch.float32 else repavit_ops.reparameterize(model).to(dtype)
    float32 = x.float()
    calls: dict[str, runtimes.Call | None] = {"repavit_ops": lambda: own(x), "eager": lambda: cast(x)}
    if own.why_apart(x) is None:
        calls[PARTS] = lambda: own.forward_head(own.forward_features(x))
    if dtype != torch.float32:
        calls["eager float32"] = lambda: model(float32)
    if "compile" in wanted:
        calls["compile"] = runtimes.compiled_module(cast, x)
    if importlib.util.find_spec("onnxscript") is not None and {"openvino", "onnxruntime"} & {*wanted}:
        graph = runtimes.onnx_bytes(model, float32)
        if "openvino" in wanted:
            calls["openvino"] = runtimes.openvino(graph, x, dtype)
        if "onnxruntime" in wanted and dtype == torch.float32:
            calls["onnxruntime"] = runtimes.onnx_runtime(graph, x)
    return {name: call for name, call in calls.items() if call is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", ROUNDS, ids=lambda batch: f"batch{batch}")
@pytest.mark.parametrize("weights", PREFIXES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_model(benchmark, report, wanted_peers, family, weights, batch, dtype):
    model = eager_model(family, weights)
    x = torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1)).to(dtype)
    calls = providers(model, x, dtype, wanted_peers)
    some = x[:CHECKED]
    truth = repavit_ops.reparameterize(model).double()(some.double())
    plain = calls["eager"]()[:CHECKED]
    for name, call in calls.items():
        check(name, call()[:CHECKED], plain, truth, slack=2.0 if name in ("repavit_ops", PARTS) else 8.0)
    times = interleave(calls, seconds=2.0, rounds=ROUNDS[batch])
    benchmark.pedantic(calls["repavit_ops"], rounds=1)
    ours = times["repavit_ops"].p50
    ratios = {name: t.p50 / ours for name, t in times.items() if name != "repavit_ops"}
    report(
        case=f"{family} {weights} batch {batch}",
        dtype=str(dtype).removeprefix("torch."),
        ratio=min(ratio for name, ratio in ratios.items() if name != PARTS),
        ratios=ratios,
        gflops=2 * complexity(model, IMAGE).macs * batch / ours / 1e9,
        images_per_second={name: batch / t.p50 for name, t in times.items()},
        seconds={name: [t.p20, t.p50, t.p80] for name, t in times.items()},
    )
    benchmark.extra_info.update(ratios)
