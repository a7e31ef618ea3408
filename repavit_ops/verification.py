"""Numerical equivalence of two models, per block and end to end, against a float64 truth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .nn.given import cast_real, copied, is_compiled, other_device, require_weights, unwrapped
from .reference_int8 import LEAST_COSINE

OUTPUT = "output"
Arguments = Mapping[Any, Tensor]  # by position or by name
ABSOLUTE = 1e-6  # allowance beside twice eager's own error (tolerance rule of the tests)
FEW = 32  # numbers of an output; the largest error of fewer says little of how large one may be
PROBES = 8  # inputs beside the caller's, on which eager's error is looked at then


@dataclass(frozen=True)
class Comparison:
    """One tensor of the candidate against the truth.

    Attributes:
        name: module that gave the tensor; "output" for the model's result, "output.logits" for one of several.
        max_abs: max |candidate - fp64 truth|.
        relative: max_abs over max |truth|.
        cosine: cosine of the flattened tensors.
        bound: what max_abs may be: 2 max|eager - truth| + 1e-6 of the reference in the candidate's dtype, or ``atol``.
        top1: share of images whose largest logit is the reference's; None for tensors that are no logits.
        passed: max_abs <= bound, or where that decides cosine >= least_cosine, and every value is finite where the
            truth is.
        least_cosine: what cosine may be at least; None where max_abs decides.
        silent: no value of the truth exceeds 1e-6 (or ``atol``), as behind a head of zeros: all zeros would pass.
    """

    name: str
    max_abs: float
    relative: float
    cosine: float
    bound: float
    top1: float | None
    passed: bool
    least_cosine: float | None = None
    silent: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which knows no NaN and no infinity: None stands for them."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class VerificationReport:
    """Result of :func:`verify`. Truth of the object itself is :attr:`passed`; ``str()`` gives a table.

    Attributes:
        blocks: outputs of blocks, to find where an error begins; they decide only where every output is silent.
        outputs: every tensor that the model returns.
        dtype: the candidate's.
    """

    blocks: tuple[Comparison, ...]
    outputs: tuple[Comparison, ...]
    dtype: str

    @property
    def output(self) -> Comparison:
        """Of several tensors that the model returns the one that comes nearest to its bound, or furthest beyond it."""
        return _worst(self.outputs)

    @property
    def passed(self) -> bool:
        """Whether every output holds the tolerance, and, where none could show an error, every block too."""
        return all(row.passed for row in (*self.outputs, *(self.blocks if self._silent else ())))

    @property
    def _silent(self) -> bool:
        return all(row.silent for row in self.outputs)

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "passed": self.passed,
            "dtype": self.dtype,
            "output": self.output.to_dict(),
            "outputs": [row.to_dict() for row in self.outputs],
            "blocks": [block.to_dict() for block in self.blocks],
        }

    def __str__(self) -> str:
        rows = [*self.blocks, *self.outputs]
        width = max(len(row.name) for row in rows)
        lines = [f"{'PASS' if self.passed else 'FAIL'} in {self.dtype}"]
        for row in rows:
            top1 = "" if row.top1 is None else f"  top-1 {row.top1:.2%}"
            mark = "ok  " if row.passed else "over" if self.passed else "FAIL"
            bound, cosine = f" (bound {row.bound:.2e})", ""
            if row.least_cosine is not None:
                bound, cosine = "", f" (at least {row.least_cosine})"
            lines.append(
                f"  {mark} {row.name:<{width}}  max abs {row.max_abs:.2e}{bound}  "
                f"relative {row.relative:.2e}  cosine {row.cosine:.9f}{cosine}{top1}"
            )
        if self.passed and not all(row.passed for row in self.blocks):
            lines.append("  over: beyond its own bound within the model, which the outputs do not show")
        if self._silent:
            judged = "the blocks decide" if self.blocks else "nothing was compared"
            lines.append(f"  the outputs are zero, or too small to show an error: {judged}")
        return "\n".join(lines)


@torch.no_grad()
def verify(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    atol: float | None = None,
    least_cosine: float | None = None,
    block_types: tuple[type[nn.Module], ...] | None = None,
) -> VerificationReport:
    """Compare a candidate (merged, fused, cast) with its reference on real inputs.

    The truth is the reference in float64. The candidate may be off by twice what the reference itself is off in the
    candidate's dtype, plus 1e-6: ``max|candidate - fp64| <= 2 max|eager - fp64| + 1e-6``. Modules that stand under the
    same name in both models and hold two halves of a block are compared too, in order. The candidate is called twice:
    as it is, which may be one operator call, and with hooks on its blocks, which makes it run part by part; of each
    output the worse of both counts. In 16 bits a small fault can hide in the rounding: compare in float32 first.
    Where an output of fewer than 32 numbers is beyond its bound, eager's error counts that is the largest on these and
    eight more inputs, each a rounding step beside the caller's: of one logit it may be nearly 0 by chance.

    Args:
        reference: the model that is right; neither model is changed.
        candidate: the model to check, on any device and in any dtype. Both may be wrapped (DistributedDataParallel,
            DataParallel, AveragedModel, torch.compile); what is compiled is compared by its outputs alone.
        inputs: one tensor, the tuple of positional arguments, or a dictionary of arguments by name (what a processor of
            transformers returns); float tensors are cast for each model.
        atol: a bound of your own instead of the rule.
        least_cosine: a bound of the cosine instead. Of a candidate that was quantized, which is not equal by the rule,
            it decides unless ``atol`` is given: 0.99.
        block_types: classes whose outputs are compared; default: those that hold an ``attn`` and an ``mlp``.

    Raises:
        RuntimeError: a model is in training mode.
        ValueError: weights are on the meta device or sharded; the reference cannot be copied; the models' outputs
            differ in number or shape, or hold no tensor.
        TypeError: a model is no module, or an input no tensor.
    """
    reference = unwrapped(reference, label="reference")
    candidate = unwrapped(candidate, keep_compiled=True, label="candidate")
    if (
        atol is None
        and least_cosine is None
        and any(getattr(m, "quantize", "none") != "none" for m in candidate.modules())
    ):
        least_cosine = LEAST_COSINE
    for label, model in (("reference", reference), ("candidate", candidate)):
        require_weights(model, "compare")
        if model.training:
            raise RuntimeError(f"{label}: in training mode, where outputs are random; call {label}.eval() first")
    arguments = _arguments(inputs)
    dtype, device = _place(candidate)
    names = _common_blocks(reference, candidate, block_types)

    plain = _record(candidate, arguments, [])  # first: hooks make a fused model forget how it ran in one call
    ours = _record(candidate, arguments, names) if names else plain
    exact = copied(reference, "compare")
    exact = (exact if other_device(exact) is None else exact.to("cpu")).double()
    truth = _record(exact, arguments, names)
    rounded = cast_real(copied(reference, "compare").to(device), dtype)
    eager = _record(rounded, arguments, names)
    if ours.keys() != truth.keys():
        differing = ", ".join(sorted(ours.keys() ^ truth.keys()))
        raise ValueError(f"candidate: got other outputs than the reference's: {differing}")

    def row(name: str, candidates: Mapping[str, Tensor]) -> Comparison:
        return _compare(name, candidates[name], eager[name], truth[name], atol, least_cosine)

    blocks = tuple(row(name, ours) for name in ours if not _is_output(name))
    outputs = tuple(_worst([row(name, ours), row(name, plain)]) for name in plain)
    if atol is None and least_cosine is None and any(_is_close_call(o, truth[o.name]) for o in outputs):
        widest = _errors_nearby(exact, rounded, arguments, dtype)
        outputs = tuple(_judged_by(o, widest[o.name]) if _is_close_call(o, truth[o.name]) else o for o in outputs)
    return VerificationReport(blocks, outputs, str(dtype).removeprefix("torch."))


def _is_close_call(row: Comparison, truth: Tensor) -> bool:
    """Whether an output failed by eager's error on few numbers; none of them is a NaN or an infinity."""
    return not row.passed and row.max_abs > row.bound and math.isfinite(row.cosine) and truth.numel() < FEW


