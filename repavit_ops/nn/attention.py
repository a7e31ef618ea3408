"""Attention of the training forms: plain PyTorch, global and windowed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..reference import attention_core, window_attention_core
from .branch import ResidualBranch
from .window_rep_attention import effective_shift


class Attention(ResidualBranch):
    """Multi-head attention with its norm and shortcut: ``x + proj(softmax(scale · q kᵀ + attn_bias) v)``.

    Shapes:
        x, returns   [B, T, dim]
        qkv.weight   [h·d_qk + h·d_qk + h·d_v, dim]   rows q | k | v, head-major in each
        proj.weight  [dim, h·d_v]
        attn_bias    broadcastable to [B, h, T, T], or None

    Args:
        dim: C.
        num_heads: h.
        d_qk, d_v: head widths; default dim / num_heads.
        scale: factor of q kᵀ; default 1/√d_qk.
        qkv_bias: whether qkv has a bias.
        norm: builds the norm in front from dim (nn.LayerNorm, TokenBatchNorm, RepBN …); None for no norm.
        residual, skip_lam, layer_scale, drop_path: as :class:`ResidualBranch`.

    Raises:
        ValueError: dim is not divisible by num_heads and no head width is given.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        d_qk: int | None = None,
        d_v: int | None = None,
        scale: float | None = None,
        qkv_bias: bool = True,
        norm: Callable[[int], nn.Module] | None = nn.LayerNorm,
        residual: bool = True,
        skip_lam: float = 1.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, residual=residual, skip_lam=skip_lam, layer_scale=layer_scale, drop_path=drop_path)
        if (d_qk is None or d_v is None) and (num_heads < 1 or dim % num_heads):
            raise ValueError(f"num_heads: got {num_heads} for dim {dim}, wanted a divisor of dim (or give d_qk, d_v)")
        self.dim, self.num_heads = dim, num_heads
        self.d_qk = dim // num_heads if d_qk is None else d_qk
        self.d_v = dim // num_heads if d_v is None else d_v
        self.scale = self.d_qk**-0.5 if scale is None else scale
        self.norm = norm(dim) if norm is not None else nn.Identity()
        self.qkv = nn.Linear(dim, num_heads * (2 * self.d_qk + self.d_v), bias=qkv_bias)
        self.proj = nn.Linear(num_heads * self.d_v, dim)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        o = attention_core(self.qkv(self.norm(x)), attn_bias, self.num_heads, self.d_qk, self.scale)
        return self.close(x, self.proj(o))


class WindowAttention(nn.Module):
    """Attention in (shifted) windows: ``proj(softmax(scale · q kᵀ + B + mask) v)``; norm and shortcut outside (Swin).

    Shapes:
        x, returns                    [B, H, W, dim]
        relative_position_bias_table  [(2·window - 1)², h]

    Args:
        dim: C. num_heads: h. window, shift: tokens. qkv_bias: whether qkv has a bias.

    Raises:
        ValueError: dim is not divisible by num_heads.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: int, shift: int = 0, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads} for dim {dim}, wanted a divisor of dim")
        self.dim, self.num_heads, self.d_qk = dim, num_heads, dim // num_heads
        self.window, self.shift = (window, window), (shift, shift)
        self.scale = self.d_qk**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)

    def rel_bias(self) -> Tensor:
        """The table gathered into [h, window², window²]."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        shift = effective_shift((x.shape[1], x.shape[2]), self.window, self.shift)
        o = window_attention_core(
            self.qkv(x),
            self.rel_bias(),
            self.qkv.bias,
            self.num_heads,
            self.d_qk,
            self.scale,
            self.window,
            shift,
            roll_first=False,
        )
        return self.proj(o)


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window: int64 [window², window²]."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1
