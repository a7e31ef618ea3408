"""Functional form of a run of fused sub-blocks, or a whole model, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, reference, stack_plan
from ..backends import Backend
from ..stack_plan import Step


def fused_blocks(x: Tensor, steps: Sequence[Step], *, backend: Backend = "auto") -> Tensor:
    """Sub-blocks one after the other: ``x = step(x)`` for each step, in one operator call.

    At batch ≥ threads each thread takes whole images through all sub-blocks, with nothing shared. The result is, bit
    for bit, that of the operators called one by one. In front of, between and behind the sub-blocks there may be steps
    that make a whole model: ``token_embedding``, ``patch_projection`` and ``pooled_head``
    (:mod:`repavit_ops.reference` defines them).

    Shapes:
        x, returns  [B, T, C]      fp32 | bf16 | fp16 | fp64; [B, H, W, C] where a step attends within windows; with
                                   the other steps what the first takes and the last gives

    Args:
        steps: at least one :class:`Step`: an operator's name, its tensors after x, its keyword arguments and its packed
            weights, as ``module.step(size)`` of the deployed modules gives them.
        backend: "auto" takes the device's kernels; any other name is used or raises, never replaced.

    Raises:
        ValueError: there is no step, or a step's operator is unknown.
        RuntimeError: a step does not fit x (the message names the argument); a forced backend is not available.
    """
    if not steps:
        raise ValueError("steps: got none, wanted at least one")
    for step in steps:
        if step.operator not in stack_plan.KINDS:
            raise ValueError(f"steps: got operator {step.operator!r}, wanted one of {', '.join(stack_plan.KINDS)}")
    weights, plan, scalars = stack_plan.encode(steps)
    if backend == "reference" or backends.exports_to_onnx():
        return reference.fused_blocks(x, weights, plan=plan, scalars=scalars)
    backends.select(backend, x, "fused_blocks")
    return torch.ops.repavit_ops.fused_blocks(x, weights, plan=plan, scalars=scalars)
