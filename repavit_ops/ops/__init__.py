"""Typed functional API: each function checks its arguments, then calls the registered operator."""

from .. import library as _library  # registers the operators  # noqa: F401
from .fused_blocks import fused_blocks
from .gated_ffn import gated_ffn
from .partial_gelu_ffn import partial_gelu_ffn
from .patch_projection import patch_projection
from .rep_attention import rep_attention
from .window_rep_attention import window_rep_attention

__all__ = [
    "fused_blocks",
    "gated_ffn",
    "partial_gelu_ffn",
    "patch_projection",
    "rep_attention",
    "window_rep_attention",
]
