"""Whole models that are timed on a GPU: fused beside merged and vanilla, eager and compiled, each in one CUDA graph."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch
from gpu_cases import OURS, Case, checked, compiled, randn
from gpu_models import MODELS, create, on_meta
from gpu_timing import Call
from torch import Tensor, nn

import repavit_ops

# Cases of one model: which forms stand beside fused, and by which mode of torch.compile. A case each, since compiling
# takes long: what needs none is written first.
FORMS = {
    "plain": (("merged", "vanilla"), None),
    "merged compiled": (("merged",), "compile"),
    "vanilla compiled": (("vanilla",), "compile"),
    "merged max_autotune": (("merged",), "max_autotune"),
}


def model_case(name: str, form: str, batch: int, **options: Any) -> Case:
    """A whole classifier in bf16 beside its other forms in plain PyTorch; ``form``: of ``FORMS``."""
    forms, mode = FORMS[form]

    def build(device: torch.device, compiles: bool) -> dict[str, Call]:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.manual_seed(0)
        with device:  # weights are drawn there
            trained = create(name, **options)
            vanilla = create(name, vanilla=True, **options) if "vanilla" in forms else None
        side = options.get("img_size", 224)
        images = randn(batch, 3, side, side, device=device)
        ours = partial(repavit_ops.fuse(trained, dtype=torch.bfloat16), images)
        calls: dict[str, Call] = {OURS: ours}
        wanted = mode if compiles else None
        if "merged" in forms:
            calls = _right_forms("merged_", repavit_ops.reparameterize(trained), images, wanted, calls)
        if vanilla is not None:  # fused was checked against its own weights
            fused = repavit_ops.fuse(vanilla, dtype=torch.bfloat16)
            beside = {"vanilla_fused": partial(fused, images)} if mode is None else {}
            calls |= _right_forms("vanilla_", vanilla, images, wanted, beside)
        return calls

    def meta() -> None:
        model, images = on_meta(name, "fused", batch, **options)
        model(images)

    suffix = "" if form == "plain" else f" {form}"
    facts = {"idle_ratio": MODELS[name]}
    return Case("models", f"{name} batch {batch}{suffix}", build, meta, images=batch, facts=facts)


def _right_forms(
    prefix: str, model: nn.Module, images: Tensor, mode: str | None, calls: dict[str, Call]
) -> dict[str, Call]:
    """``calls`` and a float32 model in bf16, eager or compiled: all that are right on the first images."""
    few = images[:8]
    truth = model.double()(few.double())
    model = model.to(torch.bfloat16)
    eager = partial(model, images)
    calls = {**calls, prefix + "eager": eager}
    if mode is not None:
        calls |= compiled(prefix + mode, model, mode, images)
    right = checked({name: _first(call, len(few)) for name, call in calls.items()}, eager()[: len(few)], truth)
    return {name: calls[name] for name in right}


def _first(call: Call, images: int) -> Call:
    return lambda: call()[:images]
