"""PyTorch's own encoder layer, and what of PyTorch stands between the parts of other libraries' blocks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.nn import functional as F

from ...nn.foreign_signatures import TorchEncoderLayer
from ..family import Described, Family, WholeBlock
from ..folding import AttentionParts, FFNParts, linear
from ..rules import plain


def multihead_attention(attn: nn.MultiheadAttention) -> AttentionParts:
    """The parts of PyTorch's module, whose input projection is one parameter."""
    proj = plain(attn.out_proj)
    qkv = linear(attn.in_proj_weight, attn.in_proj_bias)
    return AttentionParts(qkv, proj, attn.num_heads, attn.head_dim, attn.head_dim**-0.5, keep_v_bias=True)


def why_not_multihead(attn: Any) -> str | None:
    """Why an attention is not the plain kind of ``nn.MultiheadAttention``, in one line; None if it is."""
    if type(attn) is not nn.MultiheadAttention:
        return f"its attention is {type(attn).__name__}, wanted nn.MultiheadAttention"
    if attn.in_proj_weight is None:
        return "its queries, keys and values differ in width (kdim, vdim)"
    if attn.bias_k is not None or attn.add_zero_attn:
        return "it attends to a bias or a zero besides the tokens (add_bias_kv, add_zero_attn)"
    return None


def _encoder_layer(layer: Any) -> WholeBlock:
    attn = layer.self_attn
    return WholeBlock(
        replace(multihead_attention(attn), norm=layer.norm1, residual=True),
        FFNParts(layer.linear1, _activation(layer), layer.linear2, norm=layer.norm2, residual=True),
        TorchEncoderLayer,
        {
            "batch_first": attn.batch_first,
            "num_heads": attn.num_heads,
            "self_attn": SimpleNamespace(batch_first=attn.batch_first),  # nn.TransformerEncoder asks its first layer
        },
    )


def _activation(layer: Any) -> nn.Module:
    """The activation as a module; it may be a function."""
    act = layer.activation
    if act is F.gelu:
        return nn.GELU()
    if act is F.relu:
        return nn.ReLU()
    return act if isinstance(act, nn.Module) else nn.Identity()


def _why_not(layer: Any) -> str | None:
    if not layer.norm_first:
        return "its norms stand behind the shortcuts (norm_first=False)"
    if not isinstance(layer.activation, nn.Module) and layer.activation not in (F.gelu, F.relu):
        return f"its activation is the function {layer.activation!r}; only GELU can be fused"
    return why_not_multihead(layer.self_attn)


ENCODER_LAYER = Described(
    _encoder_layer,
    holds=("self_attn", "linear1", "dropout", "linear2", "norm_first", "norm1", "norm2", "dropout1", "dropout2"),
    may_hold=("activation", "activation_relu_or_gelu"),
    unless=_why_not,
    keeps_class=True,
)

TORCH = Family(
    "torch",
    whole_blocks={"torch.nn.TransformerEncoderLayer": ENCODER_LAYER},
    loops={"torch.nn.TransformerEncoder": "layers"},
    meanings={
        "torch.nn.Dropout": lambda _: nn.Identity(),
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": lambda part: linear(part.weight, part.bias),
    },
)
