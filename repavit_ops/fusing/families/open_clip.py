"""open_clip's Vision Transformer and text transformer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ...nn import QuickGELU
from ...nn.foreign_block import ChannelScale
from ...nn.foreign_signatures import OpenClipBlock
from ..family import Described, Family, WholeBlock
from ..folding import FFNParts, layer_norm
from ..rules import plain
from .torch import multihead_attention, why_not_multihead


def _block(block: Any) -> WholeBlock:
    attn, mlp = block.attn, block.mlp
    first, second = (_gamma(scale) for scale in (block.ls_1, block.ls_2))
    return WholeBlock(
        replace(multihead_attention(attn), norm=plain(block.ln_1), output_scale=first, residual=True),
        FFNParts(mlp.c_fc, plain(mlp.gelu), mlp.c_proj, norm=plain(block.ln_2), output_scale=second, residual=True),
        OpenClipBlock,
        {"batch_first": attn.batch_first, "num_heads": attn.num_heads},
    )


def _gamma(scale: nn.Module) -> Any:
    found = plain(scale)
    return found.gamma if isinstance(found, ChannelScale) else None


def _why_not(block: Any) -> str | None:
    names = [name for name, _ in block.mlp.named_children()]
    if names != ["c_fc", "gelu", "c_proj"]:
        return f"its FFN is a sequence of {', '.join(names)}, wanted c_fc, gelu, c_proj"
    for scale in (block.ls_1, block.ls_2):
        if type(plain(scale)) not in (nn.Identity, ChannelScale):
            return f"{type(scale).__name__} stands between a branch and its shortcut"
    return why_not_multihead(block.attn)


BLOCK = Described(
    _block,
    holds=("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"),
    refuses={"ln_1_kv": "cross-attention: its keys and values are not the tokens"},
    unless=_why_not,
    keeps_class=True,
)


POOLING = "attention pooling: its queries are not the tokens"

OPEN_CLIP = Family(
    "open_clip",
    whole_blocks={"open_clip.transformer.ResidualAttentionBlock": BLOCK},
    refused={
        "open_clip.transformer.CustomResidualAttentionBlock": "it normalises or scales q, k, heads or FFN",
        "open_clip.transformer.AttentionalPooler": POOLING,
    },
    loops={"open_clip.transformer.Transformer": "resblocks"},
    meanings={
        "open_clip.transformer.QuickGELU": lambda _: QuickGELU(),
        "open_clip.transformer.LayerNorm": layer_norm,
        "open_clip.transformer.LayerNormFp32": layer_norm,
        "open_clip.transformer.LayerScale": lambda scale: ChannelScale(scale.gamma),
    },
    patch_embeddings={"open_clip.transformer.VisionTransformer": "conv1"},
)
