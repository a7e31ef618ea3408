"""Deployed form of the reparameterized window attention block (Swin)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import Backend
from ..cpu_tuning import Operation
from ..stack_plan import Step
from .rep_attention import RepAttention
from .symbolic import call_of, is_proxy


class WindowRepAttention(RepAttention):
    """Window attention block in one call: ``proj(softmax(scale · q kᵀ + rel_bias + mask) v) [+ x]`` per window.

    Everything of :class:`RepAttention`, over windows of a map that may be shifted and need not be divisible.

    Shapes:
        x         [B, H, W, dim]        fp32 | bf16 | fp16 | fp64
        rel_bias  [h, wh·ww, wh·ww]     already gathered from the source model's table
        pad_kv    [h·d_qk + h·d_v]      K | V of a padded token (padding=True), else None
        returns   [B, H, W, dim_out]

    Args:
        window, shift: tokens, one number or (height, width). A map no larger than the window in some direction is not
            shifted at all (Swin's rule), unless one of the next two says otherwise.
        static_shift: shift maps of every size (timm settles the shift when it builds the block).
        shift_by_axis: do not shift in the direction that the window covers, but in the other one (torchvision).
        padding: whether pad_kv exists: needed once a norm's affine is folded into w_qkv.
        roll_first: roll before padding, as timm does.
        others: as :class:`RepAttention`.

    Raises:
        ValueError: as :class:`RepAttention`; at a call, as the operator does.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int | tuple[int, int],
        shift: int | tuple[int, int] = 0,
        *,
        d_qk: int | None = None,
        d_v: int | None = None,
        dim_out: int | None = None,
        bias: bool = True,
        scale: float | None = None,
        norm_eps: float | None = None,
        residual: bool = False,
        norm: str = "layer",
        padding: bool = False,
        roll_first: bool = False,
        static_shift: bool = False,
        shift_by_axis: bool = False,
        quantize: str = "none",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            d_qk=d_qk,
            d_v=d_v,
            dim_out=dim_out,
            bias=bias,
            scale=scale,
            norm_eps=norm_eps,
            residual=residual,
            norm=norm,
            quantize=quantize,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.window: tuple[int, int] = (window, window) if isinstance(window, int) else (window[0], window[1])
        self.shift: tuple[int, int] = (shift, shift) if isinstance(shift, int) else (shift[0], shift[1])
        self.roll_first, self.static_shift, self.shift_by_axis = roll_first, static_shift, shift_by_axis
        tokens = self.window[0] * self.window[1]
        self.rel_bias = nn.Parameter(torch.zeros(num_heads, tokens, tokens, device=device, dtype=dtype))
        pad_width = num_heads * (self.d_qk + self.d_v)
        self.pad_kv = nn.Parameter(torch.zeros(pad_width, device=device, dtype=dtype)) if padding else None

    def no_rows(self) -> tuple[int, ...]:
        return 0, *self.window, self.dim

    def forward(self, x: Tensor, static_shift: bool | None = None) -> Tensor:  # type: ignore[override]
        """``static_shift`` given: for this call in place of the module's own."""
        if is_proxy(x):
            return call_of(self, x, static_shift)
        packed, (w_qkv, w_proj) = self.current()
        self.check_trainable(x)
        return ops.window_rep_attention(
            x,
            w_qkv,
            self.b_qkv,
            w_proj,
            self.b_proj,
            rel_bias=self.rel_bias,
            pad_kv=self.pad_kv,
            **self._window_static(x.shape[1:3], static_shift),
            packed=packed,
            backend=self.backend_for(x),
        )

    def step(self, size: Sequence[int] = ()) -> Step:
        """This module's call on maps of ``size`` (H, W) as a step of :func:`repavit_ops.ops.fused_blocks`."""
        packed, (w_qkv, w_proj) = self.current()
        weights = (w_qkv, self.b_qkv, w_proj, self.b_proj, self.rel_bias, self.pad_kv)
        batches = self._pytorch_at(*size, self.dim)
        return Step("window_rep_attention", weights, self._window_static(size), packed, batches)

    def operation(self) -> Operation:
        return replace(super().operation(), operator="window_rep_attention")  # ``operator`` names its pack function

    def _static(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "scale": self.scale,
            "window": self.window,
            "shift": self.shift,
            "norm_eps": self.norm_eps,
            "residual": self.residual,
            "norm": self.norm,
            "roll_first": self.roll_first,
            "quantize": self.quantize,
        }

    def _window_static(self, size: Sequence[int], static_shift: bool | None = None) -> dict[str, Any]:
        static = self.static_shift if static_shift is None else static_shift
        shift = self.shift if static else effective_shift(size, self.window, self.shift, self._by_axis())
        return {**self._static(), "shift": shift}

    def _by_axis(self) -> bool:
        return self.__dict__.get("shift_by_axis", False)  # pickles of older versions lack it

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, shift={self.shift}, roll_first={self.roll_first}"


def effective_shift(
    size: Sequence[int], window: tuple[int, int], shift: tuple[int, int], by_axis: bool = False
) -> tuple[int, int]:
    """The shift that a map of this size gets: none once the window covers it in some direction (Swin's rule).

    ``by_axis``: none in that direction alone.
    """
    if by_axis:
        height, width = (s if side > edge else 0 for s, side, edge in zip(shift, size, window, strict=True))
        return height, width
    return (0, 0) if min(size) <= min(window) else shift
