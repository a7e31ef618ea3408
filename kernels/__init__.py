"""Triton GPU kernels, installed as ``repavit_ops.kernels``. Importing this asks for neither a GPU nor triton.

device_math   pure functions of registers: GELU, SiLU
tile          pure functions of tiles: order, load, product, epilogue
sequences     where the tokens of an image or a window are, and how their rows are moved
linear, …     one kernel and its launcher each: no autograd, no nn
int8          products of bytes, and quantize_rows, which makes them: what quantize="int8" puts in the places of linear
chips, tuning what a GPU offers, and which tile is taken for which product on it
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from torch import Tensor

# Operator → "module:launcher"
OPERATORS: dict[str, str] = {
    "partial_gelu_ffn": "partial_gelu_ffn:partial_gelu_ffn",
    "gated_ffn": "gated_ffn:gated_ffn",
    "rep_attention": "rep_attention:rep_attention",
    "window_rep_attention": "window_rep_attention:window_rep_attention",
    "patch_projection": "patch_projection:patch_projection",
    "fused_blocks": "fused_blocks:fused_blocks",
}


@functools.cache
def launcher(operator: str) -> Callable[..., Tensor]:
    """The launcher of an operator, imported (and triton with it) at the first call."""
    module, function = OPERATORS[operator].split(":")
    return getattr(importlib.import_module(f".{module}", __name__), function)
