"""How the layers of transformers 5 are read whose queries and keys turn: the parts, what takes a layer's place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ...nn.foreign_signatures import EagerAttention, OpenBranch, RotaryLayer, TransformersRotaryAttention
from ...nn.packed_sequences import (
    BlockMaskedLayer,
    PackedSequenceAttention,
    PackedSequenceAttentionTuple,
    PackedSequenceBlock,
)
from ...nn.rotary_layers import (
    AttentionCausalUnlessMasked,
    CausalUnlessMasked,
    Llama4Attention,
    Llama4Layer,
    MLCDAttention,
    MLCDLayer,
    Sam3Attention,
    VJEPA2Attention,
    VJEPA2Layer,
)
from ...nn.stand_in import standing_in
from ..family import Described
from ..folding import AttentionParts, repeated_heads
from ..rules import plain
from .transformers_layers import CLIP_HEADS, HEADS, attention_of, layer_of, needs_maps

ROTARY_HEADS = {"num_heads": "num_heads", "scale": "scaling", "proj": "o_proj"}


def _alone(kind: type[Any] = TransformersRotaryAttention) -> Any:
    def alone(fused: Any, attn: Any) -> nn.Module:
        return standing_in(kind(fused, EagerAttention(attn.config)), attn)

    return alone


# --- DINOv3, MLCD, Pixtral, Llama 4, SAM 3 ----------------------------------------------------------------------------

DINO3_ATTENTION = attention_of(ROTARY_HEADS, rotary_layout="half", alone=_alone())
DINO3_LAYER = layer_of(
    *("attention", ("norm1", "norm2"), ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")), block=RotaryLayer
)


def _sapiens2_attention(attn: Any) -> AttentionParts:
    groups = attn.num_key_value_groups  # heads that share their keys and values
    shared = (repeated_heads(part, groups, attn.head_dim) for part in (attn.k_proj, attn.v_proj))
    found: AttentionParts = DINO3_ATTENTION.parts(attn)
    return replace(found, qkv=(attn.q_proj, *shared), q_norm=plain(attn.q_norm), k_norm=plain(attn.k_norm))


SAPIENS2_ATTENTION = replace(
    DINO3_ATTENTION,
    parts=_sapiens2_attention,
    holds=(*DINO3_ATTENTION.holds, "num_key_value_groups", "q_norm", "k_norm"),
    may_hold=(*DINO3_ATTENTION.may_hold, "num_key_value_heads"),
)
MLCD_ATTENTION = attention_of(CLIP_HEADS, rotary_layout="half", alone=_alone(MLCDAttention))
MLCD_LAYER = layer_of("self_attn", ("layer_norm1", "layer_norm2"), block=MLCDLayer, may_hold=("embed_dim",))
PIXTRAL_ATTENTION = DINO3_ATTENTION
PIXTRAL_LAYER = layer_of("attention", ("attention_norm", "ffn_norm"), ffn="feed_forward", block=BlockMaskedLayer)
LLAMA4_ATTENTION = attention_of(ROTARY_HEADS, rotary_layout="interleaved", alone=_alone(Llama4Attention), causal=False)
LLAMA4_LAYER = layer_of(
    *("self_attn", ("input_layernorm", "post_attention_layernorm")), block=Llama4Layer, may_hold=("hidden_size",)
)
# its windows are cut, and padded with zeros, behind the norm, so that norm and shortcut stay outside
SAM3_ATTENTION = attention_of(HEADS, "hidden_size", rotary_layout="interleaved", alone=_alone(Sam3Attention))

# --- Phi-4 ------------------------------------------------------------------------------------------------------------

PHI4_ATTENTION = attention_of(CLIP_HEADS | {"scale": "scaling"}, alone=_alone(AttentionCausalUnlessMasked))
PHI4_LAYER = layer_of("self_attn", ("layer_norm1", "layer_norm2"), block=CausalUnlessMasked, may_hold=("embed_dim",))

# --- V-JEPA 2 ---------------------------------------------------------------------------------------------------------


def _vjepa2_attention(attn: Any) -> AttentionParts:
    return AttentionParts(
        (attn.query, attn.key, attn.value),
        attn.proj,
        attn.num_attention_heads,
        attn.attention_head_size,
        attn.scaling,
        rotary_layout="interleaved",
    )


def _grid(attn: Any) -> tuple[int, int]:
    return attn.grid_size, attn.d_dim


def _vjepa2_alone(fused: Any, attn: Any) -> nn.Module:
    alone = _alone(VJEPA2Attention)(fused, attn)
    vars(alone)["attention_grid"] = _grid(attn)
    return alone


def _vjepa2_layer(layer: Any) -> VJEPA2Layer:
    closed: VJEPA2Layer = VJEPA2_HALVES.parts(layer)
    vars(closed)["attention_grid"] = _grid(layer.attention)
    return closed


VJEPA2_ATTENTION = Described(
    _vjepa2_attention,
    holds=(
        *("query", "key", "value", "proj", "num_attention_heads", "attention_head_size", "scaling", "config"),
        *("grid_size", "d_dim", "h_dim", "w_dim", "is_causal"),
    ),
    may_hold=("hidden_size", "all_head_size", "dropout_prob", "dropout", "grid_depth"),
    unless=needs_maps,
    alone=_vjepa2_alone,
)
VJEPA2_HALVES = layer_of("attention", ("norm1", "norm2"), ("drop_path",), ("drop_path",), block=VJEPA2Layer)
VJEPA2_LAYER = Described(
    _vjepa2_layer,
    holds=VJEPA2_HALVES.holds,
    may_hold=("config", "hidden_size", "num_attention_heads", "mlp_ratio"),
    keeps_class=True,
)

# --- images of many sizes in one sequence -----------------------------------------------------------------------------


def _packed_sequence_attention(names: tuple[str, ...], tupled: bool = False, proj: str = "proj") -> Described:
    """One whose projections of q, k and v are called so, or which has one for the three."""

    def parts(attn: Any) -> AttentionParts:
        qkv: Any = tuple(getattr(attn, name) for name in names) if len(names) == 3 else getattr(attn, *names)
        heads = (attn.num_heads, attn.head_dim, attn.scaling)
        found = AttentionParts(qkv, getattr(attn, proj), *heads, rotary_layout="half")
        return (
            replace(found, q_norm=plain(attn.q_norm), k_norm=plain(attn.k_norm)) if hasattr(attn, "q_norm") else found
        )

    def alone(fused: Any, attn: Any) -> nn.Module:
        kind = PackedSequenceAttentionTuple if tupled else PackedSequenceAttention
        return standing_in(kind(fused), attn)

    return Described(
        parts,
        holds=(*names, proj, "num_heads", "head_dim", "scaling", "config", "is_causal"),
        may_hold=("dim", "embed_dim", "num_key_value_groups", "attention_dropout", "q_norm", "k_norm"),
        unless=needs_maps,
        alone=alone,
    )


PACKED_ATTENTION = _packed_sequence_attention(("qkv",))
OMNI_ATTENTION = _packed_sequence_attention(("q", "k", "v"))
KIMI_ATTENTION = _packed_sequence_attention(("q_proj", "k_proj", "v_proj"))
VIDEO_LLAMA_ATTENTION = _packed_sequence_attention(("q_proj", "k_proj", "v_proj"), tupled=True, proj="out_proj")
PACKED_SEQUENCE_BLOCK = Described(
    lambda block: PackedSequenceBlock(OpenBranch(block.norm1, block.attn), OpenBranch(block.norm2, block.mlp)),
    holds=("norm1", "attn", "norm2", "mlp"),
    keeps_class=True,
)
VIDEO_LLAMA_LAYER = layer_of(
    *("self_attn", ("layer_norm1", "layer_norm2")),
    block=PackedSequenceBlock,
    may_hold=("embed_dim",),
    always_maps=True,
)
