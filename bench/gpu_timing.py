"""Times on a GPU: every provider in a CUDA graph of its own, replayed in turn; and what the GPU can do at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from repavit_ops.benchmarking import harness
from repavit_ops.benchmarking.harness import Timing

Call = Callable[[], Any]

WARM_UP = 3
REPLAY = 2e-3  # seconds of work in one graph, about: far more than a launch
ROUNDS = 15
MOST_CALLS = 200  # in one graph


def interleave(calls: Mapping[str, Call], device: torch.device) -> dict[str, Timing]:
    """Seconds per call of every provider: A B C A B C …, each replaying a graph of so many calls that it takes 2 ms."""
    if device.type != "cuda":
        return harness.interleave(calls, seconds=0.0, rounds=2)
    repeats = {name: _calls_per_graph(_replayed(_capture(call, 1))) for name, call in calls.items()}
    graphs = {name: _capture(call, repeats[name]) for name, call in calls.items()}
    samples = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            samples[name].append(_begin_and_end(graph))
    torch.cuda.synchronize()
    return {
        name: harness.percentiles([1e-3 * begin.elapsed_time(end) / repeats[name] for begin, end in pairs[1:]])
        for name, pairs in samples.items()
    }


def _capture(call: Call, repeats: int) -> torch.cuda.CUDAGraph:
    """A graph of the same call many times over, after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(repeats):
            call()
    return graph


def _begin_and_end(graph: torch.cuda.CUDAGraph) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    return begin, end


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay, after another."""
    graph.replay()
    begin, end = _begin_and_end(graph)
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def _calls_per_graph(seconds: float) -> int:
    return max(1, min(MOST_CALLS, round(REPLAY / max(seconds, 1e-6))))


def ceilings(device: torch.device) -> dict[str, float]:
    """What everything else is compared with: bf16 product in FLOP/s, copy in bytes/s, seconds per node of a graph."""
    real = device.type == "cuda"
    n, size = (8192, 1 << 30) if real else (64, 1 << 10)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    source = torch.randn(size // 4, device=device)
    target, one = torch.empty_like(source), torch.zeros(1, device=device)

    def nodes(count: int) -> Call:
        return lambda: [one.add_(1.0) for _ in range(count)]

    calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source), "60": nodes(60), "120": nodes(120)}
    times = {name: timing.p50 for name, timing in interleave(calls, device).items()}
    return {
        "product_flops": 2 * n**3 / times["product"],
        "copy_bytes_per_second": 2 * source.nbytes / times["copy"],
        "node_seconds": times["60"] / 60,
        "node_seconds_of_120": times["120"] / 120,
    }
