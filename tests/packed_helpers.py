"""Packed models in tests: what a model answers first, and where its file keeps what."""

from __future__ import annotations

import safetensors
import torch


@torch.no_grad()
def first_output(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out[0]


def metadata_of(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()
