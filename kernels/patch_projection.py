"""Patches projected by one product (linear.py), in front of which they are gathered into rows by PyTorch's own copy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from .linear import linear


def patch_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    patch: Sequence[int],
    channels_last: bool,
    norm_eps: float | None = None,
) -> Tensor:
    """Launcher of :func:`repavit_ops.ops.patch_projection`, same arguments."""
    return linear(reference.patches(x, patch, channels_last), weight, bias, norm_eps=norm_eps)
