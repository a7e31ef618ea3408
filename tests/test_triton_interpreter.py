"""Runs tests/interpreted, one file per process with TRITON_INTERPRET=1: masks and tails of every kernel, without a GPU.

The interpreter replaces triton.jit for a whole process, and knows fp32 and fp16 only (its bf16 products are garbage).
By hand: ``TRITON_INTERPRET=1 pytest tests/interpreted``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def release(module):
    return tuple(map(int, module.__version__.split(".")[:2]))


triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    release(triton) < (3, 7) and release(np) >= (2, 4),
    reason="the interpreter of Triton before 3.7 does not run with NumPy 2.4 and later: pip install 'numpy<2.4'",
)

FOLDER = Path(__file__).with_name("interpreted")


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_interpreted(file):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