def _errors_nearby(exact: nn.Module, rounded: nn.Module, arguments: Arguments, dtype: torch.dtype) -> dict[str, float]:
    """Of every output the largest that eager is off on inputs beside these; nothing changes where none is a float."""
    generator, widest = torch.Generator().manual_seed(0), dict[str, float]()
    for _ in range(PROBES):
        nearby = {
            name: a * (1 + torch.finfo(dtype).eps * (2 * torch.rand(a.shape, generator=generator) - 1).to(a))
            if a.is_floating_point()
            else a
            for name, a in arguments.items()
        }
        truth, eager = (_record(model, nearby, []) for model in (exact, rounded))
        for name, t in truth.items():
            widest[name] = max(widest.get(name, 0.0), _largest(eager[name].to("cpu", torch.float64) - t.cpu()))
    return widest


def _judged_by(row: Comparison, error: float) -> Comparison:
    """The same output, where eager may be off by ``error``."""
    bound = max(row.bound, 2 * error + ABSOLUTE)
    return replace(row, bound=bound, passed=row.max_abs <= bound)


def _worst(rows: Sequence[Comparison]) -> Comparison:
    """The one that comes nearest to its bound, or furthest beyond it."""
    return max(rows, key=lambda row: (not row.passed, row.max_abs / max(row.bound, 1e-300)))


