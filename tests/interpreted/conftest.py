"""Kernels on the CPU, in Triton's interpreter: in processes that tests/test_triton_interpreter.py starts."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
