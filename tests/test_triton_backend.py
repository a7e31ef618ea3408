"""Triton as the CUDA implementation, as far as it shows without a GPU: registered, lazy, never replaced in silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from op_helpers import cast
from test_partial_gelu_ffn import operands

from repavit_ops import backends, kernels, library, ops

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


@pytest.mark.parametrize("operator", [operator.name for operator in library.OPERATORS])
def test_every_operator_has_a_cuda_implementation(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"repavit_ops::{operator}", "CUDA")


def test_every_launcher_exists_and_belongs_to_an_operator():
    assert set(kernels.OPERATORS) <= {operator.name for operator in library.OPERATORS}
    for operator in kernels.OPERATORS:
        assert callable(backends.triton_launcher(operator))


def test_cuda_implementation_without_a_kernel_is_the_reference(monkeypatch):
    """Past the dispatcher: an operator without a launcher, and float64 with one."""
    operator = next(o for o in library.OPERATORS if o.name == "partial_gelu_ffn")
    tensors = operands(3, 8, 5)
    torch.testing.assert_close(library._triton(operator)(*tensors, None), operator.reference(*tensors))
    monkeypatch.setattr(backends, "has_triton_kernel", lambda name: False)
    single = cast(tensors, torch.float32)
    torch.testing.assert_close(library._triton(operator)(*single, None), operator.reference(*single))


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
