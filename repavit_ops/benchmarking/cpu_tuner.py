"""Measures this CPU's kernels beside PyTorch's own form and writes its table. Runs when called: ``repavit-ops tune``.

One forward of a fused model says which operations it has, on which sizes. Each is first held against float64, then
timed in turns with PyTorch's form of it, which is exactly what would run in its place; the model's blocks of one kind
take turns, so that weights come from memory as in a model.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import cpu_tuning, ops, reference
from ..cpu_tuning import Measured, Operation
from ..nn.packed_weights import Copy, PackedWeights
from ..stack import OneCall
from ..stack.one_call import operation_of
from ..stack_plan import Step
from .harness import check, interleave
from .measuring import PEER_SLACK

Calls = dict[str, Callable[[], Any]]  # by choice: "cpp", "pytorch"
Timer = Callable[[Calls], Mapping[str, float]]
BUSY = 1.5  # 80th over 20th percentile of one call's times
OF_MODELS = ("token_embedding", "pooled_head")  # steps of one call that belong to no module


@dataclass
class Place:
    """Where a model has an operation: its tensor, what else it is called with, and the modules or steps that do it."""

    operation: Operation
    x: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    parts: list[PackedWeights | Step] = field(default_factory=list)

    def call(self, part: PackedWeights | Step, backend: str) -> Callable[[], Tensor]:
        """One part on one backend."""
        if isinstance(part, Step):
            if backend == "cpp":
                return lambda: ops.fused_blocks(self.x, [part], backend="cpp")
            return lambda: reference.form(part.operator, backend)(self.x, *part.tensors, **part.static)
        twin: Any = part
        if part.backend != backend:
            twin = copy.copy(part)
            twin.backend, twin._copy = backend, Copy()
        return lambda: twin(self.x, *self.args, **self.kwargs)

    def turns(self, backend: str) -> Callable[[], Tensor]:
        """The parts one after the other, call by call."""
        calls = itertools.cycle([self.call(part, backend) for part in self.parts])
        return lambda: next(calls)()


def microseconds(seconds: float) -> Timer:
    """Medians in µs of providers in turns, over about so many seconds; warns where they vary too much to compare."""

    def timer(calls: Calls) -> Mapping[str, float]:
        timings = interleave(calls, seconds)
        if any(timing.p80 > BUSY * timing.p20 for timing in timings.values()):
            warnings.warn("the machine is busy, times vary by more than a half: tune again with --again", stacklevel=2)
        return {name: 1e6 * timing.p50 for name, timing in timings.items()}

    return timer


@torch.no_grad()
def places_of(model: nn.Module, images: Tensor) -> list[Place]:
    """Every operation that a model fused for backend "cpp" has on these images, each once."""
    found: dict[tuple[Operation, tuple[int, ...]], Place] = {}

    def note(operation: Operation, part: PackedWeights | Step, x: Tensor, *args: Any, **kwargs: Any) -> None:
        place = found.setdefault((operation, tuple(x.shape)), Place(operation, x, args, kwargs))
        place.parts.append(part)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(module, PackedWeights) and module.quantize == "none":
            note(module.operation(), module, *args, **kwargs)

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(model, OneCall) and model.why_apart() is None:
        steps = model.steps(images)
        for index, step in enumerate(steps):
            if step.operator in OF_MODELS:
                note(operation_of(step), step, ops.fused_blocks(images, steps[:index]) if index else images)
    return list(found.values())


@torch.no_grad()
def measure(place: Place, timer: Timer) -> Measured:
    """Time one operation both ways; PyTorch's is chosen, with a warning, where the kernel's result is wrong."""
    size, batch = place.x.shape[1:], place.x.shape[0]
    try:
        _check(place)
        wrong = False
    except AssertionError as error:
        warnings.warn(f"{error}; left to PyTorch, please report this processor", stacklevel=2)
        wrong = True
    backends = ("pytorch",) if wrong else cpu_tuning.CHOICES
    times = {"cpp": math.inf, **timer({backend: place.turns(backend) for backend in backends})}
    return Measured.of(place.operation, size, batch, times["cpp"], times["pytorch"])


def _check(place: Place) -> None:
    """Raise AssertionError where the kernel is far further from float64 than PyTorch's form is.

    More than the rule of the tests allows, for a few logits are too few to compare two maxima of errors.
    """
    part = place.parts[0]
    ours, eager = (place.call(part, backend)() for backend in cpu_tuning.CHOICES)
    wide: Any = _double(vars(part)) if isinstance(part, Step) else copy.deepcopy(part).double()
    exact = Place(place.operation, *_double((place.x, place.args, place.kwargs)))
    truth = exact.call(Step(**wide) if isinstance(part, Step) else wide, "reference")()
    check(f"{place.operation.operator} on {list(place.x.shape)}", ours, eager, truth, PEER_SLACK)


def _double(value: Any) -> Any:
    """Every tensor of floats in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    return {name: _double(item) for name, item in value.items()} if isinstance(value, dict) else value


def tune(places: Iterable[Place], file: Path, *, again: bool = False, timer: Timer) -> Iterator[Measured]:
    """Measure operations one by one, adding each to the table in ``file``; yields what was measured.

    Args:
        again: measure those too that the table has already.

    Raises:
        ValueError: what stands in ``file`` is no table.
    """
    try:
        present = set() if again else {(m.operation, m.size, m.batch) for m in cpu_tuning.read(file)}
    except (FileNotFoundError, cpu_tuning.Stale):
        present = set()
    for place in places:
        if (place.operation, tuple(place.x.shape[1:]), place.x.shape[0]) in present:
            continue
        measured = measure(place, timer)
        cpu_tuning.add(measured, file)
        cpu_tuning.forget()
        yield measured
