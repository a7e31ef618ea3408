"""Packed models in tests: what a model answers first, and where its file keeps what."""

from __future__ import annotations

import pytest
import safetensors
import torch
from model_helpers import tiny_vit

import repavit_ops
from repavit_ops import backends

needs_kernels = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)


def fused_and_saved(path):
    """A small fused ViT and its file."""
    fused = repavit_ops.fuse(tiny_vit())
    repavit_ops.save_packed(fused, path)
    return fused, path


@torch.no_grad()
def first_output(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out[0]


def metadata_of(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()
