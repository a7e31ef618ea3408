"""Modules that take another's place under its class, so that whoever asks for that class still finds it.

Libraries look their blocks up by class: hooks that record hidden states, lists of what must not be split over devices,
checkpointing of activations. A stand-in is of both classes, its own forward first.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)
BUILT_IN = frozenset(vars(nn.Module())) | {"forward"}  # which would be the original's, bound to it


def standing_in(module: M, original: nn.Module) -> M:
    """``module``, from now on an instance of ``original``'s class too, with its plain attributes.

    Children, parameters, buffers and hooks are the module's own; the original is not changed.
    """
    own = vars(module)
    for name, value in vars(original).items():
        if name not in BUILT_IN and name not in own:
            own[name] = value
    classes: tuple[Any, Any] = type(module), type(original)
    module.__class__ = stand_in_class(*classes)
    module.training = original.training
    return module


@cache
def stand_in_class(own: Any, original: Any) -> Any:
    """A class of both, under the original's name; ``own`` comes first."""
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "_stands_in": (own, original),
    }
    return type(original.__name__, (own, original), names)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class whose forward a module runs: the one that a stand-in was made from, else its class."""
    pair = type(module).__dict__.get("_stands_in")
    return type(module) if pair is None else pair[0]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module was built as: the one whose place a stand-in takes, else its class."""
    pair = type(module).__dict__.get("_stands_in")
    return type(module) if pair is None else pair[1]


def is_stand_in(cls: type) -> bool:
    """Whether :func:`stand_in_class` made a class."""
    return "_stands_in" in cls.__dict__


def _reduce(self: nn.Module, _protocol: int) -> tuple[Any, ...]:
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _bare, type(self).__dict__["_stands_in"], state


def _bare(own: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    """What pickle and deepcopy fill: an instance without state."""
    classes: tuple[Any, Any] = own, original
    cls = stand_in_class(*classes)
    made: nn.Module = cls.__new__(cls)
    return made
