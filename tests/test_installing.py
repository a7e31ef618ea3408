"""What pip makes of this package's extras beside a PyTorch that is there. Asks a package index: -m install."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = sorted(set(importlib.metadata.metadata("repavit-ops").get_all("Provides-Extra") or []))


def test_the_extras_are_those_of_the_readme():
    assert {"timm", "demo", "bench", "pretrained"} <= set(EXTRAS)
    assert "pip freeze | grep ^torch== > keep.txt" in (ROOT / "README.md").read_text()


@pytest.mark.install
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_keeps_the_torch_that_is_there(extra, tmp_path):
    """By the line of the README: the versions that pip would install, without installing them."""
    (tmp_path / "keep.txt").write_text(f"torch=={torch.__version__}\n")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-build-isolation", "--report", "-"]
    done = subprocess.run(
        [*command, "-c", tmp_path / "keep.txt", f"{ROOT}[{extra}]"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    names = [item["metadata"]["name"].lower() for item in report["install"]]
    assert "torch" not in names
    assert not [name for name in names if name.startswith("nvidia-")]
