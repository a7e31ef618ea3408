"""Packed copies of weights: derived state that a module owns, never saves and rebuilds when the source changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends

PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


class PackedWeights(nn.Module):
    """Base of the deployed modules: keeps ``packed``, the C++ kernels' layout of the weights, in step with them.

    The copy is made at the first CPU call and again when a weight changed: after ``load_state_dict``, ``.to()`` and
    in-place edits that autograd can see (its version counter, looked at in eager mode only, since under
    ``torch.compile`` it would be a guard on data). Edits through ``.data`` or numpy need :meth:`repack`.
    """

    backend: backends.Backend

    def __init__(self) -> None:
        super().__init__()
        self._packed: Tensor | None = None
        self._packed_stamp: tuple[Any, ...] | None = None

    def sources(self) -> tuple[Tensor | None, ...]:
        """The weights that the packed copy holds, in the order of the pack operator's arguments."""
        raise TypeError(f"{type(self).__name__} must define sources()")

    def pack(self) -> Tensor:
        """Call the operator that packs ``sources()``."""
        raise TypeError(f"{type(self).__name__} must define pack()")

    def repack(self) -> None:
        """Rebuild the packed copy now: needed after edits through ``.data`` or numpy, and cheap otherwise."""
        with torch.no_grad():
            self._packed = self.pack() if self._wants_packing() else None
        self._packed_stamp = self._stamp()

    def packed(self) -> Tensor | None:
        """The packed copy for the next call, rebuilt first if a weight changed; None where no kernel takes one."""
        if not torch.compiler.is_compiling() and self._packed_stamp != self._stamp():
            self.repack()
        return self._packed

    def _wants_packing(self) -> bool:
        weight = self.sources()[0]
        return (
            self.backend in ("auto", "cpp")
            and backends.why_unavailable("cpp") is None
            and weight is not None
            and weight.device.type == "cpu"
            and weight.dtype in PACKABLE
        )

    def _stamp(self) -> tuple[Any, ...]:
        return tuple(
            None if t is None else (t.data_ptr(), t.dtype, None if t.is_inference() else t._version)
            for t in self.sources()
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeights:
        super()._apply(fn, recurse)
        self._packed, self._packed_stamp = None, None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_packed_stamp": None}
