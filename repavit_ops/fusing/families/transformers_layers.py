"""How the layers of transformers 5 are read: the parts of each kind, and what takes a layer's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ...nn.foreign_block import ChannelScale
from ...nn.foreign_signatures import (
    Always,
    EagerAttention,
    FirstOfTuple,
    OpenBranch,
    RfDetrLayer,
    SignatureBlock,
    TransformersAttention,
    TransformersBeitLayer,
    TransformersLayer,
    VitPoseLayer,
)
from ...nn.foreign_windows import MaskFormerSwinLayer, TransformersSwinLayer, TransformersSwinTuple
from ...nn.stand_in import standing_in
from ...nn.transformers_layers import BridgeTowerBlock, LwDetrLayer, MllamaLayer, TupleLayer
from ..family import Described, WholeBlock, WindowBlock
from ..folding import AttentionParts, FFNParts, GatedFFNParts, WindowParts
from ..rules import plain
from .torch import multihead_attention, why_not_multihead

# --- attention and FFN: two ways to name the same parts ---------------------------------------------------------------

DROPS = ("attention_dropout", "dropout")  # probabilities, of no effect in evaluation
HEADS = {"num_heads": "num_attention_heads", "scale": "scaling", "proj": "o_proj"}  # ViT's names
CLIP_HEADS = {"num_heads": "num_heads", "scale": "scale", "proj": "out_proj"}


def _attention(names: dict[str, str], rotary_layout: str | None = None) -> Callable[[Any], AttentionParts]:
    def parts(attn: Any) -> AttentionParts:
        return AttentionParts(
            (attn.q_proj, attn.k_proj, attn.v_proj),
            getattr(attn, names["proj"]),
            getattr(attn, names["num_heads"]),
            attn.head_dim,
            getattr(attn, names["scale"]),
            keep_v_bias=True,
            rotary_layout=rotary_layout,
        )

    return parts


def attention_of(
    names: dict[str, str], *more: str, rotary_layout: str | None = None, causal: bool = True, **options: Any
) -> Described:
    """An attention of q_proj, k_proj, v_proj and these names. ``causal``: it holds ``is_causal``, whatever it says."""
    held = ("q_proj", "k_proj", "v_proj", *names.values(), "head_dim", "config")
    return Described(
        _attention(names, rotary_layout),
        holds=(*held, "is_causal") if causal else held,
        may_hold=(*DROPS, "embed_dim", "num_key_value_groups", *more),
        **{"unless": needs_maps, "alone": _alone, **options},
    )


def _alone(fused: Any, attn: Any) -> nn.Module:
    return standing_in(TransformersAttention(fused, EagerAttention(attn.config)), attn)


def _alone_with_maps(fused: Any, attn: Any) -> nn.Module:
    """Of an attention that returns its maps whatever its config says."""
    return standing_in(TransformersAttention(fused, Always()), attn)


def needs_maps(attn: Any) -> str | None:
    implementation = attn.config._attn_implementation
    if implementation in ("sdpa", None):
        return None
    return (
        f"attn_implementation={implementation!r} has outputs or masks of its own; "
        "model.set_attn_implementation('sdpa') before fusing"
    )


def _packed_attention(attn: Any) -> AttentionParts:
    return AttentionParts(attn.qkv, attn.projection, attn.num_heads, attn.head_dim, attn.scale, keep_v_bias=True)


PACKED = ("qkv", "projection", "num_heads", "head_dim", "scale", "embed_dim", "config")
BLIP_ATTENTION = Described(_packed_attention, holds=PACKED, may_hold=DROPS, alone=_alone_with_maps)
BLIP2_ATTENTION = Described(
    _packed_attention, holds=PACKED, may_hold=(*DROPS, "is_causal"), unless=needs_maps, alone=_alone
)
ATTENTION = attention_of(HEADS)
CLIP_ATTENTION = attention_of(CLIP_HEADS)
EAGER_ATTENTION = attention_of(  # of models that have no other than eager: fused, its maps are refused if asked
    CLIP_HEADS, unless=lambda attn: None, alone=_alone_with_maps
)
# such a norm divides the q of a token by one number in all heads, its k by another: the operator has no place for them
ACROSS_HEADS = "its QK-norm is over the channels of all heads together; only one over each head can be fused"
NORMED_HEADS = attention_of(  # InternVL's and Janus'
    {"num_heads": "num_heads", "scale": "scale", "proj": "projection_layer"},
    "projection_dropout",
    refuses=dict.fromkeys(("q_norm", "k_norm"), ACROSS_HEADS),
)


def mlp_of(first: str, act: str, second: str) -> Described:
    """An FFN whose parts have these names."""
    return Described(
        lambda mlp: FFNParts(getattr(mlp, first), plain(getattr(mlp, act)), getattr(mlp, second)),
        holds=(first, act, second),
        may_hold=("config", "drop", "dropout", "dropout1", "dropout2", "hidden_size", "intermediate_size"),
    )


MLP = mlp_of("fc1", "activation_fn", "fc2")
GATED_MLP = Described(
    lambda mlp: GatedFFNParts(mlp.gate_proj, mlp.up_proj, plain(mlp.act_fn), mlp.down_proj),
    holds=("gate_proj", "act_fn", "up_proj", "down_proj"),
    may_hold=("config", "hidden_size", "intermediate_size"),
)

# --- layers -----------------------------------------------------------------------------------------------------------


def layer_of(
    attn: str,
    norms: tuple[str, str],
    *after: tuple[str, ...],
    block: type[SignatureBlock] = TransformersLayer,
    always_maps: bool = False,
    ffn: str = "mlp",
    **options: Any,
) -> Described:
    """A layer whose attention, norms and what follows each half (scale, dropout) have these names.

    ``always_maps``: its attention returns maps whatever the config says.
    """
    first, second = after or ((), ())

    def parts(layer: Any) -> SignatureBlock:
        attention = getattr(layer, attn)
        config = getattr(attention, "config", None)
        closed = block(
            FirstOfTuple(getattr(layer, norms[0]), attention, *(_scale(getattr(layer, name)) for name in first)),
            OpenBranch(
                getattr(layer, norms[1]), getattr(layer, ffn), *(_scale(getattr(layer, name)) for name in second)
            ),
        )
        vars(closed)["gives_maps"] = Always() if always_maps else EagerAttention(config)
        return closed

    held = dict.fromkeys((attn, ffn, *norms, *first, *second))
    return Described(parts, holds=tuple(held), keeps_class=True, **options)


def _scale(after: Any) -> nn.Module:
    """What follows a half: a module, a LayerScale vector, or the number one."""
    if isinstance(after, nn.Module):
        return after
    return ChannelScale(after) if isinstance(after, nn.Parameter) else nn.Identity()


VIT_LAYER = layer_of("attention", ("layernorm_before", "layernorm_after"), ("dropout",), ("dropout",))
DINO_LAYER = layer_of("attention", ("norm1", "norm2"), ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
PIXIO_LAYER = layer_of(
    *("attention", ("layernorm_before", "layernorm_after"), ("dropout", "drop_path"), ("dropout", "drop_path"))
)
INTERNVL_LAYER = layer_of(
    *("attention", ("layernorm_before", "layernorm_after"), ("lambda_1",), ("dropout", "lambda_2")),
    may_hold=("chunk_size_feed_forward", "seq_len_dim"),
)
LW_DETR_LAYER = layer_of(
    *("attention", ("layernorm_before", "layernorm_after"), ("gamma_1",), ("gamma_2",)),
    block=LwDetrLayer,
    ffn="intermediate",
    may_hold=("window", "num_windows"),
)
RF_DETR_LAYER = layer_of(
    *("attention", ("norm1", "norm2"), ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")),
    block=RfDetrLayer,
    may_hold=("num_windows", "global_attention"),
)
CLIP_LAYER = layer_of("self_attn", ("layer_norm1", "layer_norm2"), may_hold=("embed_dim", "config"))
EAGER_LAYER = layer_of("self_attn", ("layer_norm1", "layer_norm2"), may_hold=("embed_dim",), always_maps=True)
BLIP_LAYER = layer_of("self_attn", ("layer_norm1", "layer_norm2"), may_hold=("embed_dim",), always_maps=True)

AIM_LAYER = layer_of("attention", ("rms_norm1", "rms_norm2"), ffn="ffn")

# --- Swin -------------------------------------------------------------------------------------------------------------


def _swin_layer(layer: Any) -> WindowBlock:
    attn = layer.attention
    attention = AttentionParts(
        (attn.q_proj, attn.k_proj, attn.v_proj),
        attn.o_proj,
        attn.num_attention_heads,
        attn.head_dim,
        attn.scaling,
        norm=layer.layernorm_before,
        residual=True,
    )
    window = tuple(attn.relative_position_bias.window_size)
    shift = (layer.shift_size, layer.shift_size)
    windows = WindowParts(attention, attn.relative_position_bias()[0].detach(), window, shift)
    mlp = OpenBranch(layer.layernorm_after, layer.mlp, layer.dropout)
    return WindowBlock(windows, mlp, TransformersSwinLayer, {"window": window[0]})


SWIN_LAYER = Described(
    _swin_layer,
    holds=("attention", "layernorm_before", "layernorm_after", "mlp", "dropout", "drop_path"),
    may_hold=("window_size", "shift_size", "input_resolution"),
    keeps_class=True,
    unless=lambda layer: needs_maps(layer.attention),
)


def _older_swin_layer(call: type[TransformersSwinTuple]) -> Described:
    """DonutSwin's and MaskFormer's: the same parts under the names of transformers 4."""

    def parts(layer: Any) -> WindowBlock:
        attn = layer.attention.self
        attention = AttentionParts(
            (attn.query, attn.key, attn.value),
            layer.attention.output.dense,
            attn.num_attention_heads,
            attn.attention_head_size,
            attn.attention_head_size**-0.5,
            norm=layer.layernorm_before,
            residual=True,
        )
        window, tokens = tuple(attn.window_size), attn.window_size[0] * attn.window_size[1]
        bias = attn.relative_position_bias_table[attn.relative_position_index.view(-1)].view(tokens, tokens, -1)
        shift = (layer.shift_size, layer.shift_size)
        act = plain(layer.intermediate.intermediate_act_fn)
        ffn = FFNParts(layer.intermediate.dense, act, layer.output.dense, norm=layer.layernorm_after, residual=True)
        windows = WindowParts(attention, bias.permute(2, 0, 1).detach().contiguous(), window, shift)
        return WindowBlock(windows, ffn, call, {"window": window[0]})

    return Described(
        parts,
        holds=("attention", "layernorm_before", "layernorm_after", "intermediate", "output", "drop_path"),
        may_hold=("window_size", "shift_size", "input_resolution", "chunk_size_feed_forward"),
        keeps_class=True,
    )


DONUT_LAYER = _older_swin_layer(TransformersSwinTuple)
MASKFORMER_LAYER = _older_swin_layer(MaskFormerSwinLayer)

# --- BEiT, ViTPose, DPT, YOLOS and more ------------------------------------------------------------------------------


def _beit_layer(layer: Any) -> TransformersBeitLayer:
    closed = TransformersBeitLayer(
        FirstOfTuple(layer.layernorm_before, layer.attention, layer.dropout, _scale(layer.lambda_1), layer.drop_path),
        OpenBranch(layer.layernorm_after, layer.mlp, layer.dropout, _scale(layer.lambda_2), layer.drop_path),
    )
    closed.relative_position_bias = layer.relative_position_bias
    vars(closed)["gives_maps"] = EagerAttention(layer.attention.config)
    return closed


BEIT_LAYER = Described(
    _beit_layer,
    holds=("attention", "layernorm_before", "layernorm_after", "mlp", "dropout", "patch_size", "drop_path"),
    may_hold=("lambda_1", "lambda_2", "relative_position_bias"),
    keeps_class=True,
)


def _older_attention(layer: Any) -> AttentionParts:
    """query, key and value apart from their projection, as transformers 4 had them."""
    attn = layer.attention.attention
    return AttentionParts(
        (attn.query, attn.key, attn.value),
        layer.attention.output.dense,
        attn.num_attention_heads,
        attn.attention_head_size,
        attn.scaling,
        norm=layer.layernorm_before,
        residual=True,
    )


def _maps_of(layer: Any) -> dict[str, Any]:
    return {"gives_maps": EagerAttention(layer.attention.attention.config)}


def _older_layer(layer: Any) -> WholeBlock:
    act = plain(layer.intermediate.intermediate_act_fn)
    ffn = FFNParts(layer.intermediate.dense, act, layer.output.dense, norm=layer.layernorm_after, residual=True)
    return WholeBlock(_older_attention(layer), ffn, TransformersLayer, _maps_of(layer))


OLDER_LAYER = Described(
    _older_layer,
    holds=("attention", "intermediate", "output", "layernorm_before", "layernorm_after"),
    may_hold=("chunk_size_feed_forward", "seq_len_dim"),
    unless=lambda layer: needs_maps(layer.attention.attention),
    keeps_class=True,
)


def _vitpose_layer(layer: Any) -> WholeBlock:
    mlp = layer.mlp
    ffn = FFNParts(mlp.fc1, plain(mlp.activation), mlp.fc2, norm=layer.layernorm_after, residual=True)
    return WholeBlock(_older_attention(layer), ffn, VitPoseLayer, _maps_of(layer))


def _why_not_vitpose(layer: Any) -> str | None:
    if layer.num_experts != 1:
        return f"its FFN is a mixture of {layer.num_experts} experts"
    return needs_maps(layer.attention.attention)


VITPOSE_LAYER = Described(
    _vitpose_layer,
    holds=("attention", "mlp", "layernorm_before", "layernorm_after", "num_experts"),
    unless=_why_not_vitpose,
    keeps_class=True,
)


def _tuple_layer(layer: Any) -> WholeBlock:
    attn, act = layer.attention.attention, plain(layer.intermediate.intermediate_act_fn)
    heads = (attn.num_attention_heads, attn.attention_head_size, attn.attention_head_size**-0.5)
    qkv = (attn.query, attn.key, attn.value)
    return WholeBlock(
        AttentionParts(qkv, layer.attention.output.dense, *heads, True, norm=layer.layernorm_before, residual=True),
        FFNParts(layer.intermediate.dense, act, layer.output.dense, norm=layer.layernorm_after, residual=True),
        TupleLayer,
        {"gives_maps": Always()},
    )


TUPLE_LAYER = Described(
    _tuple_layer,
    holds=("attention", "intermediate", "output", "layernorm_before", "layernorm_after"),
    may_hold=("chunk_size_feed_forward", "seq_len_dim"),
    keeps_class=True,
)


def _clip_parts(attn: Any, proj: nn.Module, norm: nn.Module, scale: float) -> AttentionParts:
    """A closed attention half under CLIP's names, for attentions that are called in other ways elsewhere."""
    qkv = (attn.q_proj, attn.k_proj, attn.v_proj)
    return AttentionParts(qkv, proj, attn.num_heads, attn.head_dim, scale, True, norm=norm, residual=True)


