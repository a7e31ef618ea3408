"""Triton as the CUDA implementation, as far as it shows without a GPU: registered, lazy, never replaced in silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from model_helpers import Recorder
from op_helpers import cast
from test_partial_gelu_ffn import operands

import repavit_ops
from repavit_ops import backends, kernels, library, ops, reference

pytest.importorskip("triton", reason="triton is not installed")

LAZY = """
import sys, repavit_ops, repavit_ops.kernels
repavit_ops.ops
loaded = [name for name in sys.modules if name.startswith("repavit_ops.kernels.")]
import torch
assert not torch.cuda.is_initialized()
print(loaded)
"""


def test_import_loads_no_kernel_and_asks_no_device():
    run = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


NAMES = [*(operator.name for operator in library.OPERATORS), "fused_blocks"]


@pytest.mark.parametrize("operator", NAMES)
def test_every_operator_has_a_cuda_implementation(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"repavit_ops::{operator}", "CUDA")


def test_every_operator_has_a_launcher():
    assert set(kernels.OPERATORS) == set(NAMES)
    for operator in kernels.OPERATORS:
        assert callable(backends.triton_launcher(operator))


def test_cuda_implementation_without_a_kernel_is_the_reference(monkeypatch):
    """Past the dispatcher: an operator without a launcher, and float64 with one."""
    formula = reference.partial_gelu_ffn
    on_cuda = library._triton("partial_gelu_ffn", formula, 6)
    tensors = operands(3, 8, 5)
    torch.testing.assert_close(on_cuda(*tensors, None), formula(*tensors))
    monkeypatch.setattr(backends, "has_triton_kernel", lambda name: False)
    single = cast(tensors, torch.float32)
    torch.testing.assert_close(on_cuda(*single, None), formula(*single))


def test_forced_triton_raises_rather_than_compute_elsewhere(monkeypatch):
    tensors = cast(operands(3, 8, 5), torch.float32)
    with pytest.raises(ValueError, match="runs on cuda tensors"):
        ops.partial_gelu_ffn(*tensors, backend="triton")
    monkeypatch.setattr(backends, "KERNELS_OF", {"cpu": "triton"})
    monkeypatch.setattr(backends, "why_unavailable", lambda backend: None)
    with pytest.raises(ValueError, match="float64"):
        ops.partial_gelu_ffn(*operands(3, 8, 5), backend="triton")
    monkeypatch.setattr(backends, "has_triton_kernel", lambda name: False)
    with pytest.raises(RuntimeError, match="no kernel for partial_gelu_ffn"):
        ops.partial_gelu_ffn(*tensors, backend="triton")


def test_a_stack_on_another_device_is_called_block_by_block():
    """One call is the CPU's; a model moved elsewhere must not reach it, and its report says so."""
    model = repavit_ops.create_model("repa_deit_tiny", depth=2, num_classes=0).eval()
    fused = repavit_ops.fuse(model).to("meta")
    entries = repavit_ops.fusion_report(fused).with_status("apart")
    assert [entry.name for entry in entries] == ["VisionTransformer", "blocks"]
    assert all("every sub-block is called by itself" in entry.note for entry in entries)
    with torch.no_grad(), Recorder() as recorder:
        fused(torch.empty(1, 3, 224, 224, device="meta"))
    calls = recorder.calls
    assert "repavit_ops::fused_blocks" not in calls
    assert calls.count("repavit_ops::rep_attention") == calls.count("repavit_ops::partial_gelu_ffn") == 2
