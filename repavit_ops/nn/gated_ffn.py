"""Deployed form of the gated FFN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import Backend
from ..ops import _check
from ..reparam import MergedGatedFFN, cast
from ..stack_plan import Step
from .init import linear_init_
from .packed_weights import PackedWeights
from .symbolic import call_of, is_proxy


class GatedFFN(PackedWeights):
    """Gated FFN: ``(act(z W_gateᵀ + b_gate) ∘ (z W_upᵀ + b_up)) W_outᵀ + z W_mergedᵀ + bias`` (SwiGLU, GEGLU).

    z is x, or its LayerNorm or RMSNorm core when ``norm_eps`` is given. What stands in front of W_out is replaced by
    its LayerNorm core when ``inner_norm_eps`` is given (EVA02). :func:`repavit_ops.reparam.merge_gated_ffn` makes its
    weights. Source: Shazeer 2020, "GLU Variants Improve Transformer".

    Shapes:
        x         [..., dim]   fp32 | bf16 | fp16 | fp64
        w_gate    [act_channels, dim];  b_gate [act_channels] or None
        w_up      [act_channels, dim];  b_up [act_channels] or None
        w_out     [dim, act_channels]
        w_merged  [dim, dim] or None;   bias [dim] or None
        returns   [..., dim]

    Args:
        dim: C, channels of a token.
        act_channels: m, hidden channels that have a gate.
        bias: whether b_gate, b_up and bias exist.
        merged: whether w_merged, the path of channels without a gate, exists.
        activation: "silu", "gelu" (erf), "gelu_tanh" or "gelu_quick" (``x sigmoid(1.702 x)``).
        norm_eps: eps of the norm's core in front; None for no norm.
        inner_norm_eps: eps of the LayerNorm core behind the gate; None for no norm.
        residual: add x.
        norm: "layer" or "rms" (RMSNorm): the core that ``norm_eps`` asks for.
        quantize: "int8": the packed copy, z and H in whole numbers; the plain weights stay what they are.
        backend: "auto", "reference", "cpp" or "triton".

    Raises:
        ValueError: dim or act_channels is negative, activation or norm is unknown; at a call, as the
            operator does.
    """

    operator = "gated_ffn"
    packed_names = ("w_gate", "w_up", "w_out", "w_merged")

    def __init__(
        self,
        dim: int,
        act_channels: int,
        bias: bool = True,
        merged: bool = False,
        *,
        activation: str = "silu",
        norm_eps: float | None = None,
        inner_norm_eps: float | None = None,
        residual: bool = False,
        norm: str = "layer",
        quantize: str = "none",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 0 or act_channels < 0:
            raise ValueError(f"dim, act_channels: got {dim}, {act_channels}, wanted numbers >= 0")
        _check.gate_form(activation)
        _check.norm(norm_eps, norm)
        _check.norm(inner_norm_eps, name="inner_norm")
        _check.form_of_quantize(quantize)
        self.dim, self.act_channels, self.activation = dim, act_channels, activation
        self.norm_eps, self.inner_norm_eps, self.residual, self.norm = norm_eps, inner_norm_eps, residual, norm
        self.quantize = quantize
        self.backend = backend

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.w_gate, self.w_up = parameter(act_channels, dim), parameter(act_channels, dim)
        self.b_gate = parameter(act_channels) if bias else None
        self.b_up = parameter(act_channels) if bias else None
        self.w_out = parameter(dim, act_channels)
        self.w_merged = parameter(dim, dim) if merged else None
        self.bias = parameter(dim) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` does."""
        linear_init_(self.w_gate, self.b_gate)
        linear_init_(self.w_up, self.b_up)
        linear_init_(self.w_out, self.bias)
        if self.w_merged is not None:
            linear_init_(self.w_merged, None)

    @classmethod
    def from_merged(
        cls,
        merged: MergedGatedFFN,
        *,
        dtype: torch.dtype,
        activation: str,
        norm_eps: float | None = None,
        inner_norm_eps: float | None = None,
        norm: str = "layer",
        backend: Backend = "reference",
    ) -> GatedFFN:
        """Module that holds the float64 result of a merge, rounded once to ``dtype`` (see :mod:`repavit_ops.reparam`).

        Raises:
            ValueError: a value is not finite in ``dtype``; names the parameter and what to check.
        """
        module = cls(
            merged.bias.shape[0],
            merged.w_gate.shape[0],
            merged=merged.w_merged is not None,
            activation=activation,
            norm_eps=norm_eps,
            inner_norm_eps=inner_norm_eps,
            residual=merged.residual,
            norm=norm,
            backend=backend,
            device="meta",
        )
        for name in ("w_gate", "b_gate", "w_up", "b_up", "w_out", "w_merged", "bias"):
            value = cast(getattr(merged, name), dtype, name)
            setattr(module, name, None if value is None else nn.Parameter(value))
        return module

    def pack(self, *weights: Tensor | None) -> Tensor:
        return torch.ops.repavit_ops.gated_ffn_pack(*weights, quantize=self.quantize)

    def no_rows(self) -> tuple[int, ...]:
        return 0, self.dim

    def forward(self, x: Tensor) -> Tensor:
        if is_proxy(x):
            return call_of(self, x)
        packed, weights = self.current()
        self.check_trainable(x)
        return ops.gated_ffn(x, *self._operands(*weights), **self._static(), packed=packed, backend=self.backend_for(x))

    def step(self, size: Sequence[int] = ()) -> Step:
        """This module's call as a step of :func:`repavit_ops.ops.fused_blocks`."""
        packed, weights = self.current()
        batches = self._pytorch_at(*size, self.dim)
        return Step(self.operator, self._operands(*weights), self._static(), packed, batches)

    def _operands(self, w_gate: Tensor, w_up: Tensor, w_out: Tensor, w_merged: Tensor | None) -> tuple[Any, ...]:
        return w_gate, self.b_gate, w_up, self.b_up, w_out, w_merged, self.bias

    def _static(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "norm_eps": self.norm_eps,
            "inner_norm_eps": self.inner_norm_eps,
            "residual": self.residual,
            "norm": self.norm,
            "quantize": self.quantize,
        }

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, act_channels={self.act_channels}, bias={self.bias is not None}, "
            f"merged={self.w_merged is not None}, activation={self.activation!r}, norm_eps={self.norm_eps}, "
            f"inner_norm_eps={self.inner_norm_eps}, residual={self.residual}, norm={self.norm!r}, "
            f"quantize={self.quantize!r}, backend={self.backend!r}"
        )
