"""What a launch costs the host, in µs: through the launcher, the operator, the module, the model and its graph.

At one image a GPU waits for its host: this, not arithmetic, is then the time of a model that is called eagerly.
"""

from __future__ import annotations

import time

import torch
from gpu_ledger import record
from gpu_models import HEADLINE, TINY, form_of, on_meta
from gpu_timing import Call

import repavit_ops
from repavit_ops import kernels, ops, reference
from repavit_ops.benchmarking.harness import Timing, percentiles
from repavit_ops.kernels.chips import KNOWN

CALLS, ROUNDS = 10, 15  # calls in a row, fewer than a GPU's queue holds; medians over the rounds


def host_times(device: torch.device, small: bool) -> tuple[dict[str, Timing], dict[str, int]]:
    """Provider → seconds that its call keeps the host busy; and how many kernels it launches."""
    real = device.type == "cuda"
    options = TINY if small else {}
    name = "deit_tiny" if small else HEADLINE[0]
    with device:
        fused, merged = form_of(name, "fused", **options), form_of(name, "merged", **options)
    side = options.get("img_size", 224)
    images = torch.randn(1, 3, side, side, device=device).bfloat16()
    tensors, ffn = _ffn(device)
    run = kernels.launcher("partial_gelu_ffn") if real else reference.partial_gelu_ffn
    calls: dict[str, Call] = {
        "ffn launcher": lambda: run(*tensors),
        "ffn operator": lambda: ops.partial_gelu_ffn(*tensors),
        "ffn module": lambda: ffn(tensors[0]),
        "ffn eager": lambda: reference.partial_gelu_ffn(*tensors),
        "model fused": lambda: fused(images),
        "model merged eager": lambda: merged(images),
    }
    model, meta = on_meta(name, "fused", 1, **options)
    plain, _ = on_meta(name, "merged", 1, **options)
    chip = KNOWN["sm_90"]
    launches = {
        "model fused": len(record(lambda: model(meta), chip).launches),
        "model merged eager": len(record(lambda: plain(meta), chip).launches),
    }
    if real:
        graphed = repavit_ops.cuda_graph(fused)
        calls["model graph"] = lambda: graphed(images)
        launches["model graph"] = 1
    return {provider: host_time(call, device) for provider, call in calls.items()}, launches


def _ffn(device: torch.device) -> tuple[list[torch.Tensor], torch.nn.Module]:
    """The FFN of one image of DeiT-S at θ = 0.75: its tensors, and the module of such."""
    c = 384
    shapes = ((197, c), (c, c), (c,), (c, c), (c, c), (c,))
    tensors = [(torch.randn(shape, device=device) * shape[-1] ** -0.5).bfloat16() for shape in shapes]
    return tensors, repavit_ops.nn.PartialGELUFFN(c, c).to(device, torch.bfloat16).eval()


def host_time(call: Call, device: torch.device) -> Timing:
    """Seconds until one call returns, while the GPU is left to follow."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    samples = []
    for _ in range(ROUNDS):
        wait()
        began = time.perf_counter()
        for _ in range(CALLS if device.type == "cuda" else 1):
            call()
        samples.append((time.perf_counter() - began) / (CALLS if device.type == "cuda" else 1))
    wait()
    return percentiles(samples)
