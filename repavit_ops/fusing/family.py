"""A foreign library's classes, each described once as parts; what follows from a description is the same for all.

A pre-norm block is closed: its halves become ``x + scale · body(norm(x))``, each fused alone if its body has a rule.
Bodies in any other surroundings (post-norm blocks, MLP-Mixers, pooling heads, …) are fused without norm and shortcut.
A module that holds anything its description does not name (a child, a parameter, an attribute) is skipped and named.

docs/adding-a-family.md shows how to describe one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ..backends import Backend
from ..nn import Block, PartialGELUFFN
from ..nn.foreign_block import OpenBranch
from ..nn.stand_in import is_stand_in, standing_in
from .folding import (
    AnyFFNParts,
    AttentionParts,
    FFNParts,
    WindowParts,
    fold_attention,
    fold_ffn,
    fold_window_attention,
    reason_against,
)
from .patches import MergingParts, fold_merging, fuse_convolution
from .rules import FUSED_INSIDE, Loop, Meaning, Projection, Rule, can_fuse, plain


class WholeBlock(NamedTuple):
    """A block that is fused as a whole or not at all, as the parts of its closed halves and what callers call.

    For blocks whose attention is called in a way of its own (``nn.MultiheadAttention``) or whose FFN is no module.
    """

    attn: AttentionParts
    mlp: AnyFFNParts
    call: type[Block]
    attributes: Mapping[str, Any] = {}


class WindowBlock(NamedTuple):
    """A block of windowed attention as parts: the closed attention, the other half, and what callers call.

    The other half is an open one, or the closed FFN's parts where that is no module.
    """

    attn: WindowParts
    mlp: OpenBranch | AnyFFNParts
    call: type[Block]
    attributes: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Described:
    """How the modules of one class are read.

    Args:
        parts: a module → its parts: :class:`AttentionParts`, :class:`FFNParts` or :class:`.folding.GatedFFNParts` (all
            without norm and shortcut), :class:`WholeBlock`, :class:`WindowBlock`, or for a block of two halves the
            :class:`repavit_ops.nn.Block` of two :class:`OpenBranch` that takes its place, under the signature that
            callers know.
        holds: names of the children, parameters and attributes that the description knows and that must be there.
        may_hold: names that it knows too and that may be missing.
        refuses: names that may be missing, None or the identity; of anything else the reason against it.
        inside: of children that no rule of their own describes the dotted name of the class and what it holds.
        unless: a reason against a module that holds what it should, in one line; None if there is none.
        keeps_class: the fused block is an instance of the class that it replaces, too, with its plain attributes.
        alone: (fused, original) → what a fused attention or FFN becomes that is called under a signature of its own.
    """

    parts: Callable[[Any], Any]
    holds: tuple[str, ...]
    may_hold: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    inside: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    unless: Callable[[Any], str | None] = lambda module: None
    keeps_class: bool = False
    alone: Callable[[Any, Any], nn.Module] = lambda fused, original: fused

    def closed(self, block: nn.Module, made: nn.Module) -> nn.Module:
        """What takes a block's place."""
        return standing_in(made, block) if self.keeps_class else made

    def oddity(self, module: nn.Module, library: str) -> str | None:
        """What a module has that its class lets not expect, in one line; None if there is nothing."""
        if (reason := _surprise(module, self.holds, (*self.may_hold, *self.refuses), library)) is not None:
            return reason
        for name, (path, holds) in self.inside.items():
            child = getattr(module, name)
            if type(child) is not _named(path):
                return f"its {name} is {type(child).__name__}, wanted {path}"
            if (reason := _surprise(child, holds, (), library)) is not None:
                return reason
        present = (reason for name, reason in self.refuses.items() if not _absent(module, name))
        return next(present, None) or self.unless(module)


def _surprise(module: nn.Module, holds: tuple[str, ...], may_hold: tuple[str, ...], library: str) -> str | None:
    """Names that are missing, or that there is no knowing about; private ones and None do not count."""
    names = {*module._modules, *module._parameters, *module._buffers, *(vars(module).keys() - BUILT_IN)}
    if missing := sorted(set(holds) - names):
        return f"{type(module).__name__} lacks {', '.join(missing)}; {_release(library)} is not known"
    extra = sorted(n for n in names - {*holds, *may_hold} if n[0] != "_" and getattr(module, n) is not None)
    if extra:
        return f"{type(module).__name__} also holds {', '.join(extra)}, which its rule does not know"
    return None


BUILT_IN = frozenset(vars(nn.Module())) | {"forward"}  # one on the instance is refused elsewhere


def _absent(module: nn.Module, name: str) -> bool:
    """Whether an optional child is not there: missing in other versions, None, or the identity."""
    child = getattr(module, name, None)
    return child is None or type(child) is nn.Identity


