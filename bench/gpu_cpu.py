"""The GPU machine's own cores: fused beside eager at 1 to 16 threads, where nobody has seen ours beyond two."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_models import TINY, create

import repavit_ops
from repavit_ops import backends
from repavit_ops.benchmarking.harness import check, interleave, machine

THREADS = (16, 8, 4, 2, 1)
MODELS = ("deit_small", "deit_base")  # DeiT-B is ViT-B
DTYPES = (torch.float32, torch.bfloat16)
BATCHES = (1, 16)
ROUNDS = 3
OPERATOR_TESTS = ("partial_gelu_ffn", "rep_attention", "window_rep_attention", "patch_projection", "fused_blocks")


@dataclass(frozen=True)
class CpuCase:
    """One model in one dtype at a batch, by so many threads."""

    model: str
    dtype: torch.dtype
    batch: int
    threads: int

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model} {dtype} batch {self.batch} threads {self.threads}"


def cases(small: bool = False) -> list[CpuCase]:
    """Most threads first: what a cut leaves out is what is known from two."""
    if small:
        return [CpuCase("deit_tiny", dtype, 1, 1) for dtype in DTYPES]
    cores = os.cpu_count() or 1
    threads = [n for n in THREADS if n <= cores]
    order = [(n, b, m) for n in threads for b in BATCHES for m in MODELS if b == 1 or n >= 4 or m == MODELS[0]]
    return [CpuCase(m, dtype, b, n) for n, b, m in order for dtype in DTYPES]


def lscpu() -> dict[str, Any]:
    """What the processor is and can do, nothing that names the machine."""
    text = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.pop("Flags", "").split())
    wanted = ("Model name", "CPU family", "Model", "Stepping", "CPU(s)", "Thread(s) per core", "Core(s) per socket")
    kept = {
        key: fields[key]
        for key in (*wanted, "Socket(s)", "NUMA node(s)", "L1d cache", "L2 cache", "L3 cache")
        if key in fields
    }
    vectors = sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma", "f16c")))
    return {"lscpu": kept, "flags": vectors, "isa": machine()["isa"], "amx": any("amx" in flag for flag in flags)}


def measure(small: bool, end: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, what its row says) of every case, until the time is up; a model is made once."""
    made: dict[tuple[str, torch.dtype], Any] = {}
    for case in cases(small):
        if time.time() > end:
            return
        torch.set_num_threads(case.threads)
        key = (case.model, case.dtype)
        if key not in made:
            made[key] = _forms(case.model, case.dtype, small)
        fused, eager, side = made[key]
        images = torch.randn(case.batch, 3, side, side, dtype=case.dtype)
        times = interleave({"repavit_ops": partial(fused, images), "eager": partial(eager, images)}, 0.0, ROUNDS)
        seconds = {name: [t.p20, t.p50, t.p80] for name, t in times.items()}
        yield case.name, {"seconds": seconds, "threads": case.threads, "images": case.batch}


def _forms(name: str, dtype: torch.dtype, small: bool) -> tuple[Any, Any, int]:
    """Fused and merged eager, compared with float64 on one image, and the image's side."""
    options = TINY if small else {}
    torch.manual_seed(0)
    trained = create(name, **options)
    fused, merged = repavit_ops.fuse(trained, dtype=dtype), repavit_ops.reparameterize(trained)
    side = options.get("img_size", 224)
    image = torch.randn(1, 3, side, side).to(dtype)
    truth = merged.double()(image.double())
    eager = merged.to(dtype)
    check(name, fused(image), eager(image), truth)
    return fused, eager, side


def amx_tests(end: float) -> dict[str, Any] | None:
    """The operators' tests at the AMX level, where the library has one and this processor too; else None."""
    level = next((name for name in backends.CPU_ISA if "amx" in name), None)
    if level is None or machine()["isa"] != level:
        return None
    files = [f"tests/test_{name}.py" for name in OPERATOR_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    left = max(5.0, end - time.time())
    try:
        run = subprocess.run(
            command, env=os.environ | {"REPAVIT_CPU_ISA": level}, capture_output=True, text=True, timeout=left
        )
    except subprocess.TimeoutExpired:
        return {"level": level, "tests": f"not finished in {left:.0f} s"}
    return {"level": level, "tests": run.stdout.strip().splitlines()[-1]}
