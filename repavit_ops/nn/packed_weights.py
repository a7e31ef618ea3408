"""Packed copies of weights, in the order in which the C++ kernels read them.

A copy is derived state: the module owns it, never saves it, and makes it anew when the weights change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends, cpu_tuning
from ..cpu_tuning import Choice
from .dropped_weight import DroppedWeight, stand_in
from .given import tell_unfused

PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


class Copy(NamedTuple):
    """A packed copy and what belongs to it; replaced as one, for calls from other threads.

    Attributes:
        packed: the copy; None where no kernel takes one.
        stamp: what it was made of.
        operands: where weights were dropped, what operators are handed in their places.
        alone: whether that has no numbers either, since the copy holds them.
        choice: under "auto", where PyTorch's own form takes the kernel's place; None for nowhere.
    """

    packed: Tensor | None = None
    stamp: tuple[Any, ...] | None = None
    operands: list[Tensor | None] | None = None
    alone: bool = False
    choice: Choice | None = None


class PackedWeights(nn.Module):
    """Base of the deployed modules: holds the packed copy of their weights and keeps it up to date.

    The copy is made at once or at the first call on a CPU, and again when a weight has changed:

    - Where another tensor or other memory stands in a weight's place, or its version counter has been raised (edits in
      place do that), a new copy is made before the call. Compiled and exported programs do not look.
    - Many writers raise no counter: ``.data``, numpy, optimizers of PyTorch that are fused, collectives, other
      processes. So the copy carries a fingerprint of the weights, 128 numbers of each in fp32, 256 in bf16, that
      every call compares, compiled, exported or not; where it differs the kernel writes the copy anew. A change of
      single numbers that raises no counter may pass unseen: then :meth:`repack`.

    :meth:`drop_unpacked` frees the plain weights. The parameters then keep their names and shapes but own no memory
    (:class:`repavit_ops.nn.dropped_weight.DroppedWeight`): reading or writing them raises, ``state_dict`` unpacks them,
    ``load_state_dict`` and moving the module unpack and pack again, as does a new parameter in the place of one, and
    asking for gradients raises.

    Calls may come from several threads. A call sees the copy of one state of the weights; to change weights while calls
    run is as in PyTorch: each weight is read as it is at that moment.

    A subclass sets ``operator`` to the name of its operator and ``packed_names`` to the names of its weights in the
    order that the operator's pack function takes them, defines :meth:`pack` and ``_static``, and hands its operator
    what :meth:`current` returns.
    """

    operator: ClassVar[str]
    packed_names: ClassVar[tuple[str, ...]]
    backend: backends.Backend
    quantize: str = "none"  # the form of the packed copy: of the weights' own dtype, or "int8"
    quantization_error: float | None = None  # of int8, relative to the output; None where fuse() was not calibrated
    _copy: Copy

    def __init__(self) -> None:
        super().__init__()
        self._copy = Copy()

    def pack(self, *weights: Tensor | None) -> Tensor:
        """A new packed copy of weights, in the order of :attr:`packed_names`."""
        raise TypeError(f"{type(self).__name__} must define pack()")

    def sources(self) -> list[Tensor | None]:
        """The weights that the packed copy holds."""
        return [getattr(self, name) for name in self.packed_names]

    def current(self) -> tuple[Tensor | None, list[Any]]:
        """The packed copy for the next call, and the weights of :attr:`packed_names` for its operator.

        The copy is rebuilt first if a weight changed; None where no kernel takes one.

        Raises:
            RuntimeError: an export is running that would need weights that were dropped; says what to export.
        """
        if backends.in_transform():
            return None, self.sources()
        copy = self._copy
        if backends.exports_to_onnx():
            self._require_exportable()
            return None, self.sources()
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                self._require_exportable()
            if copy.alone and not all(weight is None or isinstance(weight, DroppedWeight) for weight in self.sources()):
                return None, self.sources()  # others in their places, for a while: torch.func.functional_call
        elif copy.stamp != self._stamp():
            self.repack()
            copy = self._copy
        return copy.packed, self.sources() if copy.operands is None else copy.operands

    def _require_exportable(self) -> None:
        if self._copy.alone:
            raise RuntimeError(
                f"{type(self).__name__} was fused with keep_unpacked=False and has no weights that a program could "
                "hold; export what fuse(keep_unpacked=True) gives"
            )

    @property
    def stands_alone(self) -> bool:
        """Whether the packed copy holds the weights and nothing else does."""
        return self._copy.alone

    @property
    def choice(self) -> Choice | None:
        """Where PyTorch's own form takes the kernel's place (:mod:`repavit_ops.cpu_tuning`); None for nowhere."""
        return self._copy.choice

    @property
    def packed_copy(self) -> Tensor | None:
        """The packed copy that is held now, if any; for whoever counts memory."""
        return self._copy.packed

    def backend_for(self, x: Tensor) -> backends.Backend:
        """The backend for ``x``.

        Under "auto" float64 on a CPU is left to PyTorch: there is only a portable kernel for it, which takes twice as
        long as PyTorch's BLAS. So is what this CPU's table leaves to it (:mod:`repavit_ops.cpu_tuning`).
        """
        if self.backend != "auto" or not x.is_cpu:
            return self.backend
        if x.dtype == torch.float64:
            return "reference"
        choice = self._copy.choice
        return "auto" if choice is None or not choice.takes_pytorch(x) else "pytorch"

    def operation(self) -> cpu_tuning.Operation:
        """What this module does, as the table of this CPU knows it."""
        weight = getattr(self, self.packed_names[0])
        return cpu_tuning.Operation.of(self.operator, weight.dtype, self._parameters.items(), self._static())

    def _static(self) -> dict[str, Any]:
        """The operator's keyword arguments, as far as they do not depend on a call."""
        raise TypeError(f"{type(self).__name__} must define _static()")

    def _pytorch_at(self, *size: int) -> cpu_tuning.Batches:
        """For a step: the batches at which PyTorch's own form takes a tensor of this size."""
        if (choice := self._copy.choice) is None:
            return ()
        if torch.compiler.is_compiling():
            return cpu_tuning.EVERY if choice.programs else ()
        return choice.batches(size)

    def repack(self) -> None:
        """Rebuild the packed copy now: needed after edits of single numbers through ``.data`` or numpy."""
        stamp, weights = self._stamp(), self.sources()  # the stamp first: who writes meanwhile is seen by the next call
        given = [weight for weight in weights if weight is not None]
        dropped = [weight for weight in given if isinstance(weight, DroppedWeight)]
        if dropped and self._packable() and len(dropped) == len(given):
            packed = dropped[0].packed
            if all(weight.packed is packed for weight in dropped):
                stand_ins = [None if weight is None else stand_in(weight) for weight in weights]
                self._copy = Copy(packed, stamp, stand_ins, alone=True)
                return
        weights = [weight.unpacked() if isinstance(weight, DroppedWeight) else weight for weight in weights]
        with torch.no_grad():
            wanted = self._packable() and backends.has_cpu_kernel(f"{self.operator}_pack")
            asked = wanted and self.backend == "auto" and self.quantize == "none"  # PyTorch has no int8 of this kind
            choice = cpu_tuning.choose(self.operation()) if asked else None
            made = self.pack(*weights) if wanted and not (choice and choice.kernel_never) else None
            self._copy = Copy(made, stamp, weights if dropped else None, choice=choice)

    def drop_unpacked(self) -> None:
        """Free the plain weights where a packed copy stands in for them; elsewhere (other devices) keep them."""
        packed = self.current()[0]
        if packed is None or self._copy.alone:
            return
        torch.ops.repavit_ops.packed_stands_alone(packed)
        self.take_packed(packed)

    def take_packed(self, packed: Tensor) -> None:
        """Let ``packed`` stand in for the plain weights from now on, whose shapes and dtype are those it was made of.

        Args:
            packed: what the operator's pack function returned, marked to stand alone (``packed_stands_alone``).
        """
        self.requires_grad_(False)
        unpacks, kind = f"{self.operator}_unpack", type(self).__name__
        self._copy = Copy()
        for index, (name, weight) in enumerate(self._named_sources()):
            if weight is not None:
                setattr(self, name, DroppedWeight.of(weight, packed, unpacks, index, f"{name} of {kind}"))
        self.repack()

    def require_packed(self) -> None:
        """Raise RuntimeError unless the packed copy is one of weights like these, by its header and size."""
        dtype = getattr(self, self.packed_names[0]).dtype
        with torch.no_grad():
            self(torch.empty(self.no_rows(), dtype=dtype))  # the operator looks at all that it is given

    def no_rows(self) -> tuple[int, ...]:
        """The shape of an input of nothing."""
        raise TypeError(f"{type(self).__name__} must define no_rows()")

    def restore_unpacked(self) -> None:
        """Undo :meth:`drop_unpacked`."""
        if self._restore():
            self.repack()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.packed_names and self.__dict__["_copy"].operands is not None:
            self.repack()  # now, for compiled programs, which see that the copy is another but not that a weight is

    def _restore(self) -> bool:
        """Put weights in the places of dropped ones; whether there were any."""
        dropped = [(name, weight) for name, weight in self._named_sources() if isinstance(weight, DroppedWeight)]
        if dropped:
            self._copy = Copy()
        for name, weight in dropped:
            setattr(self, name, nn.Parameter(weight.unpacked(), requires_grad=False))
        return bool(dropped)

    def _named_sources(self) -> list[tuple[str, Tensor | None]]:
        return [(name, getattr(self, name)) for name in self.packed_names]

    def check_trainable(self, x: Tensor) -> None:
        """Raise RuntimeError if a derivative would need weights that are not there any more."""
        if not self._copy.alone:
            return
        backward = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters(recurse=False)))
        if backward or backends.in_forward_mode() or backends.in_transform():
            raise RuntimeError(
                f"{type(self).__name__} was fused with keep_unpacked=False and has no weights to differentiate or "
                "transform; fuse with keep_unpacked=True, or ask for no derivatives: torch.no_grad(), no forward mode, "
                "no torch.func"
            )

    def _packable(self) -> bool:
        weight = getattr(self, self.packed_names[0])
        return self.backend in ("auto", "cpp") and weight.is_cpu and weight.dtype in PACKABLE

    def _stamp(self) -> tuple[Any, ...]:
        """What the packed copy was made of; nothing where there is none to make."""
        if not self._packable():
            return ()
        return (self.quantize, *map(_state, self.sources()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeights:
        dropped = self._restore()
        super()._apply(fn, recurse)
        self._copy = Copy()
        if dropped:
            self.drop_unpacked()
        elif not torch.compiler.is_compiling():
            self.repack()  # compiled programs take the copy that there is, and pack in every call where there is none
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not any(isinstance(weight, DroppedWeight) for weight in self._parameters.values()):
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        whole = copy.copy(self)  # apart, for calls from other threads
        vars(whole)["_parameters"] = {
            name: nn.Parameter(value.unpacked(), requires_grad=False) if isinstance(value, DroppedWeight) else value
            for name, value in self._parameters.items()
        }
        whole._copy = Copy()
        whole._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        dropped = self._restore()
        super()._load_from_state_dict(*args)
        tell_unfused(self, *args[:2], *args[4:6])
        self._copy = self._copy._replace(stamp=None)
        if dropped:
            self.drop_unpacked()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copy": Copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        older = {name: state.pop(name, None) for name in ("_packed", "_packed_stamp", "_unpacked_dropped")}
        super().__setstate__({"_copy": Copy(), **state})
        if older["_unpacked_dropped"] and older["_packed"] is not None:  # of versions whose places held zeros
            weights = getattr(torch.ops.repavit_ops, f"{self.operator}_unpack")(older["_packed"])
            for (name, place), weight in zip(self._named_sources(), weights, strict=True):
                if place is not None:
                    setattr(self, name, nn.Parameter(weight.view(place.shape), requires_grad=False))
            self.drop_unpacked()
        elif any(isinstance(weight, DroppedWeight) for weight in self._parameters.values()):
            self.repack()


def _state(weight: Tensor | None) -> Any:
    """What tells whether a weight is still the one that it was, as far as PyTorch knows."""
    if weight is None or isinstance(weight, DroppedWeight):
        return id(weight)
    return (weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version)
