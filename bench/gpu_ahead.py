"""Compiles side by side, in the first seconds, what the headline will run: ``python bench/gpu_ahead.py``.

Two kinds of jobs, a process each, ``--processes`` of them at a time:

    kernels    our Triton kernels of a fused model at a batch: one block of each kind, on tensors without numbers, with
               the chip pretended (kernels/aot.py); they land in Triton's cache on disk under the keys of real launches
    compile    torch.compile of a merged or vanilla model, called once on the GPU; lands in Inductor's cache on disk

Whoever runs them later in another process only reads. A cache made elsewhere would not do: Triton's keys are the same
in another checkout, but each entry names its files by absolute paths (findings/triton_cache_paths.sh).
A JSON line per finished job goes to ``--log``; a job that fails says why, and is compiled again where it is needed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

PROCESSES = 14
SHORT = {"vit": {"depth": 1}, "swin": {"depths": (2, 2, 2, 2)}}  # every kind of block once


@dataclass(frozen=True)
class Job:
    """One thing to compile: "kernels" or "compile", of a model in a form at a batch."""

    kind: str
    name: str
    form: str
    batch: int


def jobs(small: bool = False) -> Iterator[Job]:
    """In the order in which they are needed."""
    from gpu_models import HEADLINE, HEADLINE_BATCHES

    names, batches = (("deit_tiny",), (1,)) if small else (HEADLINE, HEADLINE_BATCHES)
    for form in ("fused", "vanilla_fused"):
        yield from (Job("kernels", name, form, batch) for batch in batches for name in names)
    for form in ("merged", "vanilla"):
        yield from (Job("compile", name, form, batch) for batch in batches for name in names)


def run(job: Job, device: str, chip: str, small: bool) -> dict[str, object]:
    """Do one job in this process; what its line of the log says."""
    began = time.perf_counter()
    work = _kernels if job.kind == "kernels" else _compile
    found = work(job, device, chip, small)
    return {**asdict(job), **found, "seconds": round(time.perf_counter() - began, 1)}


def _kernels(job: Job, device: str, chip: str, small: bool) -> dict[str, object]:
    import torch
    from gpu_ledger import Launching
    from gpu_models import TINY, on_meta

    from repavit_ops.kernels.aot import compiling_for
    from repavit_ops.kernels.chips import KNOWN

    options = TINY if small else SHORT["swin" if "swin" in job.name else "vit"]
    model, images = on_meta(job.name, job.form, job.batch, **options)
    with torch.no_grad(), compiling_for(KNOWN[chip]) as launches, Launching():
        model(images)
    return {"kernels": len({id(kernel) for kernel in launches})}


def _compile(job: Job, device: str, chip: str, small: bool) -> dict[str, object]:
    import torch
    from gpu_models import MODES, TINY, form_of

    options = TINY if small else {}
    side = options.get("img_size", 224)
    with torch.device(device):
        model = form_of(job.name, job.form, **options)
        images = torch.randn(job.batch, 3, side, side).to(torch.bfloat16)
    with torch.no_grad():
        torch.compile(model, mode=MODES["compile"], dynamic=False)(images)  # as gpu_cases.compiled does
    if device == "cuda":
        torch.cuda.synchronize()
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--log", type=Path, help="JSON lines, one per finished job")
    parser.add_argument("--chip", default="sm_90", help="of the kernels; H100 and H200 are one")
    parser.add_argument("--device", default="cuda", help="where torch.compile runs")
    parser.add_argument("--kind", choices=("kernels", "compile"), action="append", help="default: both")
    parser.add_argument("--small", action="store_true", help="one tiny model")
    options = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes are side by side already
    wanted = [job for job in jobs(options.small) if not options.kind or job.kind in options.kind]
    began = time.perf_counter()
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        pending = {pool.submit(run, job, options.device, options.chip, options.small): job for job in wanted}
        for future in as_completed(pending):
            error = future.exception()
            failed = {**asdict(pending[future]), "error": f"{type(error).__name__}: {str(error)[:200]}"}
            line = json.dumps({**(failed if error else future.result()), "at": round(time.perf_counter() - began, 1)})
            print(line, flush=True)
            if options.log:
                with options.log.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
