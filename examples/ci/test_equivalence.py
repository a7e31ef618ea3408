"""Tests for your own CI: is what you deploy still what you trained?

    pytest examples/ci --repavit-json equivalence.json --junit-xml equivalence.xml

Take ``reference`` from your checkpoint (``repavit_ops.load_checkpoint``, timm, transformers) and images from your data.
"""

from __future__ import annotations

import pytest
import torch

import repavit_ops


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """The model as it was trained; here small and with random weights."""
    torch.manual_seed(0)
    return repavit_ops.create_model("repa_deit_tiny", idle_ratio=0.75, img_size=64, depth=3).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_merged(reference, images, repavit_equivalence):
    report = repavit_equivalence(reference, repavit_ops.reparameterize(reference), images)
    assert report.output.top1 == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fused(reference, images, dtype, repavit_equivalence):
    fused = repavit_ops.fuse(reference, dtype=dtype)
    repavit_equivalence(reference, fused, images, name="fused")


def test_written_and_read(reference, images, repavit_equivalence, tmp_path):
    deployed = repavit_ops.reparameterize(reference)
    repavit_ops.save_checkpoint(deployed, tmp_path / "deployed.safetensors")
    repavit_equivalence(reference, repavit_ops.load_checkpoint(tmp_path / "deployed.safetensors"), images)
