"""Models whose FFNs are folded while attention stays: what is idled, and what files of idled models are built on."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..models.swin import SwinBlock
from ..nn.foreign_block import OpenBranch
from .rules import rule_of
from .verbs import TRAINING_FORMS, fuse


def open_ffns(model: nn.Module, only: Collection[str] | None = None) -> nn.Module:
    """A copy of ``model`` with the FFN of its blocks (of those named ``only``) folded, in plain PyTorch.

    The copy computes what ``model`` computes, up to the rounding of the folded LayerNorm affine and LayerScale. Blocks
    that are not named are left as they are, bit for bit, but for Swin's, whose attention is folded with the FFN.

    Args:
        model: any model in evaluation mode.
        only: names of blocks, or of FFNs in them; None for all.

    Raises:
        RuntimeError: the model is in training mode.
    """

    def wanted(module: nn.Module, name: str) -> bool:
        return _is_ffn(module) and (only is None or name in only or name.rpartition(".")[0] in only)

    return fuse(model, backend="reference", filter_fn=wanted)


def _is_ffn(module: nn.Module) -> bool:
    """Whether a sub-block is, or holds, an FFN that fuse() folds; attention stays as it is where it is apart."""
    if isinstance(module, TRAINING_FORMS) or type(module) is SwinBlock:  # SwinBlock: its mlp is a child of its own
        return False
    rule = rule_of(module.body if isinstance(module, OpenBranch) else module)
    if rule is None:
        return True
    holds_ffn = hasattr(module, "mlp")  # timm's Swin block, whose rule is attention's
    return rule.kind in ("partial_gelu_ffn", "gated_ffn", "block") or holds_ffn
