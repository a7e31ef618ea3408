"""Reparameterization algebra on plain tensors: norm folds, the RePaViT FFN merge, attention folds, branch joins.

Weights are in nn.Linear layout [out, in]. Every function takes any floating dtype, computes and returns float64, and is
exact up to float64 rounding; `cast` rounds a result once, at the end. Results may share storage with float64 inputs
until `cast` copies them. Everything is differentiable: call it under ``torch.no_grad()`` to merge parameters.

    affine       norms as per-channel maps, folded into the Linear behind or in front of them
    ffn          channel-idle FFN → two thin projections and one C x C matrix
    gated_ffn    SwiGLU and its relatives; channels that skip their gate
    attention    what moves out of a softmax attention; keys and values of padded window tokens
    join         parallel branches → one branch
"""

from .affine import (
    Affine,
    batchnorm_affine,
    compose,
    fold_affine_into_input,
    fold_affine_into_output,
    fold_output_scale,
    layernorm_affine,
    repbn_affine,
)
from .attention import (
    AttentionWeights,
    MergedAttention,
    attention_weights,
    drop_k_bias,
    fold_inner_affine,
    fold_input_affine,
    fold_output_affine,
    fold_scale,
    merge_attention_bypass,
    move_v_bias,
    pad_kv_vector,
)
from .attention import fold_output_scale as fold_attention_output_scale
from .ffn import (
    MergedFFN,
    active_channels,
    fold_identity,
    is_identity,
    merge_channel_idle_ffn,
    merge_ffn_bypass,
    merging_adds_work,
    unfold_identity,
)
from .gated_ffn import MergedGatedFFN, merge_gated_ffn
from .join import (
    AttentionBranch,
    FFNBranch,
    join_attention_a,
    join_attention_b,
    join_ffn,
    widen_ffn,
    widen_heads,
)
from .precision import cast

__all__ = [
    "Affine",
    "AttentionBranch",
    "AttentionWeights",
    "FFNBranch",
    "MergedAttention",
    "MergedFFN",
    "MergedGatedFFN",
    "active_channels",
    "attention_weights",
    "batchnorm_affine",
    "cast",
    "compose",
    "drop_k_bias",
    "fold_affine_into_input",
    "fold_affine_into_output",
    "fold_attention_output_scale",
    "fold_identity",
    "fold_inner_affine",
    "fold_input_affine",
    "fold_output_affine",
    "fold_output_scale",
    "fold_scale",
    "is_identity",
    "join_attention_a",
    "join_attention_b",
    "join_ffn",
    "layernorm_affine",
    "merge_attention_bypass",
    "merge_channel_idle_ffn",
    "merge_ffn_bypass",
    "merge_gated_ffn",
    "merging_adds_work",
    "move_v_bias",
    "pad_kv_vector",
    "repbn_affine",
    "unfold_identity",
    "widen_ffn",
    "widen_heads",
]
