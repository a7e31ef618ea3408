"""How everything here is timed: numbers checked first, providers interleaved in one run, ratios not absolutes."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backends

ABSOLUTE = 1e-6  # of the tolerance rule of the tests
# Seconds. Thread pools spin after a call, ONNX Runtime's for more than 20 ms, and would take cores from whoever is
# next; threads that have slept may then wake on one core, and it takes a few milliseconds until they part.
SETTLE, TURN = 50e-3, 8e-3
LONG = 1.0  # seconds of a call that such a start does not show in


@dataclass(frozen=True)
class Timing:
    """Seconds per call: 20th, 50th and 80th percentile over the rounds."""

    p20: float
    p50: float
    p80: float


def _seconds(call: Callable[[], Any]) -> float:
    """The shortest of the calls that two turns have time for."""
    shortest, began = float("inf"), time.perf_counter()
    while (start := time.perf_counter()) < began + 2 * TURN or shortest == float("inf"):
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return max(shortest, 1e-7)


def interleave(
    providers: Mapping[str, Callable[[], Any]],
    seconds: float = 3.0,
    rounds: int = 15,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Timing]:
    """Time providers A B C A B C …, so that what the machine does meanwhile meets them all alike.

    Each turn waits until the threads of the one before have stopped spinning, calls untimed for about ``TURN`` (not
    where one call is ``LONG``) and then timed for as long; rounds go on until both ``rounds`` and ``seconds`` are
    reached. With one thread, ``clock=time.process_time`` counts what the process computed, whatever else runs on the
    machine. ``progress`` is told after every round how much is done, from 0 to 1.
    """
    shortest = {name: _seconds(call) for name, call in providers.items()}
    repeats = {name: max(1, round(TURN / s)) for name, s in shortest.items()}
    samples: dict[str, list[float]] = {name: [] for name in providers}
    began = time.perf_counter()
    while len(next(iter(samples.values()))) < rounds or time.perf_counter() - began < seconds:
        for name, call in providers.items():
            time.sleep(SETTLE)
            for _ in range(repeats[name] if shortest[name] < LONG else 0):
                call()
            start = clock()
            for _ in range(repeats[name]):
                call()
            samples[name].append((clock() - start) / repeats[name])
        made, spent = len(samples[name]), time.perf_counter() - began
        progress(min(1.0, made / rounds, spent / seconds if seconds else 1.0))
    return {name: percentiles(values) for name, values in samples.items()}


def percentiles(values: list[float]) -> Timing:
    ordered = sorted(values)
    p20, p50, p80 = (ordered[min(len(ordered) - 1, int(len(ordered) * p))] for p in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80)


def check(name: str, ours: Tensor, eager: Tensor, truth: Tensor, slack: float = 2.0) -> float:
    """Error of a provider against float64; raises where it exceeds ``slack`` times eager's own, plus 1e-6."""
    error, eagers = ((t.double() - truth).abs().max().item() for t in (ours, eager))
    if not error <= slack * eagers + ABSOLUTE:
        raise AssertionError(f"{name}: max error {error:.3e}, eager's {eagers:.3e}: not timed")
    return error


PEAK = "peak"  # name of the provider that measures the machine's own limit
PEAK_ITERATIONS = 1 << 16


def peak_provider(dtype: torch.dtype) -> dict[str, Callable[[], int]]:
    """Products of this dtype in registers, to be interleaved with the rest; none where the C++ library is missing."""
    if backends.why_unavailable("cpp") is not None:
        return {}
    like = torch.empty(0, dtype=dtype)
    return {PEAK: lambda: torch.ops.repavit_ops.product_peak(like, PEAK_ITERATIONS)}


def split_peak(times: dict[str, Timing], dtype: torch.dtype) -> tuple[dict[str, Timing], float | None]:
    """The other providers' times, and the peak in FLOP/s that was measured among them.

    By its 20th percentile, as a limit: in some rounds its two threads wake on one core. Compare with a 20th percentile.
    """
    rest = {name: timing for name, timing in times.items() if name != PEAK}
    if PEAK not in times:
        return rest, None
    return rest, peak_provider(dtype)[PEAK]() / times[PEAK].p20


def machine() -> dict[str, Any]:
    """What a result was measured on: enough to compare, nothing that names the machine."""
    return {
        "cpu": backends.cpu_model(),
        "isa": backends.cpu_isa() if backends.why_unavailable("cpp") is None else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def json_line(row: dict[str, Any]) -> str:
    """A row as one JSON line, with the machine in it."""
    return json.dumps({**machine(), **row}) + "\n"


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json_line(row))
