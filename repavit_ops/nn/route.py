"""How a module runs on inputs of one kind in few operator calls, and whether that still holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .. import backends, stack_plan
from .packed_weights import PACKABLE, PackedWeights

Segment = nn.Module | stack_plan.Plan  # a module by itself, or a run of steps in one call


@dataclass(frozen=True)
class Route:
    """What to call one after the other, and what must still be as it was for that to hold."""

    segments: list[Segment]
    entries: tuple[tuple[dict[str, Any], str, Any], ...] = ()  # dict[key] is value: children, parameters, packed copies
    sizes: tuple[tuple[dict[str, Any], int], ...] = ()  # len(dict): no parameter where there was none
    versions: tuple[tuple[Tensor, int], ...] = ()
    hooks: tuple[dict[int, Any], ...] = ()  # all empty

    @classmethod
    def of(cls, module: nn.Module, segments: list[Segment]) -> Route:
        """The route that holds as long as nothing in and below ``module`` changes."""
        return cls(segments, _entries(module), _sizes(module), _versions(module), hooks_below(module))

    def holds(self) -> bool:
        return (
            all(d.get(key) is value for d, key, value in self.entries)
            and all(len(d) == size for d, size in self.sizes)
            and all(tensor._version == version for tensor, version in self.versions)
            and not any(self.hooks)
        )

    def run(self, x: Tensor) -> Tensor:
        for segment in self.segments:
            if isinstance(segment, nn.Module):
                x = segment(x)
            else:
                weights, plan, scalars = segment
                x = torch.ops.repavit_ops.fused_blocks(x, weights, plan=plan, scalars=scalars)
        return x


def why_not_here(steps: list[Any], x: Tensor) -> str | None:
    """Why modules of the library cannot go through one call on tensors like ``x``, in one line; None if they can."""
    if any(step.backend not in ("auto", "cpp") for step in steps) or backends.why_unavailable("cpp") is not None:
        return "its blocks do not run on the C++ kernels"
    if x.device.type != "cpu":
        return f"one call is for the CPU; on {x.device.type} every sub-block is called by itself"
    if x.dtype not in PACKABLE:
        return f"there is no kernel for {x.dtype}"
    return None


def why_not_now(module: nn.Module, x: Tensor) -> str | None:
    """What can change from call to call and is not of the module itself."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "there are global forward hooks"
    if torch.jit.is_tracing():
        return "the model is traced"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype of each operator"
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        return "gradients are wanted: call it under torch.no_grad() or torch.inference_mode()"
    if backends.in_forward_mode():
        return "forward-mode derivatives are wanted"
    return None


def hooks_below(module: nn.Module) -> tuple[dict[int, Any], ...]:
    below = [child for child in module.modules() if child is not module]
    return tuple(hooks for child in below for hooks in (child._forward_hooks, child._forward_pre_hooks))


def _entries(module: nn.Module) -> tuple[tuple[dict[str, Any], str, Any], ...]:
    entries: list[tuple[dict[str, Any], str, Any]] = []
    for part in module.modules():
        entries += [(part._modules, name, child) for name, child in part._modules.items()]
        entries += [(part._parameters, name, value) for name, value in part._parameters.items()]
        if isinstance(part, PackedWeights):
            entries += [(part.__dict__, name, part.__dict__[name]) for name in ("_packed", "backend")]
    return tuple(entries)


def _sizes(module: nn.Module) -> tuple[tuple[dict[str, Any], int], ...]:
    return tuple((part._parameters, len(part._parameters)) for part in module.modules())


def _versions(module: nn.Module) -> tuple[tuple[Tensor, int], ...]:
    return tuple((p, p._version) for p in module.parameters() if not p.is_inference())
