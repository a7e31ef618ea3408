"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from model_helpers import TORCHVISION_STUB

# tests run on the kernels, whatever a table in the user's cache prefers
os.environ.setdefault("REPAVIT_TUNED", str(Path(__file__).with_name("no_tables")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip, and say so, where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def torchvision_stub() -> None:
    """Let torchvision import beside a PyTorch for CPUs, without its compiled operators."""
    sys.modules.setdefault(TORCHVISION_STUB, types.ModuleType(TORCHVISION_STUB))


@pytest.fixture(scope="session")
def timm(torchvision_stub: None) -> types.ModuleType:
    """timm with a torchvision that imports without its compiled operators; skips where timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install timm")
    return importlib.import_module("timm")


@pytest.fixture
def float64_default():
    """float64 for every tensor that does not ask for another dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
