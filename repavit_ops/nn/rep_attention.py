"""Deployed form of the reparameterized attention block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import Backend
from ..ops import _check
from ..stack_plan import Step
from .init import linear_init_
from .packed_weights import PackedWeights
from .symbolic import call_of, is_proxy


class RepAttention(PackedWeights):
    """Attention block in one call: ``proj(o) [+ x]``, ``o = softmax(scale · q kᵀ + attn_bias) v``.

    q, k, v come from z W_qkvᵀ + b_qkv, where z is x or its LayerNorm or RMSNorm core when ``norm_eps`` is given. o of
    all heads is replaced by its own LayerNorm core when ``inner_norm_eps`` is given (EVA02's CLIP towers). The folds of
    :mod:`repavit_ops.reparam.attention` leave nothing else: no norm affine, no scale, no LayerScale.

    Shapes:
        x          [B, T, dim]                     fp32 | bf16 | fp16 | fp64
        w_qkv      [h·d_qk + h·d_qk + h·d_v, dim]  rows q | k | v;  b_qkv of that length or None
        w_proj     [dim_out, h·d_v];               b_proj [dim_out] or None
        q_norm, k_norm  [2, d_qk] or None          weight and bias of QK-norm
        attn_bias  broadcastable to [B, h, T, T]   float, added before softmax
        rotary     (cos, sin) or None              each broadcastable to [B, h, tokens, width]
        returns    [B, T, dim_out]

    Args:
        dim: C, channels of a token.
        num_heads: h.
        d_qk, d_v: widths of a query/key head and of a value head; default dim / num_heads.
        dim_out: channels of the result; default dim.
        bias: whether b_qkv and b_proj exist.
        scale: factor of q kᵀ; default 1/√d_qk, 1.0 when it is folded into W_q.
        norm_eps: variance offset of the LayerNorm core in front; None for no norm.
        residual: add x.
        norm: "layer" or "rms" (RMSNorm): the core that ``norm_eps`` asks for.
        qk_norm_eps: variance offset of QK-norm, a norm of each head's q and k; None for none.
        qk_norm: "layer" or "rms".
        rotary_layout: which channels the rotary embedding pairs: "half" or "interleaved".
        inner_norm_eps: eps of the LayerNorm core of all heads' values, in front of the projection; None for no norm.
        quantize: "int8": the packed copy, z and o in whole numbers; the plain weights stay what they are.
        backend: "auto", "reference", "cpp" or "triton".

    Raises:
        ValueError: dim is not divisible by num_heads and no head width is given; at a call, as the operator does.
    """

    operator = "rep_attention"
    # of older pickles
    norm, qk_norm_eps, qk_norm, rotary_layout, inner_norm_eps, quantize = "layer", None, "layer", "half", None, "none"
    packed_names = ("w_qkv", "w_proj")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        d_qk: int | None = None,
        d_v: int | None = None,
        dim_out: int | None = None,
        bias: bool = True,
        scale: float | None = None,
        norm_eps: float | None = None,
        residual: bool = False,
        norm: str = "layer",
        qk_norm_eps: float | None = None,
        qk_norm: str = "layer",
        rotary_layout: str = "half",
        inner_norm_eps: float | None = None,
        quantize: str = "none",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (d_qk is None or d_v is None) and (num_heads < 1 or dim % num_heads):
            raise ValueError(f"num_heads: got {num_heads} for dim {dim}, wanted a divisor of dim (or give d_qk, d_v)")
        self.dim, self.num_heads = dim, num_heads
        self.d_qk = dim // num_heads if d_qk is None else d_qk
        self.d_v = dim // num_heads if d_v is None else d_v
        self.scale = self.d_qk**-0.5 if scale is None else scale
        self.norm_eps, self.residual, self.norm = norm_eps, residual, norm
        self.qk_norm_eps, self.qk_norm, self.rotary_layout = qk_norm_eps, qk_norm, rotary_layout
        _check.norm(inner_norm_eps, name="inner_norm")
        self.inner_norm_eps = inner_norm_eps
        _check.form_of_quantize(quantize)
        self.quantize = quantize
        self.backend = backend
        dim_out = dim if dim_out is None else dim_out
        width = num_heads * (2 * self.d_qk + self.d_v)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.w_qkv = parameter(width, dim)
        self.b_qkv = parameter(width) if bias else None
        self.w_proj = parameter(dim_out, num_heads * self.d_v)
        self.b_proj = parameter(dim_out) if bias else None
        self.q_norm = None if qk_norm_eps is None else parameter(2, self.d_qk)
        self.k_norm = None if qk_norm_eps is None else parameter(2, self.d_qk)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` and its norms do."""
        linear_init_(self.w_qkv, self.b_qkv)
        linear_init_(self.w_proj, self.b_proj)
        for affine in (self.q_norm, self.k_norm):
            if affine is not None:
                with torch.no_grad():
                    affine.copy_(torch.tensor([[1.0], [0.0]]).expand_as(affine))

    def pack(self, *weights: Tensor | None) -> Tensor:
        return torch.ops.repavit_ops.rep_attention_pack(
            *weights, num_heads=self.num_heads, d_qk=self.d_qk, quantize=self.quantize
        )

    def no_rows(self) -> tuple[int, ...]:
        return 0, 1, self.dim

    def forward(
        self, x: Tensor, attn_bias: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        if is_proxy(x):
            return call_of(self, x, attn_bias, rotary)
        cos, sin = (None, None) if rotary is None else rotary
        packed, (w_qkv, w_proj) = self.current()
        self.check_trainable(x)
        return ops.rep_attention(
            x,
            w_qkv,
            self.b_qkv,
            w_proj,
            self.b_proj,
            attn_bias=attn_bias,
            rotary_cos=cos,
            rotary_sin=sin,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            **self._static(),
            packed=packed,
            backend=self.backend_for(x),
        )

    def step(self, size: Sequence[int] = ()) -> Step:
        """This module's call with x alone as a step of :func:`repavit_ops.ops.fused_blocks`."""
        packed, (w_qkv, w_proj) = self.current()
        tensors = (w_qkv, self.b_qkv, w_proj, self.b_proj, None, None, None, self.q_norm, self.k_norm)
        return Step(self.operator, tensors, self._static(), packed, self._pytorch_at(*size, self.dim))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in ("q_norm", "k_norm"):  # older pickles know none
            self._parameters.setdefault(name, None)

    def _static(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "scale": self.scale,
            "d_qk": self.d_qk,
            "norm_eps": self.norm_eps,
            "residual": self.residual,
            "norm": self.norm,
            "qk_norm_eps": self.qk_norm_eps,
            "qk_norm": self.qk_norm,
            "rotary_layout": self.rotary_layout,
            "inner_norm_eps": self.inner_norm_eps,
            "quantize": self.quantize,
        }

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, d_qk={self.d_qk}, d_v={self.d_v}, scale={self.scale:.6g}, "
            f"norm_eps={self.norm_eps}, inner_norm_eps={self.inner_norm_eps}, residual={self.residual}, "
            f"quantize={self.quantize!r}, backend={self.backend!r}"
        )
