"""The models that are timed on a GPU, in every form that stands beside ours, and what they launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import repavit_ops

BF16 = torch.bfloat16
# model without its prefix → θ of the paper's speed-up over vanilla
MODELS = {
    **{"deit_tiny": 0.5, "deit_small": 0.5, "deit_base": 0.75, "swin_tiny": 0.75},
    **{"vit_large": 0.75, "vit_huge": 0.75, "swin_small": 0.75, "swin_base": 0.75},
}
HEADLINE = ("deit_small", "deit_base", "swin_tiny")
HEADLINE_BATCHES = (128, 1)
FORMS = ("fused", "merged", "vanilla_fused", "vanilla")
MODES = {"compile": "default", "max_autotune": "max-autotune-no-cudagraphs"}  # of torch.compile; the graphs are ours
TINY: dict[str, Any] = {"depth": 1, "img_size": 32}  # options of a model that a CPU runs at once


def create(name: str, *, vanilla: bool = False, **options: Any) -> nn.Module:
    """The training form in evaluation mode, float32, on the default device; or its vanilla twin."""
    if vanilla:
        return repavit_ops.create_model(f"vanilla_{name}", **options).eval()
    return repavit_ops.create_model(f"repa_{name}", idle_ratio=MODELS[name], **options).eval()


def form_of(name: str, form: str, **options: Any) -> nn.Module:
    """A model in one of ``FORMS``, in bfloat16, on the default device."""
    model = create(name, vanilla=form.startswith("vanilla"), **options)
    if form.endswith("fused"):
        return repavit_ops.fuse(model, dtype=BF16)
    return (repavit_ops.reparameterize(model) if form == "merged" else model).to(BF16)


def on_meta(name: str, form: str, batch: int, **options: Any) -> tuple[nn.Module, torch.Tensor]:
    """A model without numbers, and images: to count or compile what it launches."""
    side = options.get("img_size", 224)
    model = form_of(name, form, **options).to("meta")
    return model, torch.empty(batch, 3, side, side, dtype=BF16, device="meta")
