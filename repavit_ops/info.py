"""What this installation consists of: versions, the CPU level and GPU in use, each backend or why it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from . import backends, cpu_tuning, library  # noqa: F401 - library loads the C++ kernels, if there are any
from .version import __version__

EXTRAS = {  # optional package → what needs it
    "timm": "timm model names and training script",
    "sklearn": "the demo's digits",
    "matplotlib": "plots",
    "onnx": "ONNX export",
    "pyarrow": "repavit-ops predict",
    "onnxruntime": "benchmark peer",
    "openvino": "benchmark peer",
}
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # import name → name on PyPI, where they differ


def collect() -> dict[str, Any]:
    """Everything that ``repavit-ops info`` shows, as JSON values. Asks the CPU and the GPU; nothing is cached."""
    return {
        "repavit_ops": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": installed_version("triton"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu(),
        "gpu": gpus(),
        "backends": {name: backends.why_unavailable(name) for name in backends.BACKENDS if name != "auto"},
        "extras": {name: installed_version(DISTRIBUTIONS.get(name, name)) for name in EXTRAS},
    }


def cpu() -> dict[str, Any]:
    """Model name, instruction-set level of our kernels (None: not available) and of torch's, threads of torch.

    And how the table of ``repavit-ops tune --cpu`` stands, and why the processor's AMX is not used, if so.
    """
    here = backends.why_unavailable("cpp") is None
    return {
        "model": backends.cpu_model(),
        "isa": backends.cpu_isa() if here else None,
        "amx_refusal": backends.amx_refusal() if here else None,
        "table": cpu_tuning.state() if here else None,
        "isa_requested": os.environ.get("REPAVIT_CPU_ISA"),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, capability, memory in GiB of each CUDA (or ROCm) device that torch sees; whether its tiles were tuned."""
    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [
        {
            "name": d.name,
            "capability": f"{d.major}.{d.minor}",
            "memory_gib": round(d.total_memory / 2**30, 1),
            "tuned": has_table(d.name),
        }
        for d in devices
    ]


def has_table(gpu: str) -> bool:
    """Whether there is a table of tiles for a GPU of this name (``repavit-ops tune``); else a rule of thumb holds."""
    if installed_version("triton") is None:
        return False
    from .kernels import tuning

    return any(tuning.table_path(gpu, folder).exists() for folder in tuning.folders())


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    """The collected information as (what, how it stands) lines for people."""
    processor, graphics = info["cpu"], info["gpu"]
    level = processor["isa"] or "no kernels"
    if processor["isa_requested"]:
        level += f" (REPAVIT_CPU_ISA={processor['isa_requested']})"
    lines = [
        ("repavit_ops", info["repavit_ops"]),
        ("python", f"{info['python']}, {info['platform']}"),
        ("torch", info["torch"]),
        ("triton", info["triton"] or "not installed"),
        ("cpu", processor["model"]),
        ("cpu level", f"{level}; torch uses {processor['torch_isa']}"),
        ("threads", str(processor["threads"])),
    ]
    if processor["table"] is not None:
        lines.append(("cpu table", processor["table"]))
    if processor["amx_refusal"] is not None:
        left = f"PyTorch's own form until {cpu_tuning.COMMAND} has measured it"
        lines.append(("bfloat16", f"{left}: {processor['amx_refusal']}"))
    for g in graphics:
        tiles = "tuned tiles" if g["tuned"] else "tiles by rule of thumb: repavit-ops tune NAME..."
        lines.append(("gpu", f"{g['name']}, sm {g['capability']}, {g['memory_gib']} GiB, {tiles}"))
    if not graphics:
        lines.append(("gpu", "none"))
    lines += [(f"backend {name}", reason or "available") for name, reason in info["backends"].items()]
    for name, version in info["extras"].items():
        missing = f"not installed ({EXTRAS[name]}): pip install {DISTRIBUTIONS.get(name, name)}"
        lines.append((f"extra {name}", version or missing))
    return lines
