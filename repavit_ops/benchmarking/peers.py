"""Other runtimes as entries: what each needs, how to get it, why it is not here, and how it takes a module over."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import backends
from . import phones, runtimes
from .runtimes import Call

TORCH = torch.__version__.partition("+")[0]
EXTRA = "pip install 'repavit-ops[bench]'"
KEEP = (
    "pip freeze | grep ^torch== > keep.txt && pip install -c keep.txt"  # what follows, beside the torch that is there
)


class Subject:
    """A plain module in float32 with its input in the dtype to measure, and what several peers make of the two."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x

    @functools.cached_property
    def cast(self) -> nn.Module:
        """The module in the input's dtype."""
        if all(p.dtype == self.x.dtype for p in self.module.parameters()):
            return self.module
        return copy.deepcopy(self.module).to(self.x.dtype)

    @functools.cached_property
    def onnx(self) -> bytes:
        """The module in ONNX, in float32."""
        return runtimes.onnx_bytes(self.module, self.x.float())


@dataclass(frozen=True)
class Peer:
    """Another runtime.

    name: in options and results. get: the command that gets it. modules: what it imports. dtypes: what it computes in.
    build: its call for a subject. slow: preparing one model takes minutes. program: reason why a program that it
    starts is missing, or None.
    """

    name: str
    get: str
    modules: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    build: Callable[[Subject], Call | None]
    slow: bool = False
    program: Callable[[], str | None] = lambda: None

    def why_unavailable(self, dtype: torch.dtype) -> str | None:
        """Why this machine cannot run it in ``dtype``, with the command that helps; None where it can."""
        missing = [module for module in self.modules if not _installed(module)]
        if missing:
            return f"{', '.join(missing)} not installed: {self.get}"
        if (reason := self.program()) is not None:
            return f"{reason}: {self.get}"
        if dtype not in self.dtypes:
            return f"does not compute in {str(dtype).removeprefix('torch.')} on a CPU"
        return None

    def call(self, subject: Subject) -> Call:
        """The subject in this runtime."""
        call = self.build(subject)
        assert call is not None, self.name
        return call


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is a part of
        return False


def _no_avx512() -> str | None:
    level = backends.cpu_isa() if backends.why_unavailable("cpp") is None else "unknown"
    if level.startswith(("avx512", "amx")):
        return None
    return f"its kernels need AVX-512 (here: {level}), it is torch.compile without"


def _no_compiler() -> str | None:
    known = (os.environ.get("CXX"), "g++", "clang++")
    return None if any(name and shutil.which(name) for name in known) else "no C++ compiler, which inductor needs"


ALL = (torch.float32, torch.bfloat16, torch.float16)
ONNX = ("onnx", "onnxscript")

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "openvino",
            EXTRA,
            (*ONNX, "openvino"),
            ALL,
            lambda subject: runtimes.openvino(subject.onnx, subject.x, subject.x.dtype),
        ),
        Peer(
            "onnxruntime",
            EXTRA,
            (*ONNX, "onnxruntime"),
            ALL[:1],
            lambda subject: runtimes.onnx_runtime(subject.onnx, subject.x),
        ),
        Peer(
            "litert",
            f"{KEEP} litert-torch",
            ("litert_torch", "ai_edge_litert"),
            ALL[:1],
            lambda subject: phones.litert(subject.module, subject.x),
        ),
        Peer(
            "executorch",
            f"{KEEP} executorch",
            ("executorch",),
            ALL[:1],
            lambda subject: phones.executorch(subject.module, subject.x),
        ),
        Peer(
            "ncnn",
            "pip install ncnn pnnx",
            ("ncnn", "pnnx"),
            ALL[:1],
            lambda subject: phones.ncnn(subject.module, subject.x),
        ),
        Peer(
            "iree",
            f"{KEEP} iree-base-compiler iree-base-runtime iree-turbine",
            ("iree.compiler", "iree.runtime", "iree.turbine"),
            ALL[:1],
            lambda subject: runtimes.iree(subject.module, subject.x),
        ),
        Peer(
            "zentorch",
            f"{KEEP} deprecated 'zentorch=={TORCH}.*'",
            ("zentorch", "deprecated"),
            ALL[:2],
            lambda subject: runtimes.zentorch(subject.cast, subject.x),
            slow=True,
            program=_no_avx512,
        ),
        Peer(
            "compile",
            "apt install g++",
            (),
            ALL,
            lambda subject: runtimes.compiled_module(subject.cast, subject.x),
            slow=True,
            program=_no_compiler,
        ),
    )
}


def find_peers(
    names: Sequence[str] | None, dtype: torch.dtype, quick: bool = False
) -> tuple[list[Peer], dict[str, str]]:
    """Peers that can be measured, and of the others why not.

    Args:
        names: of :data:`PEERS`; None for all, without those that take minutes where ``quick``.

    Raises:
        ValueError: an unknown name.
    """
    if unknown := [name for name in names or () if name not in PEERS]:
        raise ValueError(f"peers: got {', '.join(unknown)}, wanted some of {', '.join(PEERS)}")
    wanted = [PEERS[name] for name in (PEERS if names is None else names)]
    missing: dict[str, str] = {}
    for peer in wanted:
        if (reason := peer.why_unavailable(dtype)) is not None:
            missing[peer.name] = reason
        elif quick and peer.slow and names is None:
            missing[peer.name] = f"compiles for minutes, so --quick leaves it out: --peers {peer.name} takes it in"
    return [peer for peer in wanted if peer.name not in missing], missing
