"""The short way to a CPU kernel: Python's checks and autograd would cost as much as a small kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends


def call(
    operator: Callable[..., Tensor],
    backend: str,
    norm_eps: float | None,
    tensors: tuple[Tensor | None, ...],
    **static: Any,
) -> Tensor | None:
    """The kernel's result; None where the long way must be taken: other devices, derivatives, compilation, autocast.

    The kernel checks its arguments itself, but for ``norm_eps``. What it refuses takes the long way too, whose checks
    say in Python's terms what is wrong.
    """
    if (
        backend not in ("auto", "cpp")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or backends.why_unavailable("cpp") is not None
        or torch.is_autocast_enabled("cpu")
        or backends.in_forward_mode()
        or backends.in_transform()
        or not (norm_eps is None or norm_eps >= 0)
    ):
        return None
    differentiates = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (not t.is_cpu or (differentiates and t.requires_grad)):
            return None
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*tensors, norm_eps=norm_eps, **static)
    except RuntimeError:
        return None
