"""The window attention block in three launches, as rep_attention.py; the map is never rolled, padded or partitioned."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .attention import window_attention
from .int8 import int8_project
from .linear import linear


def window_rep_attention(
    x: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    rel_bias: Tensor,
    pad_kv: Tensor | None = None,
    *,
    num_heads: int,
    scale: float,
    window: Sequence[int],
    shift: Sequence[int],
    norm_eps: float | None = None,
    residual: bool = False,
    roll_first: bool = False,
    norm: str = "layer",
    quantize: str = "none",
) -> Tensor:
    """Launcher of :func:`repavit_ops.ops.window_rep_attention`, same arguments."""
    d_qk = (w_qkv.shape[0] - w_proj.shape[1]) // (2 * num_heads)
    if pad_kv is None and b_qkv is not None:  # a padded token is 0 after the norm: its k and v are the bias
        pad_kv = b_qkv[num_heads * d_qk :]
    project = int8_project if quantize == "int8" else linear
    qkv = project(x, w_qkv, b_qkv, norm_eps=norm_eps, norm=norm)
    attended = window_attention(qkv, rel_bias, pad_kv, num_heads, d_qk, scale, window, shift, roll_first)
    return project(attended, w_proj, b_proj, residual=x if residual else None)
