"""Which classes of modules are sub-blocks, and the rule that fuses each; why a module cannot be fused.

Rules go by exact class, so that a subclass with a forward of its own is never touched. The table knows no class by
name: each family of :mod:`repavit_ops.fusing.families` registers its own, as can anybody's (docs/adding-a-family.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import nn

from ..backends import Backend
from ..nn import recorders
from ..nn.given import reason_against_weights, unwrapped, why_sharded

T = TypeVar("T")
FUSED_INSIDE = "what of it can be fused is fused"
Projection = Callable[[Any, Backend], nn.Module]  # (module, backend) → the module on a fused projection of patches
Loop = str | Callable[[Any], str | None]  # the name of a list of blocks, or a module → that name
Meaning = Callable[[Any], nn.Module]  # a module → PyTorch's own that computes the same, on the same parameters


@dataclass(frozen=True)
class Rule:
    """How one class of sub-block is fused.

    Args:
        kind: the operator that computes it, or "block" for what only holds sub-blocks.
        can_fuse: None, or the reason against a module in one line.
        fold: the fused module, of a module that ``can_fuse`` let pass.
        keeps_children: fold only rearranges, so that the children live on, hooks in them too.
        is_fused: modules of the class are fused already; fold changes their backend.
        parts: of attentions and FFNs that hold neither norm nor shortcut, what :mod:`repavit_ops.fusing.folding` folds.
    """

    kind: str
    can_fuse: Callable[[Any], str | None]
    fold: Callable[[Any, Backend], nn.Module]
    keeps_children: bool = False
    is_fused: bool = False
    parts: Callable[[Any], Any] | None = None


class Source(Protocol):
    """A family of classes: what :func:`register` takes."""

    def rule_for(self, cls: type[nn.Module]) -> Rule | None:
        """The rule for exactly this class; None where the family does not know it."""

    def projection_for(self, cls: type[nn.Module]) -> Projection | None:
        """What replaces a patch embedding or a merging of patches of exactly this class; None if it is neither."""

    def loop_for(self, cls: type[nn.Module]) -> Loop | None:
        """The list of blocks that the forward of exactly this class loops over; None if it has none."""

    def reset_for(self, cls: type[nn.Module]) -> Callable[[Any], None] | None:
        """What makes a module of exactly this class forget state of earlier calls; None where it keeps none."""

    def known(self) -> Iterable[str]:
        """Dotted names of the classes that it fuses, at least in part."""

    def meaning_for(self, cls: type[nn.Module]) -> Meaning | None:
        """What a norm, activation, scale or no-op of exactly this class is in PyTorch's own; None if it is neither."""


_SOURCES: list[Source] = []


def register(source: Source) -> None:
    """Add a family to the table; of two that know a class, the first has it."""
    _SOURCES.append(source)


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module of exactly this class; None for modules that are no sub-block of a known family."""
    return _first(source.rule_for(type(module)) for source in _SOURCES)


def projection_of(module: nn.Module) -> Projection | None:
    """What replaces a module of exactly this class that projects patches; None for any other module."""
    return _first(source.projection_for(type(module)) for source in _SOURCES)


def loop_of(module: nn.Module) -> str | None:
    """Name of the list of blocks that the forward of a module of exactly this class loops over."""
    for source in _SOURCES:
        if (found := source.loop_for(type(module))) is not None:
            return found if isinstance(found, str) else found(module)
    return None


def reset(module: nn.Module) -> None:
    """Let a module forget what earlier calls left in it, where its class is known to keep such state."""
    forget = _first(source.reset_for(type(module)) for source in _SOURCES)
    if forget is not None:
        forget(module)


def known_classes() -> list[str]:
    """Dotted names of all classes that fuse, at least in part."""
    return sorted({name for source in _SOURCES for name in source.known()})


def plain(module: nn.Module) -> nn.Module:
    """A norm, activation, scale or no-op of a family as PyTorch's own, sharing its parameters; any other as it is."""
    meaning = _first(source.meaning_for(type(module)) for source in _SOURCES)
    return module if meaning is None else meaning(module)


def _first(found: Iterable[T | None]) -> T | None:
    return next((item for item in found if item is not None), None)


def can_fuse(module: nn.Module) -> str | None:
    """None if :func:`repavit_ops.fuse` can fuse this sub-block, else the reason in one line.

    A sub-block is an attention, an FFN or a block that holds them; :func:`repavit_ops.fusion_report` asks for all of a
    model.

    DistributedDataParallel, DataParallel, AveragedModel and torch.compile's wrapper are looked into, as ``fuse`` does.
    """
    module = unwrapped(module)
    rule = rule_of(module)
    if rule is None:
        if (sharded := why_sharded(module, "fuse")) is not None:
            return sharded
        return f"{type(module).__name__} is no sub-block that repavit_ops knows; fusion_report lists what it holds"
    if not rule.is_fused and any(map(has_hooks, [module] if rule.keeps_children else module.modules())):
        return "it has hooks, which a fused module would not call; remove them first"
    if not rule.is_fused and not rule.keeps_children and (reason := reason_against_weights(module)) is not None:
        return reason
    if (reason := rule.can_fuse(module)) is not None:
        return reason
    within = [module] if rule.keeps_children else module.modules()
    replaced = next((m for m in within if _has_forward_of_its_own(m)), None)
    if replaced is None or rule.is_fused:
        return None
    by = type(replaced).__name__
    fix = (
        "; accelerate.hooks.remove_hook_from_module(model, recurse=True) first" if "_hf_hook" in vars(replaced) else ""
    )
    return f"the forward of its {by} was replaced on the instance; a fused module has its own{fix}"


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of any kind are registered on the module itself, other than those that :mod:`recorders` knows."""
    if recorders.acts(module._forward_hooks):
        return True
    return any(getattr(module, f"_{kind}_hooks") for kind in ("forward_pre", "backward", "backward_pre"))


def _has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether a forward stands on the instance that is not its class's, which accelerate leaves there."""
    found = vars(module).get("forward")
    own = getattr(found, "__func__", None) is type(module).forward and getattr(found, "__self__", None) is module
    return found is not None and not own
