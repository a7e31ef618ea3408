"""A run of steps that the C++ library reads once for many calls."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from .. import stack_plan


class KeptPlan:
    """``fused_blocks`` on one plan, whose hundreds of tensors stay on the C++ side as long as this object lives.

    To hand them over in every call costs 0.2 ms behind blocks that leave nothing in the caches. What is kept are the
    tensors, not what they held, so the result is that of ``fused_blocks`` at any time.

    Shapes:
        x, returns  as :func:`repavit_ops.ops.fused_blocks`; on the CPU alone, without derivatives
        rotary      (cos, sin) of this call for every rep_attention, broadcastable to [B, h, tokens, width]; or None
    """

    def __init__(self, plan: stack_plan.Plan) -> None:
        self._plan = plan
        self._number: int | None = None  # once it is kept

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():  # where derivatives are looked for, every weight is looked at
            if torch._C._len_torch_dispatch_stack():  # whoever records operators gets the one that says it all
                weights, plan, scalars = self._plan if rotary is None else stack_plan.turned(self._plan, rotary)
                return torch.ops.repavit_ops.fused_blocks.default(x, weights, plan=plan, scalars=scalars)
            return torch.ops.repavit_ops.fused_blocks_kept.default(x, self._number or self._keep(), *(rotary or ()))

    def _keep(self) -> int:
        number = torch.ops.repavit_ops.fused_blocks_keep(*self._plan)
        weakref.finalize(self, _drop, number).atexit = False  # of two threads that come here at once, both numbers
        self._number = number
        return number


def _drop(number: int) -> None:
    with torch._C._DisableTorchDispatch():  # whoever is recording operators when the garbage is collected
        torch.ops.repavit_ops.fused_blocks_drop(number)
