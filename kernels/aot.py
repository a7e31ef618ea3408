"""Ahead-of-time compilation: what a launcher would launch on a chip, compiled for it without having one.

    with compiling_for(KNOWN["sm_90"]) as launches:
        linear(x, weight)                # tensors on device "meta": only shapes, strides and dtypes matter
    resources(launches[0]).spills

Every launch inside is compiled exactly as on the chip itself (same specialisation, same tile, same entry of Triton's
disk cache) and recorded instead of run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .chips import Chip, pretend


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Args:
        registers: per thread.  spills: bytes per thread (NVIDIA) or registers (AMD) that did not fit.
        shared: bytes per program.  code: PTX (NVIDIA) or assembly (AMD).
    """

    registers: int
    spills: int
    shared: int
    code: str


class _Pretended(DriverBase):
    """Stands in for the driver of a chip that is not here; compiles, but cannot run."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.chip.backend, self.chip.arch, self.chip.warp_size)

    def get_current_device(self) -> str:  # the key of Triton's cache in memory: one per chip
        return f"pretended {self.chip.name}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        return "meta"

    def get_benchmarker(self) -> Any:
        raise RuntimeError(f"{self.chip.name} is not here")


@contextmanager
def compiling_for(chip: Chip) -> Iterator[list[Any]]:
    """Compile every launch for ``chip`` instead of running it; yields the list of the compiled kernels."""
    launches: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    before = driver._active
    driver.set_active(_Pretended(chip))
    try:
        with pretend(chip), mock.patch.object(JITFunction, "run", compile_only):
            yield launches
    finally:
        driver._active = before


def spills(chip: Chip, call: Callable[[], object]) -> int:
    """The most that a kernel launched by ``call``, on meta tensors, spills on ``chip``; the interpreter never does."""
    if chip.backend == "cpu":
        return 0
    with compiling_for(chip) as launches:
        call()
    return max((resources(kernel).spills for kernel in launches), default=0)


def resources(kernel: Any) -> Resources:
    """Registers, spills, shared memory and code of a compiled kernel (NVIDIA's by the cuobjdump that Triton ships)."""
    shared = kernel.metadata.shared
    if "cubin" not in kernel.asm:
        code = kernel.asm["amdgcn"]
        return Resources(
            _number(r"\.vgpr_count:\s*(\d+)", code), _number(r"\.vgpr_spill_count:\s*(\d+)", code), shared, code
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spills = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    return Resources(_number(r"REG:(\d+)", usage), spills, shared, kernel.asm["ptx"])


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in the compiler's output"
    return int(found[1])
