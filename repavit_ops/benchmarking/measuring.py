"""One case: every provider is built, held against float64, and timed in turn with the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..reference import common_gelu
from .harness import Timing, check, interleave, peak_provider, split_peak

Call = Callable[[], Any]
Progress = Callable[[str, float], None]  # what is being done, and the share of the case that is done

OURS = "repavit_ops"
OWN_SLACK, PEER_SLACK = 2.0, 8.0  # times eager's error
COPIED = 1 << 26  # bytes of the copy that measures memory: beyond every cache


@dataclass(frozen=True)
class Provider:
    """One way to compute what a case asks for.

    make: builds the call. truth: which of the case's truths it has to reproduce; the first provider of each is plain
    PyTorch, whose error is the yardstick. own: of this library, where a wrong result is an error; a peer's is told.
    slack: times that error which its own may be.
    """

    make: Callable[[], Call]
    truth: str = ""
    own: bool = False
    slack: float = PEER_SLACK


@dataclass(frozen=True)
class Case:
    """What is timed together.

    providers: by name, the order of the columns. truths: the float64 result, or its first rows, by name.
    images: of one call. flop, bytes: of one call, for operators. left_out: providers that are not here, and why.
    """

    name: str
    dtype: torch.dtype
    images: int
    providers: Mapping[str, Provider]
    truths: Mapping[str, Callable[[], Tensor]]
    flop: float = 0.0
    bytes: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """How long one case is timed: until both are reached."""

    seconds: float = 2.0
    rounds: int = 5


@dataclass(frozen=True)
class Measured:
    """A case with its times, errors against float64, and the machine's limits where they were measured."""

    case: Case
    timings: Mapping[str, Timing]
    errors: Mapping[str, float]
    left_out: Mapping[str, str]
    peak_flops: float | None = None
    peak_bytes: float | None = None

    def images_per_second(self, name: str) -> float:
        return self.case.images / self.timings[name].p50

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the fields of bench/results."""
        seconds = {name: t.p50 for name, t in self.timings.items()}
        row: dict[str, Any] = {"case": self.case.name, "dtype": dtype_name(self.case.dtype)}
        if OURS in seconds:
            ratios = {name: s / seconds[OURS] for name, s in seconds.items() if name != OURS}
            row |= {"ratio": min(ratios.values(), default=1.0), "ratios": ratios}
        row |= {
            "images": self.case.images,
            "images_per_second": {name: self.case.images / s for name, s in seconds.items()},
        }
        if self.case.flop and OURS in seconds:
            row["gflops"] = self.case.flop / seconds[OURS] / 1e9
        if self.peak_flops and OURS in seconds:
            row["share_of_peak"] = self.case.flop / self.timings[OURS].p20 / self.peak_flops
        if self.case.bytes:
            row |= {"flop": self.case.flop, "bytes": self.case.bytes}
            row |= {"peak_flops": self.peak_flops, "peak_bytes_per_second": self.peak_bytes}
        row["seconds"] = {name: [t.p20, t.p50, t.p80] for name, t in self.timings.items()}
        return row | {"errors": dict(self.errors), "left_out": dict(self.left_out)}


@torch.no_grad()
@common_gelu()
def measure(case: Case, limits: Limits, progress: Progress = lambda text, share: None) -> Measured:
    """Build, check and time a case.

    A peer that cannot be built or whose result is wrong is not timed, and ``left_out`` says why.

    Raises:
        AssertionError: a provider of this library is further from float64 than its slack times eager's error plus 1e-6.
    """
    left_out, calls = dict(case.left_out), dict[str, Call]()
    for index, (name, provider) in enumerate(case.providers.items()):
        progress(f"{case.name}: building {name}", 0.5 * index / len(case.providers))
        try:
            calls[name] = provider.make()
            calls[name]()
        except Exception as error:
            if provider.own or _yardstick(case, provider.truth) == name:
                raise
            calls.pop(name, None)
            left_out[name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    progress(f"{case.name}: checking", 0.5)
    errors = _checked(case, calls, left_out)
    limit = peak_provider(case.dtype) | _copy_provider() if case.bytes else {}

    def timing(share: float) -> None:
        progress(f"{case.name}: timing", 0.5 + share / 2)

    timed = interleave(calls | limit, limits.seconds, limits.rounds, progress=timing)
    copy = timed.pop("copy", None)
    times, peak = split_peak(timed, case.dtype)
    return Measured(case, times, errors, left_out, peak, None if copy is None else 2 * COPIED / copy.p20)


def _yardstick(case: Case, truth: str) -> str:
    """The plain PyTorch provider of a truth."""
    return next(name for name, provider in case.providers.items() if provider.truth == truth)


def _checked(case: Case, calls: dict[str, Call], left_out: dict[str, str]) -> dict[str, float]:
    """Errors of all providers; wrong peers leave ``calls`` for ``left_out``."""
    errors: dict[str, float] = {}
    for key, make in case.truths.items():
        names = [name for name in calls if case.providers[name].truth == key]
        if names[1:]:
            truth = make()
            plain = _head(calls[_yardstick(case, key)](), truth)
            for name in names:
                try:
                    errors[name] = check(name, _head(calls[name](), truth), plain, truth, case.providers[name].slack)
                except AssertionError as error:
                    if case.providers[name].own:
                        raise
                    left_out[name] = str(error).removeprefix(f"{name}: ")
                    del calls[name]
    return errors


def _head(out: Tensor, truth: Tensor) -> Tensor:
    return out.reshape(-1, *truth.shape[1:])[: len(truth)]


def _copy_provider() -> dict[str, Call]:
    source = torch.zeros(COPIED // 4)
    target = torch.empty_like(source)
    return {"copy": lambda: target.copy_(source)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
