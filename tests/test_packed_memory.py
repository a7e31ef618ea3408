"""Packed models are mapped: nothing is copied or packed at start, pages stay shared, every CPU reads the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import Recorder, images, tiny_swin, tiny_vit
from packed_helpers import first_output, fused_and_saved, needs_kernels

import repavit_ops
from repavit_ops import backends
from repavit_ops.nn.packed_weights import PackedWeights

pytestmark = needs_kernels


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path):
    return fused_and_saved(path)


def test_loading_folds_packs_and_copies_nothing(saved):
    _, path = saved
    with Recorder() as recorder:  # with gradients on: no weight asks for one
        loaded = repavit_ops.load_packed(path)
        loaded(images())
    assert not [call for call in recorder.calls if call.endswith("pack")]
    assert not [call for call in recorder.calls if call in ("aten::clone", "aten::copy_")]
    assert "repavit_ops::fused_blocks" in recorder.calls


def pages_of(path):
    """Kilobytes of the map of a file by what Linux says of them."""
    found, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.endswith(" kB"):
            name, amount, _ = line.split()
            found[name] = found.get(name, 0) + int(amount)
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the maps of a process are Linux's to tell")
def test_no_page_of_the_file_becomes_private_and_none_is_written_back(saved):
    _, path = saved
    before = path.read_bytes()
    loaded = repavit_ops.load_packed(path)
    first_output(loaded, images())
    pages = pages_of(path)
    assert pages["Rss:"] >= 200
    assert pages["Private_Dirty:"] == pages["Anonymous:"] == 0
    with torch.no_grad():
        loaded.head.bias.add_(1)
    assert pages_of(path)["Private_Dirty:"] > 0
    assert path.read_bytes() == before


PACK = """
import sys, torch, repavit_ops
from model_helpers import tiny_vit
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    fused = repavit_ops.fuse(tiny_vit(), dtype=dtype, keep_unpacked=False)
    for module in fused.modules():
        if isinstance(module, repavit_ops.nn.packed_weights.PackedWeights):
            sys.stdout.buffer.write(module.packed_copy.numpy().tobytes())
"""


def test_every_level_packs_alike_so_that_a_file_serves_all():
    levels = backends.CPU_ISA[: backends.CPU_ISA.index(backends.cpu_isa()) + 1]
    packed = {}
    for level in (levels[0], levels[-1]):
        environment = {**os.environ, "REPAVIT_CPU_ISA": level, "PYTHONPATH": str(Path(__file__).parent)}
        packed[level] = subprocess.run(
            [sys.executable, "-c", PACK], capture_output=True, check=True, timeout=300, env=environment
        ).stdout
    assert len(packed[levels[0]]) > 100_000
    assert packed[levels[0]] == packed[levels[-1]]


def test_a_module_says_what_an_input_of_nothing_is():
    for model in (repavit_ops.fuse(tiny_vit()), repavit_ops.fuse(tiny_swin())):
        for module in model.modules():
            if isinstance(module, PackedWeights):
                module.require_packed()