@dataclass(frozen=True, eq=False)
class Family:
    """The classes of one library by dotted name; whatever of it is not loaded costs nothing and is never imported.

    Args:
        library: the name that users import, with which the dotted names of all classes begin; "__main__" for those of
            a script.
        oldest: the oldest version that the descriptions were tested with; older ones are skipped with that reason.
        ready: whether the library is loaded far enough that its classes stand under their dotted names.
        attentions, ffns, gated_ffns, blocks, whole_blocks, window_blocks: the described classes by what their parts
            are.
        ffns_apart: names of fc1, the activation and fc2 in classes whose forward has an FFN spread over modules; fc1's
            and fc2's own modules become the fused FFN and the identity.
        refused: classes that are attentions or FFNs which no operator computes, and why not.
        resembling: whether a class looks like one; such are refused where nothing else knows them.
        why_unknown: of a module of such a class, what is in the way; None where it does not say.
        meanings: norms, activations, scales and no-ops as PyTorch's own.
        loops: name of the list of blocks that forward loops over, calling each with what the one before returned and
            looking at nothing in between; or what finds it in a module, where not all of the class do.
        resets: what makes a module forget state of earlier calls.
        patch_embeddings: name of the convolution over patches in them.
        mergings: parts of Swin's mergings of patches.

    Raises:
        ValueError: a dotted name begins with something else than ``library``.
    """

    library: str
    oldest: str = ""
    ready: Callable[[], bool] = lambda: True
    attentions: Mapping[str, Described] = field(default_factory=dict)
    ffns: Mapping[str, Described] = field(default_factory=dict)
    gated_ffns: Mapping[str, Described] = field(default_factory=dict)
    blocks: Mapping[str, Described] = field(default_factory=dict)
    whole_blocks: Mapping[str, Described] = field(default_factory=dict)
    window_blocks: Mapping[str, Described] = field(default_factory=dict)
    ffns_apart: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    resembling: Callable[[type[nn.Module]], bool] = lambda cls: False
    why_unknown: Callable[[nn.Module], str | None] = lambda module: None
    loops: Mapping[str, Loop] = field(default_factory=dict)
    resets: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)
    meanings: Mapping[str, Meaning] = field(default_factory=dict)
    patch_embeddings: Mapping[str, str] = field(default_factory=dict)
    mergings: Mapping[str, Callable[[Any], MergingParts]] = field(default_factory=dict)
    _rules: dict[type, Rule | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        others = (self.refused, self.loops, self.resets, self.meanings, self.patch_embeddings, self.mergings)
        for path in (*self.known(), *(path for table in others for path in table)):
            if (package := path.partition(".")[0]) != self.library:
                raise ValueError(
                    f"library: got {self.library!r} beside {path}, wanted {package!r}: a class is looked for in the "
                    "package that its dotted name begins with; describe those of another one in a Family of their own"
                )

    def rule_for(self, cls: type[nn.Module]) -> Rule | None:
        if not self._has(cls):
            return None
        if cls not in self._rules:
            self._rules[cls] = self._find_rule(cls)
        return self._rules[cls]

    def projection_for(self, cls: type[nn.Module]) -> Projection | None:
        if (name := self._listed(cls, self.patch_embeddings)) is not None:
            return partial(fuse_convolution, name=name)
        if (parts := self._listed(cls, self.mergings)) is not None:
            return lambda merging, backend: fold_merging(parts(merging), backend) or merging
        return None

    def loop_for(self, cls: type[nn.Module]) -> Loop | None:
        name: Loop | None = self._listed(cls, self.loops)
        return name

    def reset_for(self, cls: type[nn.Module]) -> Callable[[Any], None] | None:
        forget: Callable[[Any], None] | None = self._listed(cls, self.resets)
        return forget

    def known(self) -> Iterable[str]:
        tables = (
            self.attentions,
            self.ffns,
            self.gated_ffns,
            self.blocks,
            self.whole_blocks,
            self.window_blocks,
            self.ffns_apart,
        )
        return [name for table in tables for name in table]

    def meaning_for(self, cls: type[nn.Module]) -> Meaning | None:
        return self._listed(cls, self.meanings)

    def _has(self, cls: type) -> bool:
        return cls.__module__.partition(".")[0] == self.library and self.ready()

    def _listed(self, cls: type, table: Mapping[str, Any]) -> Any:
        """What a table has for exactly this class: one of its dotted names leads to it."""
        if not self._has(cls):
            return None
        return next((value for path, value in table.items() if _named(path) is cls), None)

    def _find_rule(self, cls: type[nn.Module]) -> Rule | None:
        rule = self._rule_of_table(cls)
        version = str(getattr(sys.modules.get(self.library), "__version__", ""))
        if rule is None or not self.oldest or _numbers(version) >= _numbers(self.oldest):
            return rule
        return refusing(f"{self.library} {version} is installed; its blocks are known from {self.oldest} on")

    def _rule_of_table(self, cls: type[nn.Module]) -> Rule | None:
        for kind, table, make in (
            ("rep_attention", self.attentions, self._body_rule),
            ("partial_gelu_ffn", self.ffns, self._body_rule),
            ("gated_ffn", self.gated_ffns, self._body_rule),
            ("block", self.blocks, self._block_rule),
            ("block", self.whole_blocks, self._whole_rule),
            ("window_rep_attention", self.window_blocks, self._window_rule),
        ):
            if (described := self._listed(cls, table)) is not None:
                return make(kind, described)
        if (names := self._listed(cls, self.ffns_apart)) is not None:
            return self._apart_rule(*names)
        if (reason := self._listed(cls, self.refused)) is not None:
            return refusing(reason)
        described_inside = {path for block in self.window_blocks.values() for path, _ in block.inside.values()}
        if any(_named(path) is cls for path in described_inside):
            return None  # the block around it has the rule
        if self.resembling(cls) and not is_stand_in(cls):  # what stands in for one is made of what fused
            return refusing(lambda module: self.why_unknown(module) or UNKNOWN)
        return None

    def _body_rule(self, kind: str, described: Described) -> Rule:
        def reason(module: nn.Module) -> str | None:
            return described.oddity(module, self.library) or reason_against(described.parts(module))

        def fold(module: nn.Module, backend: Backend) -> nn.Module:
            parts: AttentionParts | AnyFFNParts = described.parts(module)
            fused: nn.Module
            if isinstance(parts, AttentionParts):
                fused = fold_attention(parts, backend)
            else:
                fused = fold_ffn(parts, backend)
            return described.alone(fused, module)

        return Rule(kind, reason, fold, parts=described.parts)

    def _block_rule(self, kind: str, described: Described) -> Rule:
        def reason(block: nn.Module) -> str | None:
            """None if one half or both can be fused with norm and shortcut."""
            if (oddity := described.oddity(block, self.library)) is not None:
                return oddity
            reasons = {name: can_fuse(half) for name, half in described.parts(block).named_children()}
            return None if None in reasons.values() else "; ".join(f"{name}: {why}" for name, why in reasons.items())

        def fold(block: nn.Module, backend: Backend) -> nn.Module:
            return described.closed(block, described.parts(block))  # halves are fused on their own, by their rule

        return Rule(kind, reason, fold, keeps_children=True)

    def _apart_rule(self, first: str, act: str, second: str) -> Rule:
        """Between ``first`` and ``second`` only ``act`` stands; both are Linears in modules of their own, or all three
        are the layer's own children."""
        own = "." not in first
        whole, rest = (first, (act, second)) if own else (first.rpartition(".")[0], (second.rpartition(".")[0],))

        def parts(layer: nn.Module) -> FFNParts:
            fc1, middle, fc2 = (plain(layer.get_submodule(name)) for name in (first, act, second))
            return FFNParts(fc1, middle, fc2)

        def reason(layer: nn.Module) -> str | None:
            if isinstance(layer.get_submodule(whole), PartialGELUFFN):
                return FUSED_INSIDE
            return reason_against(parts(layer))

        def fold(layer: nn.Module, backend: Backend) -> nn.Module:
            fused = fold_ffn(parts(layer), backend)
            layer.set_submodule(whole, fused)
            for name in rest:
                layer.set_submodule(name, nn.Identity())
            return layer

        return Rule("partial_gelu_ffn", reason, fold)

    def _whole_rule(self, kind: str, described: Described) -> Rule:
        def reason(block: nn.Module) -> str | None:
            if (oddity := described.oddity(block, self.library)) is not None:
                return oddity
            parts: WholeBlock = described.parts(block)
            return reason_against(parts.attn) or reason_against(parts.mlp)

        def fold(block: nn.Module, backend: Backend) -> nn.Module:
            parts: WholeBlock = described.parts(block)
            made = parts.call(fold_attention(parts.attn, backend), fold_ffn(parts.mlp, backend))
            vars(made).update(parts.attributes)
            return described.closed(block, made)

        return Rule(kind, reason, fold)

    def _window_rule(self, kind: str, described: Described) -> Rule:
        def reason(block: nn.Module) -> str | None:
            if (oddity := described.oddity(block, self.library)) is not None:
                return oddity
            parts: WindowBlock = described.parts(block)
            against = None if isinstance(parts.mlp, OpenBranch) else reason_against(parts.mlp)
            return reason_against(parts.attn) or against

        def fold(block: nn.Module, backend: Backend) -> nn.Module:
            parts: WindowBlock = described.parts(block)
            mlp = parts.mlp if isinstance(parts.mlp, OpenBranch) else fold_ffn(parts.mlp, backend)
            made = parts.call(fold_window_attention(parts.attn, backend), mlp)
            vars(made).update(parts.attributes)
            return described.closed(block, made)

        return Rule(kind, reason, fold)


UNKNOWN = "repavit_ops has no operator for what it computes"


def refusing(reason: str | Callable[[nn.Module], str]) -> Rule:
    """The rule for a class that no operator computes."""

    def why(module: nn.Module) -> str:
        return reason if isinstance(reason, str) else reason(module)

    def fold(module: nn.Module, backend: Backend) -> nn.Module:
        raise TypeError(f"{type(module).__name__} cannot be fused: {why(module)}")

    return Rule("unsupported", why, fold)


def _release(library: str) -> str:
    """The installed version of a library, for a reason."""
    version = getattr(sys.modules.get(library), "__version__", None)
    return f"this version of {library}" if version is None else f"{library} {version}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _named(path: str) -> Any:
    """The class of a dotted name, if its module is loaded and has it."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
