"""The way into float64 and the way out: tensors enter the algebra through `as_float64` and leave it through `cast`."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


def as_float64(x: Tensor | None, name: str, /, **shape: int | None) -> Tensor:
    """Return ``x`` in float64 after checking it against named sizes: ``as_float64(w, "w1", hidden=None, C=24)``.

    Args:
        x: a tensor of any floating dtype.
        name: what the caller calls it; every error starts with it.
        shape: wanted sizes in order, None where any size will do.

    Raises:
        ValueError: x is not a floating point tensor of that shape.
    """
    wanted = "[" + ", ".join(dim if size is None else f"{dim}={size}" for dim, size in shape.items()) + "]"
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, wanted a tensor of shape {wanted}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: got dtype {x.dtype}, wanted a floating point tensor of shape {wanted}")
    sizes = tuple(shape.values())
    if x.dim() != len(sizes) or any(w not in (None, got) for got, w in zip(x.shape, sizes, strict=True)):
        raise ValueError(f"{name}: got shape {list(x.shape)}, wanted {wanted}")
    return x.to(torch.float64)


def bias_as_float64(b: Tensor | None, name: str, w: Tensor) -> Tensor:
    """Return the bias of ``w`` [out, in] in float64; None, a Linear without bias, gives zeros [out]."""
    if b is None:
        return torch.zeros(w.shape[0], dtype=torch.float64, device=w.device)
    return as_float64(b, name, out=w.shape[0])


def scale_as_float64(scale: Tensor | float, name: str, w: Tensor) -> Tensor:
    """Return a scale of the rows of ``w`` [out, in] as float64 [out], from a number, a one-element tensor or [out]."""
    if not isinstance(scale, Tensor):
        scale = torch.tensor(float(scale), dtype=torch.float64, device=w.device)
    if scale.numel() == 1:
        scale = scale.reshape(1).expand(w.shape[0])
    return as_float64(scale, name, out=w.shape[0])


def plus_identity(w: Tensor, sign: int = 1) -> Tensor:
    """Return ``w ± I`` for a square float64 ``w``."""
    return w + sign * torch.eye(w.shape[0], dtype=w.dtype, device=w.device)


@overload
def cast(x: Tensor, dtype: torch.dtype, name: str) -> Tensor: ...
@overload
def cast(x: None, dtype: torch.dtype, name: str) -> None: ...
def cast(x: Tensor | None, dtype: torch.dtype, name: str) -> Tensor | None:
    """Round a result of this package to ``dtype``: the one rounding that merged weights ever see. None stays None.

    The tensor returned is contiguous and owns its storage, so a slice saved to disk is no larger than it looks
    and editing a merged weight never edits the weight it came from.

    Raises:
        ValueError: dtype is no floating dtype, or the result is not finite; the message names ``name`` and says
            whether the folded value itself was bad (running_var, weights) or ``dtype`` overflowed (fp16).
    """
    if not dtype.is_floating_point:
        raise ValueError(f"{name}: got dtype {dtype}, wanted a floating point dtype to cast to")
    if x is None:
        return None
    rounded = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not rounded.is_meta and not bool(torch.isfinite(rounded).all()):
        raise ValueError(_not_finite(x, rounded, name))
    return rounded


def _not_finite(x: Tensor, rounded: Tensor, name: str) -> str:
    """Say what went wrong in `cast`: a value that was already bad in float64, or an overflow of the target dtype."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        return (
            f"{name}: got {bad} of {x.numel()} values not finite before the cast, wanted finite weights; check "
            "running_var, running_mean and the stored weights for NaN or inf (a BatchNorm that overflowed in fp16 "
            "or was never calibrated)"
        )
    limit = torch.finfo(rounded.dtype).max
    return (
        f"{name}: got |value| up to {float(x.abs().max()):.6g}, wanted at most {limit:.6g}, the largest "
        f"{rounded.dtype}: the fold overflowed; check running_var for tiny values (they make large scales), or "
        "cast to bfloat16 or float32"
    )
