"""Which backends there are, whether each can be used here, and if not, why not.

Nothing is asked of the hardware at import: the C++ library looks at the CPU at its first call, Triton at a GPU when a
CUDA tensor arrives.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import torch
import torch.autograd.forward_ad as forward_ad

Backend = Literal["auto", "reference", "cpp", "triton", "pytorch"]
# "pytorch" is not for asking: it is what "auto" becomes where PyTorch's own form is the faster one (cpu_tuning.py)
BACKENDS = tuple(name for name in get_args(Backend) if name != "pytorch")

KERNELS_OF = {"cpu": "cpp", "cuda": "triton"}  # device type → backend that "auto" takes

CPU_ISA = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")  # level → name, as csrc/cpu/dispatch.h counts them
REBUILD = (
    "install a C++17 compiler and run: pip install -v --force-reinstall --no-deps . (or take a wheel that has them)"
)

_cpp_failure: str | None = "not loaded yet"


def load_cpp() -> None:
    """Load the C++ kernels once; on failure keep the reason for :func:`why_unavailable`."""
    global _cpp_failure
    library = Path(__file__).with_name("_C.so")
    if not library.exists():
        _cpp_failure = f"the C++ kernels were not built: {REBUILD}"
        return
    try:
        torch.ops.load_library(str(library))
        _cpp_failure = None
    except (OSError, RuntimeError) as error:
        _cpp_failure = f"{library.name} does not load with torch {torch.__version__}: {error}; rebuild: {REBUILD}"


def why_unavailable(backend: str) -> str | None:
    """None if the backend can be used on this machine, else the reason in one line."""
    if backend in ("auto", "reference"):
        return None
    if backend == "cpp":
        return _cpp_failure
    if backend == "triton":
        return _triton_failure()
    raise ValueError(f"backend: got {backend!r}, wanted one of {', '.join(BACKENDS)}")


def has_cpu_kernel(operator: str) -> bool:
    """Whether the loaded C++ library serves this operator."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"repavit_ops::{operator}", "CPU")


def _triton_failure() -> str | None:
    if not _triton_installed():
        return "triton is not installed: pip install triton (Linux only)"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return None


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_triton_kernel(operator: str) -> bool:
    """Whether CUDA tensors of this operator go to a Triton kernel."""
    return _triton_installed() and operator in _kernels().OPERATORS


def triton_launcher(operator: str) -> Callable[..., torch.Tensor]:
    """The Triton launcher of an operator, imported at its first call."""
    return _kernels().launcher(operator)


def _kernels() -> ModuleType:
    return importlib.import_module(".kernels", __package__)  # the top-level folder, mapped to this name


AMX_REFUSALS = (
    None,
    "the system does not let this process use AMX: bfloat16 runs at level avx512_bf16",
    "AMX's first product came out wrong: bfloat16 runs at level avx512_bf16; please report this processor",
    "these kernels were built without AMX, which this processor has: bfloat16 runs at level avx512_bf16; build them "
    "with GCC 12 or later and binutils 2.35 or later",
)


def amx_refusal() -> str | None:
    """Why the kernels do not use the AMX that this processor has, in one line; None where there is nothing to say."""
    return AMX_REFUSALS[torch.ops.repavit_ops.amx_refusal()]


@functools.cache
def cpu_level() -> str:
    """:func:`cpu_isa` without its warning and its check; for whoever knows that the kernels are there."""
    return CPU_ISA[torch.ops.repavit_ops.cpu_isa()]


@functools.cache
def cpu_model() -> str:
    """The CPU's name as the system gives it, with its generation where that is known; else the architecture.

    Virtual machines often give a name without a generation.
    """
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text(errors="replace").split("\n\n", 1)[0] if cpuinfo.exists() else ""
    fields = {key.lower(): value for key, value in re.findall(r"^(.+?)[ \t]*:[ \t]*(\S.*)$", first, re.MULTILINE)}
    names = [fields[key] for key in ("model name", "hardware", "cpu model") if key in fields]
    name = names[0] if names else platform.processor() or platform.machine()
    if "cpu family" not in fields or "model" not in fields:
        return name
    return f"{name} (family {fields['cpu family']}, model {fields['model']})"


def cpu_isa() -> str:
    """Instruction-set level that the C++ kernels run at on this machine (asks the CPU at the first call).

    Warns where the processor has AMX and the kernels cannot use it.
    """
    if _cpp_failure is not None:
        raise RuntimeError(f"backend 'cpp' is not available: {_cpp_failure}")
    level = cpu_level()
    if refusal := amx_refusal():
        warnings.warn(refusal, stacklevel=2)
    return level


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, which the C library keeps for later otherwise."""
    if _cpp_failure is None:
        torch.ops.repavit_ops.release_freed_memory()


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is going on (``torch.func.jvp``, ``forward_ad.dual_level``).

    Kernels would lose its tangents without a word, so the reference takes their place meanwhile.
    """
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is going on: ``vmap``, ``grad``, ``jacrev``, … .

    Its tensors have no memory of their own, so nothing can be packed, kept or handed to a kernel; the operators take
    themselves apart into PyTorch's (:mod:`repavit_ops.library`).
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def exports_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` is tracing, in either form: ONNX has no kernels, so formulas take their places."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


def wants_formula(backend: str) -> bool:
    """Whether a functional form runs in plain PyTorch: it was asked to, or what is going on knows no kernels."""
    return backend in ("reference", "pytorch") or in_forward_mode() or exports_to_onnx()


def has_autocast(device_type: str) -> bool:
    """Whether autocast knows this kind of device. Not asked where it is known: Dynamo of torch 2.11 would stop."""
    return device_type in KERNELS_OF or torch.amp.is_autocast_available(device_type)


def select(backend: str, x: torch.Tensor, operator: str) -> None:
    """Check that ``backend`` may run ``operator`` on x: "auto" warns once where it falls back, a forced one raises.

    Raises:
        ValueError: an unknown backend, or one for another kind of device or dtype.
        RuntimeError: the forced backend is not available here; the message says why.
    """
    if torch.compiler.is_compiling():
        return
    kind = x.device.type
    if backend == "auto":
        warn_without_kernels(kind)
        return
    reason = why_unavailable(backend)
    if KERNELS_OF.get(kind) != backend:
        wanted = next(kind for kind, name in KERNELS_OF.items() if name == backend)
        raise ValueError(f"backend: {backend!r} runs on {wanted} tensors, got x on {x.device}; use backend='auto'")
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    if backend == "triton":
        if not has_triton_kernel(operator):
            raise RuntimeError(f"backend 'triton' has no kernel for {operator}; use backend='auto'")
        if x.dtype == torch.float64:
            raise ValueError("x: got float64, which backend='triton' does not compute; use backend='auto' or a cast")


def warn_without_kernels(device_type: str) -> None:
    """Say once in a process that a device's kernels are missing, why, and how to get them."""
    kernels = KERNELS_OF.get(device_type)
    if kernels is not None and (reason := why_unavailable(kernels)) is not None:
        _warn_once(kernels, reason)


@functools.cache
def _warn_once(backend: str, reason: str) -> None:
    warnings.warn(f"repavit_ops runs in plain PyTorch: backend {backend!r}: {reason}", RuntimeWarning, stacklevel=5)
