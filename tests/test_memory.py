"""What a fused model holds in memory: its weights and their packed copies, within the bounds of the documentation."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import fuse_memory
import pytest
import torch
from torch import Tensor, nn

import repavit_ops
from repavit_ops import backends
from repavit_ops.nn.packed_weights import PackedWeights

needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)


def bytes_held(model: nn.Module) -> int:
    """Of all parameters, buffers and packed copies, each memory block once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [m.packed_copy for m in model.modules() if isinstance(m, PackedWeights) and m.packed_copy is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@functools.cache
def made(name):
    return repavit_ops.create_model(name).eval()


@needs_cpp
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["repa_deit_tiny", "repa_swin_tiny", "vanilla_deit_tiny"])
def test_packed_copies_stay_within_bounds(name, dtype):
    merged = repavit_ops.reparameterize(made(name)).to(dtype)
    x = torch.zeros(1, 3, 224, 224, dtype=dtype)
    weights = bytes_held(merged)
    for keep_unpacked, bound in ((True, 2.1), (False, 1.15)):
        fused = repavit_ops.fuse(merged, keep_unpacked=keep_unpacked)
        fused(x)
        assert bytes_held(fused) <= bound * weights
        assert bytes_held(fused) > weights * (1.5 if keep_unpacked else 0.9)  # the copies are counted


@needs_cpp
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no high-water mark of memory to reset")
def test_fusing_in_place_holds_few_copies_at_a_time():
    """Of ViT-L, where a block is less of the whole, bench/fuse_memory.py finds 1.14."""
    weights, peak, after = fuse_memory.measured("vanilla_deit_base", {"inplace": True, "keep_unpacked": False})
    assert after <= peak <= 1.5 * weights


SCRATCH = """
import sys, torch, repavit_ops
torch.set_num_threads(2)
model = repavit_ops.fuse(repavit_ops.create_model(sys.argv[1]).eval())
before = torch.ops.repavit_ops.scratch_bytes()
with torch.no_grad():
    model(torch.zeros(4, 3, 224, 224))
print(before, torch.ops.repavit_ops.scratch_bytes(), repavit_ops.fusion_report(model).memory, sep=";")
"""


@needs_cpp
@pytest.mark.parametrize(("name", "elements"), [("repa_deit_tiny", 4 * 197 * 192), ("repa_swin_tiny", 4 * 3136 * 96)])
def test_scratch_is_less_than_the_activations_of_one_block(name, elements):
    """Between attention's and the FFN's products eager keeps x, z, q, k, v, o, y and z, H, y: ten of x's size."""
    run = subprocess.run([sys.executable, "-c", SCRATCH, name], capture_output=True, text=True, check=True)
    before, after, memory = run.stdout.strip().split(";")
    huge_pages = 4 * 2**21  # two arenas of two threads, each up to the next 2 MiB
    assert int(before) == 0
    assert 0 < int(after) <= 10 * elements * 4 + huge_pages
    assert f"scratch of all threads {int(after) / 2**20:.1f} MiB" in memory