def _groupvit_layer(layer: Any) -> WholeBlock:
    attn, mlp = layer.self_attn, layer.mlp
    return WholeBlock(
        _clip_parts(attn, attn.out_proj, layer.layer_norm1, attn.scale),
        FFNParts(mlp.fc1, plain(mlp.activation_fn), mlp.fc2, norm=layer.layer_norm2, residual=True),
        TransformersLayer,
        {"gives_maps": Always()},
    )


GROUPVIT_LAYER = Described(
    _groupvit_layer,
    holds=("self_attn", "layer_norm1", "layer_norm2", "mlp"),
    may_hold=("embed_dim",),
    keeps_class=True,
)


def _mllama_layer(layer: Any) -> WholeBlock:
    attn, mlp = layer.self_attn, layer.mlp
    gates = (layer.gate_attn.tanh(), layer.gate_ffn.tanh()) if layer.is_gated else (None, None)
    first, second = (None if gate is None else gate.detach().expand(layer.hidden_size) for gate in gates)
    attention = _clip_parts(attn, attn.o_proj, layer.input_layernorm, attn.scaling)
    ffn = FFNParts(mlp.fc1, plain(mlp.activation_fn), mlp.fc2, layer.post_attention_layernorm, second, True)
    maps = {"gives_maps": EagerAttention(attn.config)}
    return WholeBlock(replace(attention, output_scale=first), ffn, MllamaLayer, maps)


