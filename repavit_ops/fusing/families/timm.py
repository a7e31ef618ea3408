"""The ViT-like families of timm."""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import nn

from ...nn import Block, QuickGELU
from ...nn.foreign_block import (
    ChannelScale,
    FixedWindowBlock,
    ForwardingBlock,
    MaskedAttention,
    MaskedBlock,
    OpenBranch,
)
from ...nn.foreign_signatures import RotaryAttention, RotaryBlock
from ..family import Described, Family, WindowBlock
from ..folding import (
    AttentionParts,
    FFNParts,
    GatedFFNParts,
    WindowParts,
    halves_of,
    layer_norm,
    linear,
    repeated_heads,
    rms_norm,
)
from ..patches import MergingParts
from ..rules import plain

# --- attention and FFN, as they stand in a block or anywhere else -----------------------------------------------------


def _attention(attn: Any) -> AttentionParts:
    scale = attn.head_dim**-0.5 if attn.fused_attn else attn.scale  # what its forward takes
    return AttentionParts(
        attn.qkv,
        attn.proj,
        attn.num_heads,
        attn.head_dim,
        scale,
        keep_v_bias=True,
        q_norm=_norm(attn, "q_norm"),
        k_norm=_norm(attn, "k_norm"),
        inner_norm=_norm(attn, "norm"),
    )


def _norm(attn: Any, name: str) -> nn.Module:
    """A norm that older classes have not; ``norm`` stands between the heads and their projection (``scale_norm``)."""
    return plain(getattr(attn, name, nn.Identity()))


BEHIND = {"gate": "a gate multiplies the attention output"}

ATTENTION = Described(
    _attention,
    holds=("qkv", "proj", "attn_drop", "proj_drop", "num_heads", "head_dim", "scale", "fused_attn"),
    may_hold=("attn_dim", "q_norm", "k_norm", "norm"),
    refuses=BEHIND,
    alone=lambda fused, _: MaskedAttention(fused),
)


