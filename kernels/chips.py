"""What a GPU offers its kernels. Asked of the device at the first launch on it, never at import."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chip:
    """One kind of GPU.

    Args:
        name: as the driver gives it; the key of its tuned table.
        backend: "cuda" (NVIDIA), "hip" (AMD), or "cpu" for Triton's interpreter.
        arch: compute capability as 10 · major + minor, or AMD's name such as "gfx942".
        shared_memory: bytes that one program may take.
        processors: number of multiprocessors (compute units).
    """

    name: str
    backend: str
    arch: int | str
    shared_memory: int
    processors: int

    @property
    def has_tma(self) -> bool:
        """Whether tiles can be copied by tensor descriptors."""
        return self.backend == "cuda" and int(self.arch) >= 90

    @property
    def warp_size(self) -> int:
        """Threads of a warp: 64 on AMD's CDNA alone (gfx9…); RDNA and gfx1250 run 32."""
        return 64 if str(self.arch).startswith("gfx9") else 32

    @property
    def multiplies_from_memory(self) -> bool:
        """Whether products take operands from shared memory or lanes to spare, so that sums may fill the registers.

        wgmma and tcgen05 do; consumer chips (12.x) are back at mma.sync; RDNA holds both in 256 registers.
        """
        if self.backend == "cuda":
            return 90 <= int(self.arch) < 120
        return not str(self.arch).startswith(("gfx11", "gfx120"))


# Those that are compiled for without having one (tests/test_aot.py), and the interpreter. Shared memory of NVIDIA's:
# what CUDA's cuda_occupancy.h lets a processor have (164, 228, 100 KiB), less 1 KiB that the driver takes per program.
KNOWN = {
    "sm_80": Chip("NVIDIA A100-SXM4-80GB", "cuda", 80, 166_912, 108),
    "sm_89": Chip("NVIDIA L4", "cuda", 89, 101_376, 58),
    "sm_90": Chip("NVIDIA H200", "cuda", 90, 232_448, 132),
    "sm_100": Chip("NVIDIA B200", "cuda", 100, 232_448, 148),
    "sm_103": Chip("NVIDIA B300 SXM6 AC", "cuda", 103, 232_448, 148),
    "sm_120": Chip("NVIDIA GeForce RTX 5090", "cuda", 120, 101_376, 170),
    "gfx942": Chip("AMD Instinct MI300X", "hip", "gfx942", 65_536, 304),
}
INTERPRETER = Chip("interpreter", "cpu", 0, 1 << 30, 4)

_pretended: Chip | None = None


def chip_of(device: torch.device) -> Chip:
    """The chip behind a tensor's device; CPU and meta tensors stand on the interpreter's, or the one pretended."""
    if device.type != "cuda":
        return _pretended or INTERPRETER
    return _ask(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _ask(index: int) -> Chip:
    from triton.runtime import driver

    with torch.cuda.device(index):
        target = driver.active.get_current_target()
        properties = driver.active.utils.get_device_properties(index)
    return Chip(
        name=torch.cuda.get_device_name(index),
        backend=target.backend,
        arch=target.arch,
        shared_memory=properties["max_shared_mem"],
        processors=properties["multiprocessor_count"],
    )


@contextmanager
def pretend(chip: Chip) -> Iterator[None]:
    """Take tensors that are on no GPU for tensors on ``chip``: to compile ahead of time, and in tests."""
    global _pretended
    before, _pretended = _pretended, chip
    try:
        yield
    finally:
        _pretended = before
