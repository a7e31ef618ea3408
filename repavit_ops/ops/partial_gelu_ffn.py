"""Functional form of the deployed channel-idle FFN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..backends import Backend
from . import _check, _direct


def partial_gelu_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    w_merged: Tensor | None,
    bias: Tensor | None,
    *,
    norm_eps: float | None = None,
    residual: bool = False,
    approximate: str = "none",
    norm: str = "layer",
    quantize: str = "none",
    packed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Deployed channel-idle FFN: ``gelu(z W_inᵀ + b_in) W_outᵀ + z W_mergedᵀ + bias`` (RePaViT, eq. 6).

    z is x, or its LayerNorm or RMSNorm core (no affine) when ``norm_eps`` is given.

    Shapes:
        x         [..., C]     fp32 | bf16 | fp16 | fp64; any strides, any batch dimensions
        w_in      [m, C]       active input projection; b_in [m] or None
        w_out     [C, m]       active output projection; m = 0 is a tensor of size 0
        w_merged  [C, C]       idle path (and shortcut, if folded); None adds nothing
        bias      [C] or None
        returns   [..., C]     dtype of x, accumulated in fp32 (fp64 for fp64); never an alias of x

    Args:
        residual: add x itself, in the fp32 epilogue (when the shortcut is not folded into w_merged).
        approximate: "none" (erf), "tanh", or "quick": ``x sigmoid(1.702 x)``, which OpenAI trained CLIP with. In every
            form +inf gives +inf and -inf gives NaN (-inf · 0), as the formula has it.
        norm: "layer": ``(x - mean) / sqrt(var + norm_eps)``, or "rms": ``x / sqrt(mean(x²) + norm_eps)``.
        quantize: "int8": weights as whole numbers per output channel, z and H per token and call, products in int32,
            all else in fp32 (:mod:`repavit_ops.reference_int8`). Not differentiable, not for fp64.
        packed: the weights packed by :meth:`PartialGELUFFN.repack` for the C++ backend; others ignore it.
        backend: "auto" takes the device's kernels; any other name is used or raises, never replaced.

    Raises:
        ValueError: a shape, dtype, device or option disagrees; names the argument, what came, what was wanted.
        RuntimeError: a forced backend is not available; says why.
    """
    weights = (w_in, b_in, w_out, w_merged, bias)
    operator = torch.ops.repavit_ops.partial_gelu_ffn
    static: dict[str, Any] = {"residual": residual, "approximate": approximate, "norm": norm, "quantize": quantize}
    if (y := _direct.call(operator, backend, norm_eps, (x, *weights, packed), **static)) is not None:
        return y
    if x.dim() < 1 or w_in.dim() != 2:
        raise ValueError(f"x, w_in: got shapes {list(x.shape)}, {list(w_in.shape)}, wanted [..., C] and [m, C]")
    m, c = w_in.shape
    if x.shape[-1] != c:
        raise ValueError(f"x: got {x.shape[-1]} channels (shape {list(x.shape)}), wanted {c} as w_in {[m, c]} has")
    _check.shape("w_out", w_out, c, m)
    if b_in is not None:
        _check.shape("b_in", b_in, m)
    if w_merged is not None:
        _check.shape("w_merged", w_merged, c, c)
    if bias is not None:
        _check.shape("bias", bias, c)
    _check.gelu_form(approximate)
    _check.norm(norm_eps, norm)
    _check.quantized(x, quantize, w_in, w_out, w_merged)
    _check.same_kind(x, w_in=w_in, b_in=b_in, w_out=w_out, w_merged=w_merged, bias=bias)
    _check.packed(x, packed)

    if backends.wants_formula(backend):
        return reference.form("partial_gelu_ffn", backend)(x, *weights, norm_eps=norm_eps, **static)
    backends.select(backend, x, "partial_gelu_ffn")
    return operator(x, *weights, packed, norm_eps=norm_eps, **static)
