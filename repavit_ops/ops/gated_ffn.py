"""Functional form of the gated FFN: SwiGLU, GEGLU and their relatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..backends import Backend
from . import _check, _direct


def gated_ffn(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_out: Tensor,
    w_merged: Tensor | None,
    bias: Tensor | None,
    *,
    activation: str,
    norm_eps: float | None = None,
    inner_norm_eps: float | None = None,
    residual: bool = False,
    norm: str = "layer",
    quantize: str = "none",
    packed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Gated FFN: ``(act(z W_gateᵀ + b_gate) ∘ (z W_upᵀ + b_up)) W_outᵀ + z W_mergedᵀ + bias`` (Shazeer 2020, "GLU
    Variants Improve Transformer"; ∘ is elementwise).

    z is x, or its LayerNorm or RMSNorm core (no affine) when ``norm_eps`` is given. What stands in front of W_out is
    replaced by its own LayerNorm core when ``inner_norm_eps`` is given (EVA02).

    Shapes:
        x         [..., C]     fp32 | bf16 | fp16 | fp64; any strides, any batch dimensions
        w_gate    [m, C]       gate projection; b_gate [m] or None
        w_up      [m, C]       value projection; b_up [m] or None
        w_out     [C, m]       output projection; m = 0 is a tensor of size 0
        w_merged  [C, C]       channels that skip the gate, merged; None adds nothing
        bias      [C] or None
        returns   [..., C]     dtype of x, accumulated in fp32 (fp64 for fp64); never an alias of x

    Args:
        activation: "silu" (SwiGLU), "gelu" (GEGLU, erf), "gelu_tanh" or "gelu_quick" (``x sigmoid(1.702 x)``).
        residual: add x itself, in the fp32 epilogue.
        norm: "layer": ``(x - mean) / sqrt(var + norm_eps)``, or "rms": ``x / sqrt(mean(x²) + norm_eps)``.
        quantize: "int8": weights as whole numbers per output channel, z and H per token and call, products in int32,
            all else in fp32 (:mod:`repavit_ops.reference_int8`). Not differentiable, not for fp64.
        packed: the weights packed by :meth:`GatedFFN.repack` for the C++ backend; others ignore it.
        backend: "auto" takes the device's kernels; any other name is used or raises, never replaced.

    Raises:
        ValueError: a shape, dtype, device or option disagrees; names the argument, what came, what was wanted.
        RuntimeError: a forced backend is not available; says why.
    """
    weights = (w_gate, b_gate, w_up, b_up, w_out, w_merged, bias)
    operator = torch.ops.repavit_ops.gated_ffn
    static: dict[str, Any] = {
        "activation": activation,
        "inner_norm_eps": inner_norm_eps,
        "residual": residual,
        "norm": norm,
        "quantize": quantize,
    }
    if (y := _direct.call(operator, backend, norm_eps, (x, *weights, packed), **static)) is not None:
        return y
    if x.dim() < 1 or w_gate.dim() != 2:
        raise ValueError(f"x, w_gate: got shapes {list(x.shape)}, {list(w_gate.shape)}, wanted [..., C] and [m, C]")
    m, c = w_gate.shape
    if x.shape[-1] != c:
        raise ValueError(f"x: got {x.shape[-1]} channels (shape {list(x.shape)}), wanted {c} as w_gate {[m, c]} has")
    _check.shape("w_up", w_up, m, c)
    _check.shape("w_out", w_out, c, m)
    for name, bias_of, size in (("b_gate", b_gate, m), ("b_up", b_up, m), ("bias", bias, c)):
        if bias_of is not None:
            _check.shape(name, bias_of, size)
    if w_merged is not None:
        _check.shape("w_merged", w_merged, c, c)
    _check.gate_form(activation)
    _check.norm(norm_eps, norm)
    _check.norm(inner_norm_eps, name="inner_norm")
    _check.quantized(x, quantize, w_gate, w_up, w_out, w_merged)
    _check.same_kind(x, w_gate=w_gate, b_gate=b_gate, w_up=w_up, b_up=b_up, w_out=w_out, w_merged=w_merged, bias=bias)
    _check.packed(x, packed)

    if backends.wants_formula(backend):
        return reference.form("gated_ffn", backend)(x, *weights, norm_eps=norm_eps, **static)
    backends.select(backend, x, "gated_ffn")
    return operator(x, *weights, packed, norm_eps=norm_eps, **static)
