"""Steps that this CPU's table leaves to PyTorch, between those that go through one operator call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import cpu_tuning, reference, stack_plan
from ..stack_plan import Step


class PyTorchRun:
    """Steps one after the other, each in PyTorch's own operators.

    Shapes:
        x, returns  as :func:`repavit_ops.ops.fused_blocks`
        rotary      (cos, sin) of this call for every rep_attention, as :class:`KeptPlan` takes it; or None
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        steps: Iterable[Step] = self.steps
        if rotary is not None:
            steps = stack_plan.decode(*stack_plan.turned(stack_plan.encode(steps), rotary))
        for step in steps:
            x = reference.form(step.operator, "pytorch")(x, *step.tensors, **step.static)
        return x


def runs(steps: Iterable[Step], x: Tensor) -> list[stack_plan.Plan | PyTorchRun]:
    """Steps on tensors like ``x`` in as few runs as their choices allow: plans of one call, and PyTorch's between."""
    found: list[tuple[bool, list[Step]]] = []
    for step in steps:
        # of a program, whose sizes may stay open, a step has all batches or none
        plain = bool(step.pytorch) if torch.compiler.is_compiling() else cpu_tuning.within(x.shape[0], step.pytorch)
        if not found or found[-1][0] != plain:
            found.append((plain, []))
        found[-1][1].append(step)
    return [PyTorchRun(run) if plain else stack_plan.encode(run) for plain, run in found]