def _rotary_attention(attn: Any) -> AttentionParts:
    """AttentionRope and EVA's: one projection or three; EVA holds the biases of the one apart."""
    qkv: Any
    if attn.qkv is None:
        groups = getattr(attn, "num_kv_groups", 1)  # heads that share their keys and values
        shared = (repeated_heads(part, groups, attn.head_dim) for part in (attn.k_proj, attn.v_proj))
        qkv = (attn.q_proj, *shared)
    elif getattr(attn, "q_bias", None) is not None and type(attn.qkv) is nn.Linear:
        qkv = linear(attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
    else:
        qkv = attn.qkv
    return AttentionParts(
        qkv,
        attn.proj,
        attn.num_heads,
        attn.head_dim,
        attn.head_dim**-0.5 if attn.fused_attn else attn.scale,
        keep_v_bias=True,
        q_norm=_norm(attn, "q_norm"),
        k_norm=_norm(attn, "k_norm"),
        rotary_layout="half" if getattr(attn, "rotate_half", False) else "interleaved",
        inner_norm=_norm(attn, "norm"),
    )


ROTARY_ATTENTION = Described(
    _rotary_attention,
    holds=("proj", "attn_drop", "proj_drop", "num_heads", "head_dim", "scale", "fused_attn", "num_prefix_tokens"),
    may_hold=(
        *("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias", "qkv_bias_separate", "q_norm", "k_norm"),
        *("rotate_half", "attn_dim", "kv_dim", "num_kv_heads", "num_kv_groups", "norm"),
    ),
    refuses=BEHIND,
    alone=lambda fused, _: RotaryAttention(fused),
)


def _biased_attention(attn: Any) -> AttentionParts:
    """BEiT's: q and v have biases of their own, and relative position biases are added to the scores."""
    bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    heads = attn.num_heads
    d_qk = attn.proj.in_features // heads if type(attn.proj) is nn.Linear else 0
    scale = d_qk**-0.5 if attn.fused_attn and d_qk else attn.scale
    relative = None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias().detach()
    qkv = linear(attn.qkv.weight, bias) if type(attn.qkv) is nn.Linear else attn.qkv
    return AttentionParts(qkv, attn.proj, heads, d_qk, scale, keep_v_bias=True, takes_bias=True, bias=relative)


BEIT_ATTENTION = Described(
    _biased_attention,
    holds=("qkv", "q_bias", "v_bias", "proj", "attn_drop", "proj_drop", "num_heads", "scale", "fused_attn"),
    may_hold=(
        *("k_bias", "qkv_bias_separate", "window_size", "num_relative_distance"),
        *("relative_position_bias_table", "relative_position_index"),
    ),
)

MLP = Described(
    lambda mlp: FFNParts(mlp.fc1, plain(mlp.act), mlp.fc2),
    holds=("fc1", "act", "drop1", "fc2", "drop2"),
    refuses={"norm": "a norm stands between activation and fc2"},
)


def _packed_gate(mlp: Any) -> GatedFFNParts:
    """Gate and values in one projection, either above the other."""
    first, second = halves_of(mlp.fc1)
    gate, up = (second, first) if mlp.gate_last else (first, second)
    return GatedFFNParts(gate, up, plain(mlp.act), mlp.fc2, inner_norm=plain(mlp.norm))


GLU_MLP = Described(
    _packed_gate,
    holds=("fc1", "act", "drop1", "norm", "fc2", "drop2", "gate_last", "chunk_dim"),
    unless=lambda mlp: None if mlp.chunk_dim == -1 else "its layers are convolutions; only nn.Linear can be fused",
)
SWIGLU = Described(
    lambda mlp: GatedFFNParts(mlp.fc1_g, mlp.fc1_x, plain(mlp.act), mlp.fc2, inner_norm=plain(mlp.norm)),
    holds=("fc1_g", "fc1_x", "act", "drop1", "norm", "fc2", "drop2"),
)

# --- blocks -----------------------------------------------------------------------------------------------------------


def _halves(block: Any) -> tuple[OpenBranch, OpenBranch]:
    """``x + drop_path1(ls1(attn(norm1(x))))``, then the same of mlp."""
    return (
        OpenBranch(block.norm1, block.attn, block.ls1, block.drop_path1),
        OpenBranch(block.norm2, block.mlp, block.ls2, block.drop_path2),
    )


VIT_HOLDS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
VIT_BLOCK = Described(lambda block: MaskedBlock(*_halves(block)), holds=VIT_HOLDS)
RELATIVE_BLOCK = Described(lambda block: ForwardingBlock(*_halves(block)), holds=VIT_HOLDS)


def _gamma_halves(block: Any) -> tuple[OpenBranch, OpenBranch]:
    """LayerScale vectors gamma_1, gamma_2 are parameters of the block, or None."""
    first, second = ([] if gamma is None else [ChannelScale(gamma)] for gamma in (block.gamma_1, block.gamma_2))
    return (
        OpenBranch(block.norm1, block.attn, *first, block.drop_path1),
        OpenBranch(block.norm2, block.mlp, *second, block.drop_path2),
    )


def _gamma_block(call: type[Block]) -> Described:
    return Described(
        lambda block: call(*_gamma_halves(block)),
        holds=("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2", "gamma_1", "gamma_2"),
        may_hold=("init_values",),
    )


# --- Swin -------------------------------------------------------------------------------------------------------------


def _swin_block(block: Any) -> WindowBlock:
    attn = block.attn
    d_qk = attn.proj.in_features // attn.num_heads if type(attn.proj) is nn.Linear else 0
    scale = d_qk**-0.5 if attn.fused_attn and d_qk else attn.scale
    attention = AttentionParts(attn.qkv, attn.proj, attn.num_heads, d_qk, scale, norm=plain(block.norm1), residual=True)
    windows = WindowParts(
        attention,
        attn._get_rel_pos_bias()[0].detach(),
        tuple(attn.window_size),
        tuple(block.shift_size),
        roll_first=True,
        static_shift=True,
    )
    return WindowBlock(windows, OpenBranch(block.norm2, block.mlp, block.drop_path2), FixedWindowBlock)


SWIN_BLOCK = Described(
    _swin_block,
    holds=("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2", "window_size", "shift_size"),
    may_hold=(
        *("dim", "input_resolution", "target_shift_size", "always_partition", "dynamic_mask", "window_area"),
        *("mlp_ratio", "attn_mask"),
    ),
    inside={
        "attn": (
            "timm.models.swin_transformer.WindowAttention",
            (
                *("qkv", "proj", "attn_drop", "proj_drop", "softmax", "relative_position_bias_table", "num_heads"),
                *("relative_position_index", "scale", "dim", "window_size", "window_area", "fused_attn"),
            ),
        )
    },
)

# --- what else stands in a model --------------------------------------------------------------------------------------


def _layer_scale(scale: Any) -> nn.Module:
    return ChannelScale(scale.gamma)


SPATIAL_GATE = "its gate is a layer over all tokens"
POOLING = "attention pooling: its queries are not the tokens"
COSINE = "cosine attention normalises q and k in between"
PARALLEL = "attention and FFN run in parallel on one projection"

TIMM = Family(
    "timm",
    ready=lambda: hasattr(sys.modules.get("timm.models"), "create_model"),  # else in the middle of its import
    attentions={
        "timm.layers.Attention": ATTENTION,
        "timm.models.beit.Attention": BEIT_ATTENTION,
        "timm.layers.AttentionRope": ROTARY_ATTENTION,
        "timm.models.eva.EvaAttention": ROTARY_ATTENTION,
        "timm.models.vision_transformer.Attention": ATTENTION,  # up to some 1.0.x the class is that module's own
    },
    ffns={"timm.layers.Mlp": MLP},
    gated_ffns={"timm.layers.GluMlp": GLU_MLP, "timm.layers.SwiGLU": SWIGLU},
    blocks={
        "timm.models.vision_transformer.Block": VIT_BLOCK,
        "timm.models.vision_transformer_relpos.RelPosBlock": RELATIVE_BLOCK,
        "timm.models.eva.EvaBlock": _gamma_block(RotaryBlock),
        "timm.models.beit.Block": _gamma_block(ForwardingBlock),
    },
    window_blocks={"timm.models.swin_transformer.SwinTransformerBlock": SWIN_BLOCK},
    refused={
        "timm.layers.DiffAttention": "differential attention subtracts a second softmax",
        "timm.layers.AttentionPoolLatent": POOLING,
        "timm.layers.AttentionPoolPrr": POOLING,
        "timm.models.cait.TalkingHeadAttn": "talking heads: its heads are mixed before and after the softmax",
        "timm.models.cait.ClassAttn": "class attention: the class token alone asks",
        "timm.layers.GatedMlp": SPATIAL_GATE,
        "timm.layers.GlobalResponseNormMlp": "a norm over all tokens stands between activation and fc2",
        "timm.layers.ConvMlp": "its layers are convolutions; only nn.Linear can be fused",
        "timm.models.vision_transformer_relpos.RelPosAttention": "relative position biases are added to the scores",
        "timm.models.vision_transformer_sam.Attention": "relative position biases depend on q",
        "timm.models.swin_transformer_v2.WindowAttention": COSINE,
        "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": COSINE,
        "timm.models.vision_transformer.ParallelScalingBlock": PARALLEL,
        "timm.models.vision_transformer.DiffParallelScalingBlock": PARALLEL,
    },
    resembling=lambda cls: re.search(r"Attention|Attn|Mlp$|FFN$", cls.__name__) is not None,
    meanings={
        "timm.layers.activations.GELU": lambda _: nn.GELU(),
        "timm.layers.activations.GELUTanh": lambda _: nn.GELU("tanh"),
        "timm.layers.activations.QuickGELU": lambda _: QuickGELU(),
        "timm.layers.LayerNorm": layer_norm,
        "timm.layers.LayerNormFp32": layer_norm,
        "timm.layers.RmsNorm": lambda norm: rms_norm(norm, norm.eps),
        "timm.layers.RmsNormFp32": lambda norm: rms_norm(norm, norm.eps),
        "timm.layers.LayerScale": _layer_scale,
        "timm.models.vision_transformer.LayerScale": _layer_scale,
        "timm.layers.DropPath": lambda _: nn.Identity(),
    },
    # with mixed frequencies each block gets tables of its own
    loops={"timm.models.eva.Eva": lambda eva: None if getattr(eva, "rope_mixed", False) else "blocks"},
    patch_embeddings={"timm.layers.patch_embed.PatchEmbed": "proj"},
    mergings={
        "timm.models.swin_transformer.PatchMerging": lambda merging: MergingParts(merging.norm, merging.reduction)
    },
)
