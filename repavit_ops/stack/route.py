"""A route: the operator calls by which a module runs on inputs of one kind, kept until something in the module changes.

Finding out which blocks can go through one call takes far longer than the call. So a module finds it out once per kind
of input (dtype, sizes) and keeps the answer with everything that it depends on: which children and parameters stand
where, the version counters of weights that were copied, and that no part has hooks. Each later call only compares.
"""

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
from .pytorch_run import PyTorchRun

Columns = tuple[tuple[Any, ...], ...]  # a table, column by column
Routes = dict[tuple[Any, ...], "Route"]  # by dtype, sizes and whatever else of the input matters
KEPT = 16  # routes per module: each may hold a position table of its own
# a module that is called by itself, a run of steps for one operator call, or one for PyTorch
Segment = nn.Module | stack_plan.Plan | PyTorchRun


@dataclass(frozen=True)
class Route:
    """What to call one after the other, and the state of the module under which that is right.

    Every call compares that state, often right after the weights of a whole model have pushed everything else out of
    the processor's caches. It is therefore stored as columns and compared by ``map``, which runs in C: a Python loop
    over the same entries takes several times as long.

    Attributes:
        calls: functions of one tensor, in order; none where the module must run part by part.
        entries: dictionaries, keys, and the objects that must still stand there: children, parameters, packed copies.
        sizes: dictionaries and their lengths, so that a parameter or a hook that is new is noticed.
        versions: weights that were packed or otherwise copied, and their version counters.
        hooks: dictionaries of hooks, which must all be empty.
        copied: the root's own parameters of which the calls hold no more than a copy, as a resized position table.
        copied_state: where they stood then and what was in them.
    """

    calls: Sequence[Callable[..., Tensor]]
    entries: Columns = ((), (), ())
    sizes: Columns = ((), ())
    versions: Columns = ((), ())
    hooks: tuple[dict[int, Any], ...] = ()
    copied: tuple[Tensor, ...] = ()
    copied_state: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: nn.Module, segments: list[Segment]) -> Route:
        """The route that holds as long as nothing in and below ``module`` changes."""
        calls = [KeptPlan(segment) if isinstance(segment, tuple) else segment for segment in segments]
        hooks = hooks_below(module)
        idle = [found for found in hooks if found]  # recorders; that no other joins them shows in their number
        empty = tuple(found for found in hooks if not found)
        copied = _copied(module, segments)
        return cls(calls, _entries(module), _sizes(module, idle), _versions(module), empty, copied, _state_of(copied))

    def holds(self) -> bool:
        """Whether the module is still in the state that the route was made for."""
        dicts, keys, values = self.entries
        sized, sizes = self.sizes
        tensors, versions = self.versions
        return (
            not any(self.hooks)
            and all(map(operator.is_, map(dict.get, dicts, keys), values))
            and all(map(operator.eq, map(len, sized), sizes))
            and all(map(operator.eq, map(_version, tensors), versions))
            and (not self.copied or self.copied_state == _state_of(self.copied))
        )

    def run(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The module's output for ``x``; rotary tables go to every run of steps."""
        for call in self.calls:
            x = call(x, rotary) if rotary is not None and isinstance(call, KeptPlan | PyTorchRun) else call(x)
        return x


class Routed(nn.Module):
    """Base of what keeps routes; they hold the weights, and are forgotten when all of those are replaced."""

    _routes: Routes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Routed:
        self._routes.clear()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._routes.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_routes": {}}


def keep(routes: Routes, key: tuple[Any, ...], route: Route) -> Route:
    """Keep a route for the next input of its kind; once there are :data:`KEPT` others, they are all forgotten."""
    if len(routes) >= KEPT and key not in routes:
        routes.clear()
    routes[key] = route
    return route


def run_traced(x: Tensor, segments: Iterable[Segment]) -> Tensor:
    """Run the segments as torch.compile must see them: as operators that take the weights, not as kept plans."""
    for segment in segments:
        if isinstance(segment, tuple):
            weights, plan, scalars = segment
            x = torch.ops.repavit_ops.fused_blocks(x, weights, plan=plan, scalars=scalars)
        else:
            x = segment(x)
    return x


def why_not_here(steps: list[Any], x: Tensor) -> str | None:
    """Why modules of the library cannot go through one call on tensors like ``x``, in one line; None if they can."""
    if any(step.backend not in ("auto", "cpp") for step in steps) or backends.why_unavailable("cpp") is not None:
        return "its blocks do not run on the C++ kernels"
    return why_not_for(x)


def why_not_for(x: Tensor) -> str | None:
    """Why no modules go through one call on tensors of this device and dtype."""
    if backends.in_transform():
        return "a transform of torch.func is going on"
    if backends.exports_to_onnx():
        return "an export to ONNX is going on, where every sub-block is its formula"
    if x.device.type != "cpu":
        return f"one call is for the CPU; on {x.device.type} every sub-block is called by itself"
    if x.dtype not in PACKABLE:
        return f"there is no kernel for {x.dtype}"
    return None


def hooks_below(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The dictionaries of forward hooks of every part, without the module's own, which run in any case."""
    below = [child for child in module.modules() if child is not module]
    return tuple(hooks for child in below for hooks in (child._forward_hooks, child._forward_pre_hooks))


def _entries(module: nn.Module) -> Columns:
    entries: list[tuple[dict[str, Any], str, Any]] = []
    for part in module.modules():
        entries += [(part._modules, name, child) for name, child in part._modules.items()]
        entries += [(part._parameters, name, value) for name, value in part._parameters.items()]
        if isinstance(part, PackedWeights):
            entries += [(part.__dict__, name, part.__dict__[name]) for name in ("_copy", "backend")]
    return _columns(entries, 3)


def _sizes(module: nn.Module, others: Iterable[dict[Any, Any]] = ()) -> Columns:
    sized = [*(part._parameters for part in module.modules()), *others]
    return _columns(((entries, len(entries)) for entries in sized), 2)


def _versions(module: nn.Module) -> Columns:
    """Version counters of the tensors that a route may hold copies of: sources of packed weights, the root's own."""
    packed = [t for part in module.modules() if isinstance(part, PackedWeights) for t in part.sources()]
    copied = [t for t in (*packed, *module.parameters(recurse=False)) if t is not None]
    return _columns(((t, t._version) for t in copied if not t.is_inference()), 2)


def _copied(module: nn.Module, segments: Iterable[Segment]) -> tuple[Tensor, ...]:
    taken = [w for segment in segments for w in _weights(segment) if w is not None]
    known = set(map(id, taken))
    return tuple(p for p in module.parameters(recurse=False) if id(p) not in known) if taken else ()


def _weights(segment: Segment) -> Iterable[Tensor | None]:
    """What a segment holds besides the modules of the route."""
    if isinstance(segment, PyTorchRun):
        return (t for step in segment.steps for t in step.tensors)
    return segment[0] if isinstance(segment, tuple) else ()


def _state_of(copied: tuple[Tensor, ...]) -> tuple[int, ...]:
    if not copied:
        return ()
    return (torch.ops.repavit_ops.fingerprint(copied), *(t.data_ptr() for t in copied))


def _columns(rows: Iterable[tuple[Any, ...]], count: int) -> Columns:
    return tuple(zip(*rows, strict=True)) or ((),) * count


_version = operator.attrgetter("_version")
