"""The place of a weight whose numbers live in a packed copy alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# What a tensor without numbers can answer: attributes, and methods and functions.
_ATTRIBUTES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "grad", "grad_fn"),
    *("is_leaf", "retains_grad", "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn"),
    *("is_mps", "is_xpu", "output_nr", "_version", "_backward_hooks"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "is_signed"),
    *("get_device", "is_inference", "__len__", "__hash__", "requires_grad_", "is_conj", "is_neg", "_is_view"),
    *("stride", "storage_offset", "is_contiguous"),
)
_ANSWERED = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    *(getattr(torch.Tensor, name).__set__ for name in ("requires_grad", "grad")),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}


class DroppedWeight(nn.Parameter):
    """A parameter that keeps its name, shape and dtype and has no memory: ``packed`` alone holds its numbers.

    Everything that would read or write them raises RuntimeError, since there is nothing that could follow: gradients,
    averages, ``.data``, views. Copies of whole modules, ``state_dict`` and ``load_state_dict`` go by way of
    :class:`repavit_ops.nn.packed_weights.PackedWeights`, which unpacks. Underneath it is NaN, for whatever looks past
    PyTorch's functions.
    """

    packed: Tensor
    _unpacks: str
    _index: int
    _label: str

    @classmethod
    def of(cls, like: Tensor, packed: Tensor, unpacks: str, index: int, label: str) -> DroppedWeight:
        """The place of ``like``, which the operator ``unpacks`` returns at ``index`` for ``packed``."""
        return _dropped(like.shape, like.dtype, packed, unpacks, index, label)

    def unpacked(self) -> Tensor:
        """Its numbers, in memory of their own."""
        weight: Tensor = getattr(torch.ops.repavit_ops, self._unpacks)(self.packed)[self._index]
        return weight.view(self.shape)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.untyped_storage:  # for whoever counts bytes
            return torch.UntypedStorage(args[0].element_size())
        if func not in _ANSWERED:
            name = getattr(func, "__name__", str(func))
            if name in ("__get__", "__set__"):
                name = getattr(getattr(func, "__self__", None), "__name__", name)
            raise RuntimeError(
                f"{name}: {_label_in(args, kwargs)} was freed by fuse(keep_unpacked=False) and can be neither read nor "
                "written; take state_dict(), change weights by load_state_dict() or by assigning a new parameter, or "
                "fuse with keep_unpacked=True"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> DroppedWeight:
        if id(self) not in memo:
            packed = copy.deepcopy(self.packed, memo)
            memo[id(self)] = self.of(self, packed, self._unpacks, self._index, self._label)
        found: DroppedWeight = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _dropped, (self.shape, self.dtype, self.packed, self._unpacks, self._index, self._label)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DroppedWeight({self._label}, shape={list(self.shape)}, dtype={self.dtype})"


def stand_in(like: Tensor) -> Tensor:
    """What an operator is handed in place of a weight that it has no use for: its shape, and one number."""
    return torch.full((), float("nan"), dtype=like.dtype).expand(like.shape)


def _dropped(
    shape: torch.Size, dtype: torch.dtype, packed: Tensor, unpacks: str, index: int, label: str
) -> DroppedWeight:
    nothing = torch.full((), float("nan"), dtype=dtype).expand(shape)
    weight: DroppedWeight = torch.Tensor._make_subclass(DroppedWeight, nothing, False)
    weight.packed, weight._unpacks, weight._index, weight._label = packed, unpacks, index, label
    return weight


def _label_in(*arguments: Any) -> str:
    """The label of the first such weight among nested arguments."""
    for argument in arguments:
        if isinstance(argument, DroppedWeight):
            return argument._label
        inner = argument.values() if isinstance(argument, dict) else argument
        if isinstance(inner, list | tuple) or inner is not argument:
            label = _label_in(*inner)
            if label:
                return label
    return ""
