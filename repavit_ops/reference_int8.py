"""The definition of products in int8: what ``quantize="int8"`` means, in plain PyTorch.

Sums of whole numbers are exact, so they are the same on every machine; so are the scales, which come from one row's
own numbers: a token's result does not depend on those beside it.

    weights      w[n] ≈ s_n q,  q from -127 to 127,  s_n = max |w[n]| / 127                  per output channel
    tokens       x[t] ≈ s_t (q - 128),  q from 1 to 255,  s_t = max |x[t]| / 127             per token and call
    activations  h[t] ≈ s_t q + LOWEST_GELU,  q from 0 to 255,  s_t = (max h[t] - LOWEST_GELU) / 255

Rounding is to nearest, ties to even. A row of zeros has scale 0; one that holds a NaN or an infinity has scale NaN, and
so has what comes of it. Everything else (norms, biases, activation, softmax, shortcut) is in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends

LOWEST_GELU = -0.171  # below every form of GELU: their minima are -0.16997 (erf), -0.17004 (tanh) and -0.16361 (quick)
ZERO = 128  # q of 0 in a token
TINY = 1e-30  # rows of no number above it count as zero
DEPTH = (2**31 - 1) // ((255 + 128) * 127)  # inputs of a weight, whose sums int32 holds (csrc/cpu/kernels.h)


class Rows(NamedTuple):
    """Rows of whole numbers and what they stand for: ``scale (q - zero) + lowest``.

    Shapes:
        q      [..., K]  whole numbers, in floats
        scale  [..., 1]
    """

    q: Tensor
    scale: Tensor
    zero: int = 0
    lowest: float = 0.0


def symmetric(x: Tensor, zero: int) -> Rows:
    """Rows [..., K] quantized about 0: weights with ``zero`` 0, tokens with :data:`ZERO`."""
    most = _most(x.abs(), 0.0)
    used = most >= TINY
    scale = torch.where(used, most / 127, torch.where(most < TINY, torch.zeros_like(most), math.nan))
    factor = torch.where(used & most.isfinite(), 127 / most, 0.0)
    return Rows(_whole(x * factor) + zero, torch.where(most.isfinite(), scale, math.nan), zero)


def from_lowest(h: Tensor, lowest: float) -> Rows:
    """Rows [..., K] quantized from a value on that none is below."""
    spread = _most(h, 0.0) - lowest
    finite = spread.isfinite()
    factor = torch.where(finite, 255 / spread, 0.0)
    return Rows(_whole((h - lowest) * factor), torch.where(finite, spread / 255, math.nan), 0, lowest)


def product(rows: Rows, w: Rows) -> Tensor:
    """``x Wᵀ`` of quantized rows [..., K] and weights [N, K], the sums exact: [..., N]."""
    wide = torch.float64  # holds every sum of fewer than 2**38 such products; integers have no product on a GPU
    sums = (rows.q.to(wide) - rows.zero) @ w.q.to(wide).mT
    columns = w.q.to(wide).sum(-1)
    kind = rows.scale.dtype
    return (sums.to(kind) * rows.scale + rows.lowest * columns.to(kind)) * w.scale.squeeze(-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias`` with both quantized, in float32 or wider."""
    refuse_derivatives(x, weight, bias)
    y = product(symmetric(x, ZERO), symmetric(widened(weight), 0))
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


def _most(x: Tensor, none: float) -> Tensor:
    """The greatest of each row [..., 1]; NaN where one is a NaN or an infinity, ``none`` of no columns."""
    if x.shape[-1] == 0:
        return x.new_full((*x.shape[:-1], 1), none)
    most = x.amax(-1, keepdim=True)
    return torch.where(x.isfinite().all(-1, keepdim=True), most, math.nan)


def _whole(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).round()
