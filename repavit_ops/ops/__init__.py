"""Typed functional API: each function checks its arguments, then calls the registered operator."""

from .. import library as _library  # registers the operators  # noqa: F401
from .partial_gelu_ffn import partial_gelu_ffn
from .rep_attention import rep_attention
from .window_rep_attention import window_rep_attention

__all__ = ["partial_gelu_ffn", "rep_attention", "window_rep_attention"]
