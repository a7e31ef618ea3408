"""What a fused model holds in memory: its weights and their packed copies, within the bounds of the documentation."""

from __future__ import annotations

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
    tensors += [m._packed for m in model.modules() if isinstance(m, PackedWeights) and m._packed is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@needs_cpp
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["repa_deit_tiny", "repa_swin_tiny", "vanilla_deit_tiny"])
def test_packed_copies_stay_within_bounds(name, dtype):
    merged = repavit_ops.reparameterize(repavit_ops.create_model(name).eval()).to(dtype)
    x = torch.zeros(1, 3, 224, 224, dtype=dtype)
    weights = bytes_held(merged)
    for keep_unpacked, bound in ((True, 2.1), (False, 1.15)):
        fused = repavit_ops.fuse(merged, keep_unpacked=keep_unpacked)
        fused(x)
        assert bytes_held(fused) <= bound * weights
        assert bytes_held(fused) > weights * (1.5 if keep_unpacked else 0.9)  # the copies are counted
