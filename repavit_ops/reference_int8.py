"""The definition of products in int8: what ``quantize="int8"`` means, in plain PyTorch.

Sums of whole numbers are exact, so they are the same on every machine; so are the scales, which come from one row's
own numbers: a token's result does not depend on those beside it.

    weights  w[n] ≈ s_n q,        q from -127 to 127,  s_n = max |w[n]| / 127                      per output channel
    rows     x[t] ≈ s_t q + o_t,  q from 0 to 255,     s_t = (max x[t] - o_t) / 255, o_t = min x[t]         per token

Rows are what meets the weights: tokens behind their norm, activations, what attention returns. Rounding is to nearest,
ties to even. A row of one number has scale 0; one that holds a NaN or an infinity has scale NaN, and so has what comes
of it. Everything else (norms, biases, activation, softmax, shortcut) is in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends

LEAST_COSINE = 0.99  # of a quantized model's outputs and blocks with the truth, unless the caller says otherwise
TINY = 1e-30  # a row whose numbers span less is one number; weights of no greater magnitude are zero
DEPTH = (2**31 - 1) // (255 * 127)  # inputs of a weight, whose sums int32 holds (csrc/cpu/kernels.h)


class Quantized(NamedTuple):
    """Rows of whole numbers and what they stand for: ``scale · q + offset``.

    Shapes:
        q              [..., K]  whole numbers, in floats
        scale, offset  [..., 1]
    """

    q: Tensor
    scale: Tensor
    offset: Tensor


def weights(w: Tensor) -> Quantized:
    """Weights [N, K] about 0, each row with a scale of its own."""
    most = _extreme(w.abs(), torch.amax)
    used = most >= TINY
    factor = torch.where(used, _over(127, most), 0.0)
    scale = torch.where(used, most / 127, most * 0)  # NaN stays
    return Quantized(_whole(w * factor), scale, torch.zeros_like(scale))


def rows(x: Tensor) -> Quantized:
    """Rows [..., K], each from its least number to its greatest."""
    least = _extreme(x, torch.amin)
    span = _extreme(x, torch.amax) - least
    used = span.isfinite() & (span >= TINY)
    factor = torch.where(used, _over(255, span), 0.0)
    scale = torch.where(used, span / 255, torch.where(span < TINY, 0.0, math.nan))
    return Quantized(_whole((x - least) * factor), scale, torch.where(scale.isnan(), 0.0, least))


def product(x: Quantized, w: Quantized) -> Tensor:
    """``x Wᵀ`` of quantized rows [..., K] and weights [N, K], the sums exact: [..., N]."""
    wide = torch.float64  # holds every sum of fewer than 2**38 such products; integers have no product on a GPU
    sums, columns = x.q.to(wide) @ w.q.to(wide).mT, w.q.to(wide).sum(-1)
    kind = x.scale.dtype
    return (sums.to(kind) * x.scale + x.offset * columns.to(kind)) * w.scale.squeeze(-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias`` with both quantized, in float32 or wider."""
    refuse_derivatives(x, weight, bias)
    y = product(rows(x), weights(widened(weight)))
    return y if bias is None else y + bias


def widened(t: Tensor) -> Tensor:
    """float32 where it has fewer bits: every step between products is in no less."""
    return t if t.dtype == torch.float64 else t.float()


def refuse_derivatives(*tensors: Tensor | None) -> None:
    """Raise RuntimeError where a derivative is wanted: of a rounded number it would be 0, which nobody means."""
    backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if backward or backends.in_forward_mode():
        raise RuntimeError(
            "quantize: products in int8 have no derivatives; train the model unquantized and fuse it then, or call it "
            "under torch.no_grad()"
        )


def _extreme(x: Tensor, of: Callable[..., Tensor]) -> Tensor:
    """The least or greatest of each row [..., 1]; NaN where one is a NaN or an infinity, 0 of no columns."""
    if x.shape[-1] == 0:
        return x.new_zeros((*x.shape[:-1], 1))
    return torch.where(x.isfinite().all(-1, keepdim=True), of(x, -1, keepdim=True), math.nan)


def _over(steps: int, x: Tensor) -> Tensor:
    """steps / x, rounded once: of a number and a tensor PyTorch takes the reciprocal, and multiplies."""
    return torch.full_like(x, steps) / x


def _whole(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).round()
