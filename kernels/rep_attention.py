"""The attention block in three launches: q k v, attention, projection with the shortcut (linear.py, attention.py)."""

from __future__ import annotations

from torch import Tensor

from .attention import attention
from .linear import linear


def rep_attention(
    x: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    attn_bias: Tensor | None = None,
    *,
    num_heads: int,
    scale: float,
    d_qk: int,
    norm_eps: float | None = None,
    residual: bool = False,
) -> Tensor:
    """Launcher of :func:`repavit_ops.ops.rep_attention`, same arguments."""
    qkv = linear(x, w_qkv, b_qkv, norm_eps=norm_eps)
    attended = attention(qkv, attn_bias, num_heads, d_qk, scale)
    return linear(attended, w_proj, b_proj, residual=x if residual else None)
