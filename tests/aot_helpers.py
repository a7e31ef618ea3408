"""What every kernel compiled ahead of time must show, chip by chip."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from repavit_ops.kernels.aot import Resources, compiling_for, resources
from repavit_ops.kernels.chips import KNOWN

EVERYTHING = os.environ.get("REPAVIT_AOT") == "all"  # `make aot`; otherwise one case per kernel and chip
CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942", *(("sm_103", "sm_120") if EVERYTHING else ()))

PRODUCTS = {
    **dict.fromkeys(("sm_80", "sm_89", "sm_120"), "mma.sync"),
    **{"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_103": "tcgen05.mma"},
}
NVIDIA = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")

every_chip = pytest.mark.parametrize("chip", CHIPS)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of which only shape, strides and dtype are looked at."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def compiled(chip: str, call: Callable[[], object], spills: int | None = 0) -> dict[str, Resources]:
    """Kernel name → resources of all that ``call`` launches on ``chip``, within its memory and ``spills``.

    None allows any: what the tuner merely tries may spill, which it will see in the time.
    """
    with compiling_for(KNOWN[chip]) as launches:
        call()
    found = {kernel.name: resources(kernel) for kernel in launches}
    for name, taken in found.items():
        assert taken.shared <= KNOWN[chip].shared_memory, f"{name}: {taken.shared} bytes of shared memory"
        assert spills is None or taken.spills <= spills, f"{name}: {taken.spills} spilled, {taken.registers} registers"
    return found


def assert_products(taken: Resources, chip: str, *, small: bool = False, none: bool = False) -> None:
    """The chip's matrix instructions and no others; mma.sync for ``small`` tiles (< 64 rows), ``none`` in ieee fp32."""
    wanted: Iterable[str] = () if none else ("mma.sync" if small else PRODUCTS.get(chip, ""),)
    if chip.startswith("gfx"):
        assert "v_mfma" in taken.code
        return
    assert [name for name in NVIDIA if name in taken.code] == list(wanted)
