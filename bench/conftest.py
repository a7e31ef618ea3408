"""Options and the closing table of the benchmarks: ``pytest bench/bench_partial_gelu_ffn.py --results FILE``."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from repavit_ops.benchmarking.harness import append_result
from repavit_ops.reference import common_gelu

PEERS = ("compile", "openvino", "onnxruntime")
ROWS: list[dict] = []


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=None, help="append one JSON line per case to this file")
    parser.addoption("--threads", type=int, default=None, help="threads of every provider (default: torch's)")
    parser.addoption("--peers", nargs="*", choices=PEERS, default=PEERS, help="peers of whole models, beside eager")


@pytest.fixture
def wanted_peers(request):
    return tuple(request.config.getoption("--peers"))


@pytest.fixture(scope="session", autouse=True)
def _threads(request):
    if (threads := request.config.getoption("--threads")) is not None:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _eager_gelu():
    with common_gelu():
        yield


@pytest.fixture
def report(request):
    """Record a case: ``report(case=…, dtype=…, ratio=…, …)``; printed at the end, written with --results."""

    def add(**row):
        ROWS.append(row)
        if (path := request.config.getoption("--results")) is not None:
            append_result(path, row)

    return add


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("ratios of medians in one run, > 1: repavit_ops is faster")
    for row in ROWS:
        peers = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items())
        share = f"  {row['share_of_peak']:.0%} of peak" if row.get("share_of_peak") else ""
        if row.get("plain_share_of_peak"):
            share += f" (plain {row['plain_share_of_peak']:.0%})"
        rate = f" {row['gflops']:7.1f} GFLOP/s" if "gflops" in row else ""
        line = f"{row['case']:<34} {row['dtype']:<9}{rate}{share}  best peer {row['ratio']:.2f}x"
        terminalreporter.write_line(f"{line}  ({peers})")
        if "cosines" in row:
            cosines = "  ".join(f"{name} {value:.5f}" for name, value in row["cosines"].items())
            terminalreporter.write_line(f"{'':<34} cosine with float64: {cosines}")
    for dtype in dict.fromkeys(row["dtype"] for row in ROWS):
        ratios = [row["ratio"] for row in ROWS if row["dtype"] == dtype]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        terminalreporter.write_line(f"{dtype}: geometric mean over the best peer {mean:.3f}x, worst {min(ratios):.3f}x")
