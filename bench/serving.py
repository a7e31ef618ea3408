"""Workers and threads of a server:  python bench/serving.py [--model NAME] [--batch B] [--seconds S] [--write]

Every row: so many processes, each with so many threads and a fused model of its own, answer requests one after another
for some seconds, all at once: requests per second of all together, and how long one takes (median, 95th percentile).
The rows are all ways to share the cores out, and one where every worker takes all of them. Needs a quiet machine;
``--write`` puts the table into docs/serving.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import repavit_ops
from repavit_ops.benchmarking.harness import machine
from repavit_ops.models import create_model

PAGE = Path(__file__).resolve().parents[1] / "docs/serving.md"
BEGIN, END = "<!-- serving.py begin -->", "<!-- serving.py end -->"
WARM_UP = 3  # requests
PATIENCE = 600.0  # seconds that workers may take to start


class Setting(NamedTuple):
    """So many processes with so many threads each."""

    workers: int
    threads: int


def settings(cores: int) -> list[Setting]:
    """All ways to give every core to one worker, and one that gives every core to all of them."""
    even = [Setting(workers, cores // workers) for workers in range(1, cores + 1) if cores % workers == 0]
    return [*even, *([Setting(cores, cores)] if cores > 1 else [])]


def serve(name: str, batch: int, threads: int, seconds: float, fused: bool, ready: Any, answers: Any) -> None:
    """One worker: what serving.md says, then requests until the time is over; sends the seconds of each."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = create_model(name).eval()
    model = repavit_ops.fuse(model, keep_unpacked=False) if fused else model
    images = torch.randn(batch, 3, 224, 224)
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(WARM_UP):
            model(images)
        ready.wait(PATIENCE)
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            model(images)
            times.append(time.perf_counter() - start)
    answers.put(times)


def measured(setting: Setting, arguments: argparse.Namespace, fused: bool) -> str:
    """One row of the table."""
    context = multiprocessing.get_context("spawn")
    ready, answers = context.Barrier(setting.workers), context.Queue()
    options = (arguments.model, arguments.batch, setting.threads, arguments.seconds, fused, ready, answers)
    workers = [context.Process(target=serve, args=options, daemon=True) for _ in range(setting.workers)]
    for worker in workers:
        worker.start()
    times = [answers.get(timeout=PATIENCE + 10 * arguments.seconds) for _ in workers]
    for worker in workers:
        worker.join()
    rate = sum(len(each) / sum(each) for each in times)
    every = sorted(t for each in times for t in each)
    late = every[min(len(every) - 1, int(0.95 * len(every)))]
    what = "fused" if fused else "eager"
    return (
        f"| {what} | {setting.workers} | {setting.threads} | {rate * arguments.batch:.1f} "
        f"| {1e3 * statistics.median(every):.1f} | {1e3 * late:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="repa_deit_small")
    parser.add_argument("--batch", type=int, default=1, help="images of one request")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--write", action="store_true", help="put the table into docs/serving.md")
    arguments = parser.parse_args()
    if arguments.cores < 1 or arguments.batch < 1 or arguments.seconds <= 0:
        raise SystemExit("--cores, --batch, --seconds: wanted positive numbers")
    host = machine()
    lines = [
        f"`{arguments.model}`, {arguments.batch} image(s) a request, {arguments.cores} cores of {host['cpu']}, "
        f"torch {host['torch']}, {host['date']}:",
        "",
        "| model | workers | threads each | images / s | median ms | 95 % ms |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for fused in (True, False):
        for setting in settings(arguments.cores):
            lines.append(measured(setting, arguments, fused))
            print(lines[-1], flush=True)
    if arguments.write:
        text = PAGE.read_text()
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        PAGE.write_text(before + "\n" + "\n".join(lines) + "\n" + after)


if __name__ == "__main__":
    main()
