"""The attention block in three launches: q k v, attention, projection with the shortcut (linear.py, attention.py).

QK-norm and rotary embedding are a fourth (query_key_rows.py); a norm in front of the projection is that of any product.
"""

from __future__ import annotations

from torch import Tensor

from .attention import attention
from .int8 import int8_project
from .linear import linear
from .query_key_rows import query_key_rows


def rep_attention(
    x: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    attn_bias: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    *,
    num_heads: int,
    scale: float,
    d_qk: int,
    norm_eps: float | None = None,
    residual: bool = False,
    norm: str = "layer",
    qk_norm_eps: float | None = None,
    qk_norm: str = "layer",
    rotary_layout: str = "half",
    inner_norm_eps: float | None = None,
    quantize: str = "none",
) -> Tensor:
    """Launcher of :func:`repavit_ops.ops.rep_attention`, same arguments."""
    project = int8_project if quantize == "int8" else linear
    qkv = project(x, w_qkv, b_qkv, norm_eps=norm_eps, norm=norm)
    if qk_norm_eps is not None or rotary_cos is not None:
        qkv = query_key_rows(
            qkv,
            q_norm,
            k_norm,
            rotary_cos,
            rotary_sin,
            num_heads=num_heads,
            d_qk=d_qk,
            eps=qk_norm_eps,
            norm=qk_norm,
            layout=rotary_layout,
        )
    attended = attention(qkv, attn_bias, num_heads, d_qk, scale)
    return project(attended, w_proj, b_proj, norm_eps=inner_norm_eps, residual=x if residual else None)
