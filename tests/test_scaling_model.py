"""The model of many machines names what bounds it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scaling_model import Cluster, limits

AMPLE = Cluster(
    gpu_rate=100.0, decode_ms=0.1, memory_gbs=1e6, pcie_gbs=1e6, network_gbs=1e6, files_gbs=1e6, writer_rows=1e9
)


@pytest.mark.parametrize(
    ("scarce", "bound", "rate"),
    [
        ({}, "model", 8 * 100 * 0.92),
        ({"cores": 2, "decode_ms": 4.0}, "decoding", 500.0),
        ({"memory_gbs": 3 * 224**2 * 40 / 1e9}, "copies", 10.0),
        ({"pcie_gbs": 3 * 224**2 / 1e9}, "PCIe", 8.0),
        ({"network_gbs": (110e3 + 3 * 224**2) / 1e9, "pixels_travel": 1.0}, "network", 1.0),
        ({"files_gbs": 110e3 / 1e9, "machines": 4}, "files", 1.0),
        ({"writer_rows": 5.0, "machines": 4, "writers": 3}, "writing", 15.0),
    ],
)
def test_what_is_scarce_bounds(scarce, bound, rate):
    found = limits(replace(AMPLE, **scarce))
    assert min(found, key=found.__getitem__) == bound
    assert found[bound] == pytest.approx(rate)
