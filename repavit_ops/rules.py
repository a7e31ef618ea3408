"""Which classes of modules are sub-blocks, and the rule that fuses each; why a module cannot be fused.

Rules go by exact class, so that a subclass with a forward of its own is never touched. Those of other libraries join
when the library is loaded already (:mod:`repavit_ops.rules_timm`); nothing here imports one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .backends import Backend
from .folding import (
    AttentionParts,
    FFNParts,
    WindowParts,
    attention_parts,
    fold_attention,
    fold_ffn,
    fold_window_attention,
    reason_against,
)
from .models.swin import SwinBlock
from .nn import FFN, Attention, Block, PartialGELUFFN, RepAttention, WindowRepAttention
from .nn.packed_weights import PackedWeights


@dataclass(frozen=True)
class Rule:
    """How one class of sub-block is fused: ``can_fuse`` gives None or a reason, ``fold`` the fused module.

    ``keeps_children``: fold only rearranges, so that the children live on, hooks in them too.
    """

    kind: str
    can_fuse: Callable[[Any], str | None]
    fold: Callable[[Any, Backend], nn.Module]
    keeps_children: bool = False


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module of exactly this class; None for modules that are no sub-block of a known family."""
    return RULES.get(type(module)) or _timm_rule(type(module))


def can_fuse(module: nn.Module) -> str | None:
    """None if :func:`repavit_ops.fuse` can fuse this sub-block, else the reason in one line."""
    rule = rule_of(module)
    if rule is None:
        return f"{type(module).__name__} is no sub-block that repavit_ops knows"
    if rule.fold is not _set_backend and any(map(_has_hooks, [module] if rule.keeps_children else module.modules())):
        return "it has hooks, which a fused module would not call; remove them first"
    if (reason := rule.can_fuse(module)) is not None:
        return reason
    replaced = next((m for m in module.modules() if "forward" in vars(m)), None)
    if replaced is not None and not rule.keeps_children:
        return f"the forward of its {type(replaced).__name__} was replaced on the instance; a fused module has its own"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def _timm_rule(cls: type[nn.Module]) -> Rule | None:
    if not hasattr(sys.modules.get("timm.models"), "create_model"):  # not loaded, or in the middle of its import
        return None
    from .rules_timm import rule_for

    return rule_for(cls)


# --- our modules ------------------------------------------------------------------------------------------------------


def _ffn_parts(module: FFN) -> FFNParts:
    return FFNParts(module.norm, module.fc1, module.fc2, module.act, module.output_scale(), module.residual)


def _swin_parts(block: SwinBlock) -> WindowParts:
    attn: Any = block.attn
    attention = AttentionParts(
        block.norm1, attn.qkv, attn.proj, attn.num_heads, attn.d_qk, attn.scale, block.output_scale(), block.residual
    )
    return WindowParts(attention, attn.rel_bias(), attn.window, attn.shift)


def _set_backend(module: PackedWeights, backend: Backend) -> nn.Module:
    if backend == "reference":
        module.restore_unpacked()
    module.backend = backend
    return module


def _fusible(_: nn.Module) -> None:
    return None


RULES: dict[type[nn.Module], Rule] = {
    Attention: Rule(
        "rep_attention",
        lambda m: reason_against(attention_parts(m)),
        lambda m, backend: fold_attention(attention_parts(m), backend),
    ),
    FFN: Rule(
        "partial_gelu_ffn",
        lambda m: reason_against(_ffn_parts(m)),
        lambda m, backend: fold_ffn(_ffn_parts(m), backend),
    ),
    SwinBlock: Rule(
        "window_rep_attention",
        lambda m: reason_against(_swin_parts(m)),
        lambda m, backend: Block(fold_window_attention(_swin_parts(m), backend), m.mlp),
    ),
    PartialGELUFFN: Rule("partial_gelu_ffn", _fusible, _set_backend),
    RepAttention: Rule("rep_attention", _fusible, _set_backend),
    WindowRepAttention: Rule("window_rep_attention", _fusible, _set_backend),
}
