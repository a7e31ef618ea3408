"""The sub-blocks, patch embeddings and mergings of this library's own models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ...backends import Backend
from ...models.lvvit import ConvStem, FusedConvStem
from ...models.patch_embed import PatchEmbed
from ...models.swin import PatchMerging, SwinBlock, SwinPatchEmbed
from ...nn import FFN, Attention, Block, GatedFFN, PartialGELUFFN, RepAttention, WindowRepAttention
from ...nn.foreign_block import OpenBranch
from ...nn.foreign_signatures import FirstOfTuple
from ...nn.packed_weights import PackedWeights
from ..folding import (
    AttentionParts,
    FFNParts,
    WindowParts,
    attention_parts,
    fold_attention,
    fold_ffn,
    fold_window_attention,
    reason_against,
)
from ..halves import HALF
from ..patches import MergingParts, fold_merging, fuse_convolution
from ..rules import Meaning, Projection, Rule


def _ffn(module: FFN) -> FFNParts:
    return FFNParts(
        module.fc1,
        module.act,
        module.fc2,
        norm=module.norm,
        output_scale=module.output_scale(),
        residual=module.residual,
    )


def _swin(block: SwinBlock) -> WindowParts:
    attn: Any = block.attn
    attention = AttentionParts(
        attn.qkv,
        attn.proj,
        attn.num_heads,
        attn.d_qk,
        attn.scale,
        norm=block.norm1,
        output_scale=block.output_scale(),
        residual=block.residual,
    )
    return WindowParts(attention, attn.rel_bias(), attn.window, attn.shift)


def _set_backend(module: PackedWeights, backend: Backend) -> nn.Module:
    if backend == "reference":
        module.restore_unpacked()
    module.backend = backend
    return module


def _fused_already(kind: str) -> Rule:
    return Rule(kind, lambda _: None, _set_backend, is_fused=True)


RULES: dict[type[nn.Module], Rule] = {
    Attention: Rule(
        "rep_attention",
        lambda m: reason_against(attention_parts(m)),
        lambda m, backend: fold_attention(attention_parts(m), backend),
    ),
    FFN: Rule("partial_gelu_ffn", lambda m: reason_against(_ffn(m)), lambda m, backend: fold_ffn(_ffn(m), backend)),
    SwinBlock: Rule(
        "window_rep_attention",
        lambda m: reason_against(_swin(m)),
        lambda m, backend: Block(fold_window_attention(_swin(m), backend), m.mlp),
    ),
    OpenBranch: HALF,
    FirstOfTuple: HALF,
    PartialGELUFFN: _fused_already("partial_gelu_ffn"),
    GatedFFN: _fused_already("gated_ffn"),
    RepAttention: _fused_already("rep_attention"),
    WindowRepAttention: _fused_already("window_rep_attention"),
}


def _fold_stem(stem: ConvStem, backend: Backend) -> nn.Module:
    return FusedConvStem.folding(stem, backend) if stem.as_built() else stem


def _fold_merging(merging: Any, backend: Backend) -> nn.Module:
    return fold_merging(MergingParts(merging.norm, merging.reduction), backend) or merging


PROJECTIONS: dict[type[nn.Module], Projection] = {
    ConvStem: _fold_stem,
    PatchEmbed: fuse_convolution,
    SwinPatchEmbed: fuse_convolution,
    PatchMerging: _fold_merging,
}


class _Ours:
    """The tables above as a source of rules."""

    def rule_for(self, cls: type[nn.Module]) -> Rule | None:
        return RULES.get(cls)

    def projection_for(self, cls: type[nn.Module]) -> Projection | None:
        return PROJECTIONS.get(cls)

    def loop_for(self, cls: type[nn.Module]) -> str | None:
        return None

    def reset_for(self, cls: type[nn.Module]) -> Callable[[Any], None] | None:
        return None

    def known(self) -> Iterable[str]:
        return [f"{cls.__module__}.{cls.__qualname__}" for cls in RULES]

    def meaning_for(self, cls: type[nn.Module]) -> Meaning | None:
        return None


OURS = _Ours()
