"""torchvision's Vision Transformer and Swin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ...nn import Block
from ...nn.foreign_block import FixedWindowBlock, OpenBranch
from ..family import Described, Family, WholeBlock, WindowBlock
from ..folding import AttentionParts, FFNParts, WindowParts
from ..patches import MergingParts
from .torch import multihead_attention, why_not_multihead


def _mlp(mlp: Any) -> FFNParts:
    """torchvision's MLP is a sequence: Linear, GELU, Dropout, Linear, Dropout."""
    fc1, act, _, fc2, _ = mlp
    return FFNParts(fc1, act, fc2)


def _why_not_mlp(mlp: Any) -> str | None:
    kinds = [type(part) for part in mlp]
    if len(kinds) == 5 and kinds[2] is kinds[4] is nn.Dropout:
        return None
    found = ", ".join(kind.__name__ for kind in kinds)
    return f"it is a sequence of {found}, wanted Linear, GELU, Dropout, Linear, Dropout"


MLP = Described(_mlp, holds=("0", "1", "2", "3", "4"), unless=_why_not_mlp)


def _encoder_block(block: Any) -> WholeBlock:
    return WholeBlock(
        replace(multihead_attention(block.self_attention), norm=block.ln_1, residual=True),
        replace(_mlp(block.mlp), norm=block.ln_2, residual=True),
        Block,
    )


def _why_not_block(block: Any) -> str | None:
    attn = block.self_attention
    if (reason := why_not_multihead(attn) or _why_not_mlp(block.mlp)) is not None:
        return reason
    return None if attn.batch_first else "its attention is not batch_first"


ENCODER_BLOCK = Described(
    _encoder_block,
    holds=("ln_1", "self_attention", "dropout", "ln_2", "mlp", "num_heads"),
    unless=_why_not_block,
)


def _swin_block(block: Any) -> WindowBlock:
    attn = block.attn
    d_qk = attn.qkv.in_features // attn.num_heads if type(attn.qkv) is nn.Linear else 0
    scale = d_qk**-0.5 if d_qk else 1.0
    attention = AttentionParts(attn.qkv, attn.proj, attn.num_heads, d_qk, scale, norm=block.norm1, residual=True)
    windows = WindowParts(
        attention,
        attn.get_relative_position_bias()[0].detach(),
        tuple(attn.window_size),
        tuple(attn.shift_size),
        shift_by_axis=True,
    )
    return WindowBlock(windows, OpenBranch(block.norm2, block.mlp, block.stochastic_depth), FixedWindowBlock)


SWIN_BLOCK = Described(
    _swin_block,
    holds=("norm1", "attn", "stochastic_depth", "norm2", "mlp"),
    inside={
        "attn": (
            "torchvision.models.swin_transformer.ShiftedWindowAttention",
            (
                *("qkv", "proj", "num_heads", "window_size", "shift_size", "attention_dropout", "dropout"),
                *("relative_position_bias_table", "relative_position_index"),
            ),
        )
    },
)

RELATIVE = "relative position biases are added to the scores"
COSINE = "cosine attention normalises q and k in between"

TORCHVISION = Family(
    "torchvision",
    ffns={
        "torchvision.models.vision_transformer.MLPBlock": MLP,
        "torchvision.ops.misc.MLP": MLP,
    },
    whole_blocks={"torchvision.models.vision_transformer.EncoderBlock": ENCODER_BLOCK},
    window_blocks={"torchvision.models.swin_transformer.SwinTransformerBlock": SWIN_BLOCK},
    refused={
        "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": COSINE,
        "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": RELATIVE,
    },
    meanings={"torchvision.ops.stochastic_depth.StochasticDepth": lambda _: nn.Identity()},
    patch_embeddings={
        "torchvision.models.vision_transformer.VisionTransformer": "conv_proj",
        "torchvision.models.swin_transformer.SwinTransformer": "features.0.0",
    },
    mergings={
        "torchvision.models.swin_transformer.PatchMerging": lambda merging: MergingParts(
            merging.norm, merging.reduction
        )
    },
)
