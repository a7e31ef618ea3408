"""The one tolerance rule and the seeded inputs that every operator test shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ABSOLUTE = 1e-6


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Fresh seeded float64 numbers ~ N(0, scale²)."""
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def weight(out: int, fan_in: int, seed: int) -> Tensor:
    """Weight ~ 1 / √fan_in, so that outputs are of order one."""
    return randn(out, fan_in, seed=seed, scale=max(fan_in, 1) ** -0.5)


def cast(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def assert_follows_rule(ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    """``max|ours - fp64| <= 2 max|eager same dtype - fp64| + 1e-6``, shape and dtype as eager gives them."""
    assert ours.shape == truth.shape
    assert ours.dtype == eager.dtype
    assert ours.is_contiguous()
    if not truth.numel():
        return
    error, eagers = (ours.double() - truth).abs().max().item(), (eager.double() - truth).abs().max().item()
    assert error <= 2 * eagers + ABSOLUTE, f"max error {error:.3e}, eager's {eagers:.3e}"


def check_operator(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: tuple[Tensor | None, ...],
    dtype: torch.dtype,
    **static: Any,
) -> Tensor:
    """Run op and reference on float64 ``tensors`` rounded to dtype; assert the rule; return what op gave."""
    rounded = cast(tensors, dtype)
    ours = op(*rounded, **static)
    eager = reference(*rounded, **static)
    truth = reference(*cast(rounded, torch.float64), **static)
    assert_follows_rule(ours, eager, truth)
    return ours
