"""How a module runs on inputs of one kind in few operator calls, and whether that still holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, stack_plan
from ..nn.packed_weights import PACKABLE, PackedWeights
from .kept_plan import KeptPlan

Columns = tuple[tuple[Any, ...], ...]
Routes = dict[tuple[Any, ...], "Route"]  # by dtype, sizes and whatever else of the input matters
KEPT = 16  # a route may hold a position table of its own
Segment = nn.Module | stack_plan.Plan  # a module by itself, or a run of steps


@dataclass(frozen=True)
class Route:
    """What to call one after the other, and what must still be as it was for that to hold.

    That is looked at in every call, with cold caches, so in columns that need no bytecode per entry.
    """

    calls: Sequence[Callable[[Tensor], Tensor]]
    entries: Columns = ((), (), ())  # dicts, keys and what stands there: children, parameters, packed copies
    sizes: Columns = ((), ())  # dicts and their lengths: no parameter where there was none
    versions: Columns = ((), ())  # tensors and their version counters
    hooks: tuple[dict[int, Any], ...] = ()  # all empty

    @classmethod
    def of(cls, module: nn.Module, segments: list[Segment]) -> Route:
        """The route that holds as long as nothing in and below ``module`` changes."""
        calls = [segment if isinstance(segment, nn.Module) else KeptPlan(segment) for segment in segments]
        return cls(calls, _entries(module), _sizes(module), _versions(module), hooks_below(module))

    def holds(self) -> bool:
        dicts, keys, values = self.entries
        sized, sizes = self.sizes
        tensors, versions = self.versions
        return (
            not any(self.hooks)
            and all(map(operator.is_, map(dict.get, dicts, keys), values))
            and all(map(operator.eq, map(len, sized), sizes))
            and all(map(operator.eq, map(_version, tensors), versions))
        )

    def run(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = call(x)
        return x


def keep(routes: Routes, key: tuple[Any, ...], route: Route) -> Route:
    """The route, kept for the next input of its kind; inputs of ever new sizes start over."""
    if len(routes) >= KEPT and key not in routes:
        routes.clear()
    routes[key] = route
    return route


def run_traced(x: Tensor, segments: Iterable[Segment]) -> Tensor:
    """The segments as torch.compile should see them: operators that take their weights."""
    for segment in segments:
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
    return why_not_for(x)


def why_not_for(x: Tensor) -> str | None:
    """Why no modules go through one call on tensors of this device and dtype."""
    if x.device.type != "cpu":
        return f"one call is for the CPU; on {x.device.type} every sub-block is called by itself"
    if x.dtype not in PACKABLE:
        return f"there is no kernel for {x.dtype}"
    return None


def hooks_below(module: nn.Module) -> tuple[dict[int, Any], ...]:
    below = [child for child in module.modules() if child is not module]
    return tuple(hooks for child in below for hooks in (child._forward_hooks, child._forward_pre_hooks))


def _entries(module: nn.Module) -> Columns:
    entries: list[tuple[dict[str, Any], str, Any]] = []
    for part in module.modules():
        entries += [(part._modules, name, child) for name, child in part._modules.items()]
        entries += [(part._parameters, name, value) for name, value in part._parameters.items()]
        if isinstance(part, PackedWeights):
            entries += [(part.__dict__, name, part.__dict__[name]) for name in ("_packed", "backend")]
    return _columns(entries, 3)


def _sizes(module: nn.Module) -> Columns:
    return _columns(((part._parameters, len(part._parameters)) for part in module.modules()), 2)


def _versions(module: nn.Module) -> Columns:
    """Of what steps hold a copy of: packed weights, and what a root computes from its own parameters."""
    packed = [t for part in module.modules() if isinstance(part, PackedWeights) for t in part.sources()]
    copied = [t for t in (*packed, *module.parameters(recurse=False)) if t is not None]
    return _columns(((t, t._version) for t in copied if not t.is_inference()), 2)


def _columns(rows: Iterable[tuple[Any, ...]], count: int) -> Columns:
    return tuple(zip(*rows, strict=True)) or ((),) * count


_version = operator.attrgetter("_version")
