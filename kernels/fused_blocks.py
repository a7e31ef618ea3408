"""A run of sub-blocks: their launchers one after the other, without the dispatcher between them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference, stack_plan
from . import launcher

WITHOUT_KERNEL = ("token_embedding", "pooled_head")  # of a whole model; the modules of one do not ask for them here


def fused_blocks(
    x: Tensor, weights: Sequence[Tensor | None], *, plan: Sequence[int], scalars: Sequence[float]
) -> Tensor:
    """Launcher of :func:`repavit_ops.ops.fused_blocks`, with its steps as stack_plan.py encodes them."""
    for step in stack_plan.decode(weights, plan, scalars):
        if step.operator in WITHOUT_KERNEL:
            x = reference.run_step(step, x)
        else:
            x = launcher(step.operator)(x, *step.tensors, **step.static)
    return x
