"""What a call would launch on a GPU, counted without one: name, FLOP and bytes of every kernel, ours and PyTorch's.

    ledger = record(lambda: model(images), chip)       # everything on device "meta"

Bytes are the least a launch can move: every tensor that it reads or writes once. Views cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from repavit_ops import kernels, library
from repavit_ops.kernels import tuning
from repavit_ops.kernels.chips import Chip, pretend

META = torch.device("meta")
INPUTS = {operator.name: operator.inputs for operator in library.OPERATORS}
PRODUCTS = ("mm", "addmm", "addmm_", "_addmm_activation", "bmm", "baddbmm", "convolution")


@dataclass(frozen=True)
class Launch:
    """One kernel: storages that it reads and writes (number → bytes), and the result of its product, if it is one."""

    name: str
    flop: float
    reads: dict[int, int]
    writes: dict[int, int]
    product: tuple[int, int] | None = None  # rows, columns

    @property
    def bytes(self) -> int:
        return sum((self.reads | self.writes).values())


class Ledger:
    """Launches in order."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._kept: list[Tensor] = []  # so that no storage's number is given twice

    def add(
        self, name: str, flop: float, reads: Iterable[Any], writes: Iterable[Any], rows_columns: Any = None
    ) -> None:
        reads, writes = ([t for t in tensors if isinstance(t, Tensor)] for tensors in (reads, writes))
        self._kept += [*reads, *writes]
        self.launches.append(Launch(name, flop, _storages(reads), _storages(writes), rows_columns))


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Number of the storage → bytes of it that are looked at; a broadcast view counts what it is made of."""
    return {t.untyped_storage()._cdata: min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors}


def record(call: Callable[[], object], chip: Chip) -> Ledger:
    """Everything that ``call`` would launch on ``chip``: its tensors are on device "meta"."""
    ledger = Ledger()
    with torch.no_grad(), instead_of_launching(ledger, chip), _Operators(ledger), _Attention(ledger):
        call()
    return ledger


def products_of(call: Callable[[], object], chip: Chip) -> set[tuning.Product]:
    """Every product that ``call`` on meta tensors looks up in the tables of ``chip``."""
    with tuning.recording() as products:
        record(call, chip)
    return products


class Launching(TorchDispatchMode):
    """Sends our operators on meta tensors to their launchers, as the dispatcher sends those on CUDA tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "repavit_ops":
            return func(*args, **(kwargs or {}))
        name = func._opname
        return kernels.launcher(name)(*args[: INPUTS[name]], **(kwargs or {}))


@contextmanager
def instead_of_launching(ledger: Ledger, chip: Chip) -> Iterator[None]:
    """Write every launch of a Triton kernel down instead of doing it."""

    def run(self: JITFunction, *args: Any, **_: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False))
        tensors = [value.base if isinstance(value, TensorDescriptor) else value for value in args]
        results = [value for name, value in given.items() if name in ("out", "y")]
        results = [value.base if isinstance(value, TensorDescriptor) else value for value in results]
        name = self.fn.__name__
        shape = (given["M"], given["N"]) if "N" in given else None
        if name == "on_chip_kernel":  # tiles of whole rows
            shape = (given["M"], 1)
        ledger.add(name, _flop(name, given), tensors, results, shape)

    with pretend(chip), mock.patch.object(JITFunction, "run", run):
        yield


def _flop(name: str, given: dict[str, Any]) -> float:
    if name == "linear_kernel":
        return 2.0 * given["M"] * given["N"] * given["K"]
    if name == "two_source_kernel":
        return 2.0 * given["M"] * given["N"] * (given["C"] + given["H"])
    if name == "on_chip_kernel":
        merged = given["C"] if given["w_merged"] is not None else 0
        return 2.0 * given["M"] * given["C"] * (2 * given["H"] + merged)
    if name == "attention_kernel":
        rows = given["qkv"].shape[:-1].numel()
        return 2.0 * rows * given["tokens"] * given["HEADS"] * (given["D_QK"] + given["D_V"])
    return 0.0


class _Operators(Launching):
    """Writes PyTorch's own kernels down; ours go to their launchers."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "repavit_ops":
            with self:  # what the launcher asks PyTorch for is counted too
                return super().__torch_dispatch__(func, types, args, kwargs)
        result = func(*args, **(kwargs or {}))
        name = func._opname
        if not (func.is_view or name in ("_unsafe_view", "empty", "new_empty", "detach", "empty_like")):
            flat = [t for argument in (*args, *(kwargs or {}).values()) for t in _flat(argument)]
            product = (result.numel() // result.shape[-1], result.shape[-1]) if name in PRODUCTS else None
            self.ledger.add(name, _product_flop(name, args, result), flat, _flat(result), product)
        return result


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (tuple, list)) else []


def _product_flop(name: str, args: Any, result: Any) -> float:
    if name not in PRODUCTS:
        return 0.0
    if name == "convolution":
        return 2.0 * result.numel() * math.prod(args[1].shape[1:])
    terms = args[0 if name in ("mm", "bmm") else 1].shape[-1]
    return 2.0 * result.numel() * terms


class _Attention(TorchFunctionMode):
    """scaled_dot_product_attention as one kernel, as on a GPU; on meta tensors PyTorch would take it apart."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        batch, heads, tokens, _ = q.shape
        result = torch.empty(batch, tokens, heads, v.shape[-1], dtype=q.dtype, device=META)
        flop = 2.0 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        self.ledger.add("sdpa", flop, [*args, *(kwargs or {}).values()], [result])
        return result.transpose(1, 2)


def compiled(ledger: Ledger) -> Ledger:
    """What torch.compile would launch at best: products and attention as they are, all between two of them as one."""
    groups: list[list[Launch]] = []
    for launch in ledger.launches:
        if launch.flop or not groups or groups[-1][0].flop:
            groups.append([])
        groups[-1].append(launch)
    result, last_read = Ledger(), {}
    for i, group in enumerate(groups):
        last_read |= {storage: i for launch in group for storage in launch.reads}
    for i, group in enumerate(groups):
        made = {storage: size for launch in group for storage, size in launch.writes.items()}
        reads = {s: size for launch in group for s, size in launch.reads.items() if s not in made}
        writes = {s: size for s, size in made.items() if last_read.get(s, -1) > i or i == len(groups) - 1}
        flop = sum(launch.flop for launch in group)
        result.launches.append(Launch(group[0].name, flop, reads, writes, group[0].product))
    return result