def _arguments(inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Arguments:
    """By place or by name; TypeError, naming what came, where something is no tensor."""
    given = inputs if isinstance(inputs, Mapping | list | tuple) else (inputs,)
    arguments: Arguments = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
    for place, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"inputs: got {type(value).__name__} at {place!r}, wanted a tensor, a tuple of arguments or a "
                "dictionary of them by name"
            )
    return arguments


def _is_output(name: str) -> bool:
    return name == OUTPUT or name.startswith(f"{OUTPUT}.")


def _tensors_of(output: Any, name: str = OUTPUT) -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor of an output, named by its place: in tuples, dictionaries, dataclasses."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors_of(value, f"{name}.{key}")
    elif isinstance(output, list | tuple):
        for index, value in enumerate(output):
            yield from _tensors_of(value, f"{name}.{index}")


def _place(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    for p in model.parameters():
        if p.is_floating_point():
            return p.dtype, p.device
    return torch.float32, torch.device("cpu")


def _common_blocks(
    reference: nn.Module, candidate: nn.Module, block_types: tuple[type[nn.Module], ...] | None
) -> list[str]:
    def is_block(module: nn.Module) -> bool:
        if block_types is not None:
            return isinstance(module, block_types)
        return hasattr(module, "attn") and hasattr(module, "mlp")

    theirs = {} if is_compiled(candidate) else dict(candidate.named_modules())
    return [name for name, module in reference.named_modules() if name and is_block(module) and name in theirs]


def _record(model: nn.Module, arguments: Arguments, names: list[str]) -> dict[str, Tensor]:
    """Outputs of the named modules and of the model ("output"), in the order they were computed."""
    dtype, device = _place(model)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = output.detach()

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        moved = {k: a.to(device, dtype) if a.is_floating_point() else a.to(device) for k, a in arguments.items()}
        placed = [value for key, value in moved.items() if isinstance(key, int)]
        output = model(*placed, **{key: value for key, value in moved.items() if isinstance(key, str)})
    finally:
        for handle in handles:
            handle.remove()
    outputs = dict(_tensors_of(output))
    if not outputs:
        raise ValueError(f"inputs: {type(model).__name__} returned {type(output).__name__} without any float tensor")
    return {**seen, **outputs}


def _compare(
    name: str, ours: Tensor, eager: Tensor, truth: Tensor, atol: float | None, least_cosine: float | None
) -> Comparison:
    if ours.shape != truth.shape:
        raise ValueError(f"{name}: candidate gives shape {list(ours.shape)}, reference {list(truth.shape)}")
    truth = truth.cpu()
    ours, eager = (t.to("cpu", torch.float64) for t in (ours, eager))
    same_nonfinite = torch.equal(ours[~truth.isfinite()].isfinite(), truth[~truth.isfinite()].isfinite())
    sane = bool(ours[truth.isfinite()].isfinite().all()) and same_nonfinite
    error = _largest(ours - truth)
    bound = atol if atol is not None else 2 * _largest(eager - truth) + ABSOLUTE
    cosine = (
        torch.nn.functional.cosine_similarity(ours.flatten(), truth.flatten(), dim=0).item() if ours.numel() else 1.0
    )
    top1 = None
    if _is_output(name) and truth.dim() == 2 and truth.shape[1] > 1:
        top1 = (ours.argmax(1) == truth.argmax(1)).double().mean().item()
    largest = _largest(truth)
    silent = largest <= (ABSOLUTE if atol is None else atol) and bool(truth.isfinite().all())
    return Comparison(
        name=name,
        max_abs=error,
        relative=error / largest if largest > 0 else error,
        cosine=cosine,
        bound=bound,
        top1=top1,
        passed=sane and (error <= bound if least_cosine is None or silent else cosine >= least_cosine),
        least_cosine=least_cosine,
        silent=silent,
    )


def _largest(t: Tensor) -> float:
    finite = t[t.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
