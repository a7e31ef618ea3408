"""One forward as a list of timed calls: every PyTorch function, and every module that runs on a kernel of this library.

A call knows the modules that were running (hooks on all of them number their calls), what kind of function it is, its
floating-point operations and the name of its weight. Hooks make a fused model run part by part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import backends
from ..library import OPERATORS
from ..nn import GatedFFN, PartialGELUFFN, PatchConv2d, PatchProjection, RepAttention

CLOSED = (PartialGELUFFN, GatedFFN, RepAttention, PatchConv2d, PatchProjection)  # one operator call each

KINDS: dict[Any, str] = {
    F.linear: "linear",
    F.conv2d: "conv",
    F.scaled_dot_product_attention: "core",
    F.multi_head_attention_forward: "whole attention",
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), "core"),
    **dict.fromkeys((F.layer_norm, F.rms_norm, F.batch_norm, F.group_norm), "norm"),
    **dict.fromkeys((F.gelu, F.silu, F.relu, torch.sigmoid, Tensor.sigmoid), "activation"),
    **dict.fromkeys((torch.tanh, Tensor.tanh, torch.erf, Tensor.erf, torch.erfc, Tensor.erfc), "activation"),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), "matmul"),
}


@dataclass
class Call:
    """One call of a forward.

    Attributes:
        kind: of :data:`KINDS`, "fused" for a module on a kernel, or "other".
        seconds: how long it took. flops: its floating-point operations, multiplications and additions.
        spans: numbers of the module calls that were running, the model's own first.
        weight: name of the parameter that a linear map has, "" elsewhere. shape: of that weight.
        module, size: of "fused": the module, and the shape of what it was called with.
    """

    kind: str
    seconds: float
    flops: int
    spans: tuple[int, ...]
    weight: str = ""
    shape: tuple[int, ...] = ()
    module: nn.Module | None = None
    size: tuple[int, ...] = ()


class Recorder(TorchFunctionMode):
    """Records the calls of one forward; see the top of this file."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._formulas = {getattr(torch.ops.repavit_ops, operator.name): operator for operator in OPERATORS}
        self._spans: list[int] = []
        self._next = 0
        self._closed: tuple[nn.Module, float] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._closed is not None:
            return func(*args, **kwargs)
        if (operator := self._formulas.get(func)) is not None:  # where no kernel runs it
            with self:
                return operator.reference(*args[: operator.inputs], **kwargs)
        start = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - start
        kind = KINDS.get(func, "other")
        weight = _argument(1, "weight", args, kwargs) if kind in ("linear", "conv") else None
        shape = () if weight is None else tuple(weight.shape)
        flops = _flops(func, kind, out, args, kwargs)
        self.calls.append(Call(kind, seconds, flops, tuple(self._spans), self._names.get(id(weight), ""), shape))
        return out

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of every module."""
        self._spans.append(self._next)
        self._next += 1
        if self._closed is None and isinstance(module, CLOSED) and args and on_kernel(module, args[0]):
            self._closed = (module, time.perf_counter())

    def leave(self, module: nn.Module, args: Any, _out: Any) -> None:
        """Forward hook of every module."""
        if self._closed is not None and self._closed[0] is module:
            seconds, spans = time.perf_counter() - self._closed[1], tuple(self._spans)
            self.calls.append(Call("fused", seconds, 0, spans, module=module, size=tuple(args[0].shape)))
            self._closed = None
        self._spans.pop()


def on_kernel(module: Any, x: Tensor) -> bool:
    """Whether a deployed module runs ``x`` on a kernel rather than as its formula."""
    if module.backend_for(x) not in ("auto", "cpp") or not x.is_cpu or x.dtype == torch.float64:
        return False
    return backends.why_unavailable("cpp") is None


@contextmanager
def hooked(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Hooks of a recorder on every module, for a while."""
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(recorder.enter))
        handles.append(module.register_forward_hook(recorder.leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, images: Tensor) -> tuple[list[Call], float]:
    """The calls of one forward, and the seconds that the whole of it took."""
    recorder = Recorder(model)
    with torch.no_grad(), hooked(model, recorder), recorder:
        start = time.perf_counter()
        model(images)
        return recorder.calls, time.perf_counter() - start


def _argument(place: int, name: str, args: Any, kwargs: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _flops(func: Any, kind: str, out: Any, args: Any, kwargs: Any) -> int:
    if kind in ("linear", "conv"):
        weight = _argument(1, "weight", args, kwargs)
        return 2 * int(out.numel()) * (weight.shape[-1] if kind == "linear" else weight[0].numel())
    if kind == "matmul":
        return 2 * int(out.numel()) * int(args[0].shape[-1])
    if func is F.scaled_dot_product_attention:
        q, k, v = (_argument(i, name, args, kwargs) for i, name in enumerate(("query", "key", "value")))
        return 2 * math.prod(q.shape[:-1]) * int(k.shape[-2]) * int(q.shape[-1] + v.shape[-1])
    if kind == "whole attention":  # query and key [tokens, images, C]
        (tokens, batch, dim), keys = args[0].shape, args[1].shape[0]
        return 4 * int(batch * dim * (dim * (tokens + keys) + tokens * keys))
    return 0
