"""Packed copies of weights, in the order in which the C++ kernels read them.

A copy is derived state: the module owns it, never saves it, and makes it anew when the weights change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backends, library

PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


class PackedWeights(nn.Module):
    """Base of the deployed modules: holds the packed copy of their weights and keeps it up to date.

    The copy is made at the first call on a CPU and again whenever a weight has changed: after ``load_state_dict``,
    after ``.to()``, and after edits in place, which raise a tensor's version counter. The counter is compared in eager
    mode only, because under ``torch.compile`` the comparison would become a guard on data. Edits through ``.data`` or
    numpy raise no counter and need :meth:`repack`.

    :meth:`drop_unpacked` frees the plain weights. The parameters then keep their names and shapes but own no memory,
    ``state_dict`` unpacks them, moving the module unpacks and packs again, and asking for gradients raises.

    A subclass sets ``operator`` to the name of its operator and ``packed_names`` to the names of its weights in the
    order that the operator's pack function takes them, and defines :meth:`pack`.
    """

    operator: ClassVar[str]
    packed_names: ClassVar[tuple[str, ...]]
    backend: backends.Backend

    def __init__(self) -> None:
        super().__init__()
        self._packed: Tensor | None = None
        self._packed_stamp: tuple[Any, ...] | None = None
        self._unpacked_dropped = False

    def pack(self) -> Tensor:
        """A new packed copy of :meth:`sources`."""
        raise TypeError(f"{type(self).__name__} must define pack()")

    def _unpacked(self) -> Iterator[tuple[str, Tensor]]:
        assert self._packed is not None
        unpacked = getattr(torch.ops.repavit_ops, f"{self.operator}_unpack")(self._packed)
        return zip(self.packed_names, unpacked, strict=True)

    def sources(self) -> list[Tensor | None]:
        """The weights that the packed copy holds."""
        return [getattr(self, name) for name in self.packed_names]

    def packed(self) -> Tensor | None:
        """The packed copy for the next call, rebuilt first if a weight changed; None where no kernel takes one.

        Raises:
            RuntimeError: an ONNX export is running, for which the operators have no equivalent; says what to export.
        """
        if torch.jit.is_tracing() and self.backend != "reference":  # the old exporter; the other asks the fakes
            library.refuse_onnx()
        if not torch.compiler.is_compiling() and not self._unpacked_dropped and self._packed_stamp != self._stamp():
            self.repack()
        return self._packed

    @property
    def packed_copy(self) -> Tensor | None:
        """The packed copy that is held now, if any; for whoever counts memory."""
        return self._packed

    def backend_for(self, x: Tensor) -> backends.Backend:
        """The backend for ``x``.

        Under "auto" float64 on a CPU is left to PyTorch: there is only a portable kernel for it, which takes twice as
        long as PyTorch's BLAS.
        """
        return "reference" if self.backend == "auto" and x.is_cpu and x.dtype == torch.float64 else self.backend

    def repack(self) -> None:
        """Rebuild the packed copy now: needed after edits through ``.data`` or numpy."""
        if self._unpacked_dropped:
            return
        with torch.no_grad():
            wanted = self._packable() and backends.has_cpu_kernel(f"{self.operator}_pack")
            self._packed = self.pack() if wanted else None
        self._packed_stamp = self._stamp()

    def drop_unpacked(self) -> None:
        """Free the plain weights where a packed copy stands in for them; elsewhere (other devices) keep them."""
        if self.packed() is None or self._unpacked_dropped:
            return
        self.requires_grad_(False)
        for name in self.packed_names:
            if (weight := getattr(self, name)) is not None:
                setattr(self, name, nn.Parameter(weight.new_zeros(()).expand(weight.shape), requires_grad=False))
        self._unpacked_dropped = True

    def restore_unpacked(self) -> None:
        """Undo :meth:`drop_unpacked`."""
        if not self._unpacked_dropped:
            return
        for name, weight in self._unpacked():
            if getattr(self, name) is not None:
                setattr(self, name, nn.Parameter(weight, requires_grad=False))
        self._unpacked_dropped = False
        self._packed_stamp = self._stamp()

    def check_trainable(self, x: Tensor) -> None:
        """Raise RuntimeError if a derivative would need weights that are not there any more."""
        if not self._unpacked_dropped:
            return
        backward = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters(recurse=False)))
        if backward or backends.in_forward_mode():
            raise RuntimeError(
                f"{type(self).__name__} was fused with keep_unpacked=False and has no weights to differentiate; "
                "fuse with keep_unpacked=True, or ask for no derivatives: torch.no_grad(), no forward mode"
            )

    def _packable(self) -> bool:
        weight = getattr(self, self.packed_names[0])
        return self.backend in ("auto", "cpp") and weight.is_cpu and weight.dtype in PACKABLE

    def _stamp(self) -> tuple[Any, ...]:
        """What the packed copy was made of; nothing where there is none to make."""
        if not self._packable():
            return ()
        return tuple(
            None if t is None else (t.data_ptr(), t.dtype, None if t.is_inference() else t._version)
            for t in self.sources()
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeights:
        dropped = self._unpacked_dropped
        self.restore_unpacked()
        super()._apply(fn, recurse)
        self._packed, self._packed_stamp = None, None
        if dropped:
            self.drop_unpacked()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unpacked_dropped:
            for name, weight in self._unpacked():
                if prefix + name in destination:
                    destination[prefix + name] = weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        dropped = self._unpacked_dropped
        self.restore_unpacked()
        super()._load_from_state_dict(*args, **kwargs)
        self._packed_stamp = None
        if dropped:
            self.drop_unpacked()

    def __getstate__(self) -> dict[str, Any]:
        if self._unpacked_dropped:
            return self.__dict__
        return {**self.__dict__, "_packed": None, "_packed_stamp": None}