MLLAMA_LAYER = Described(
    _mllama_layer,
    holds=("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "is_gated", "hidden_size"),
    may_hold=("num_attention_heads", "intermediate_size", "gate_attn", "gate_ffn"),
    unless=lambda layer: needs_maps(layer.self_attn),
    keeps_class=True,
)


def _bridgetower_block(block: Any) -> WholeBlock:
    mlp = block.mlp
    return WholeBlock(
        replace(multihead_attention(block.attn), norm=block.ln_1, residual=True),
        FFNParts(mlp["c_fc"], plain(mlp["gelu"]), mlp["c_proj"], norm=block.ln_2, residual=True),
        BridgeTowerBlock,
    )


BRIDGETOWER_BLOCK = Described(
    _bridgetower_block,
    holds=("attn", "ln_1", "mlp", "ln_2"),
    unless=lambda block: why_not_multihead(block.attn),
    keeps_class=True,
)


def reset_swin_stage(stage: Any) -> None:
    """SwinLayer drops its shift for good once a map is no larger than its window; a model just built has it."""
    for i, layer in enumerate(stage.blocks):
        if hasattr(layer, "shift_size") and hasattr(layer, "window_size"):
            layer.window_size = stage.config.window_size
            layer.shift_size = 0 if i % 2 == 0 else stage.config.window_size // 2
