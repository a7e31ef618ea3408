"""The vision (and CLIP-like text) encoders of transformers 5."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ...nn.foreign_block import ChannelScale
from ...nn.foreign_signatures import FirstOfTuple, OpenBranch, TransformersLayer, TransformersSwinLayer
from ..family import Described, Family, WindowBlock
from ..folding import AttentionParts, FFNParts, WindowParts
from ..rules import plain

# --- attention and FFN: two ways to name the same parts ---------------------------------------------------------------

DROPS = ("attention_dropout", "dropout")  # probabilities, of no effect in evaluation
HEADS = {"num_heads": "num_attention_heads", "scale": "scaling", "proj": "o_proj"}  # ViT's names
CLIP_HEADS = {"num_heads": "num_heads", "scale": "scale", "proj": "out_proj"}


def _attention(names: dict[str, str]) -> Callable[[Any], AttentionParts]:
    def parts(attn: Any) -> AttentionParts:
        return AttentionParts(
            (attn.q_proj, attn.k_proj, attn.v_proj),
            getattr(attn, names["proj"]),
            getattr(attn, names["num_heads"]),
            attn.head_dim,
            getattr(attn, names["scale"]),
            keep_v_bias=True,
        )

    return parts


def _described_attention(names: dict[str, str]) -> Described:
    return Described(
        _attention(names),
        holds=("q_proj", "k_proj", "v_proj", *names.values(), "head_dim", "config", "is_causal"),
        may_hold=(*DROPS, "embed_dim"),
        unless=_needs_maps,
    )


def _needs_maps(attn: Any) -> str | None:
    implementation = attn.config._attn_implementation
    if implementation in ("sdpa", None):
        return None
    return (
        f"attn_implementation={implementation!r} has outputs or masks of its own; "
        "model.set_attn_implementation('sdpa') before fusing"
    )


ATTENTION = _described_attention(HEADS)
CLIP_ATTENTION = _described_attention(CLIP_HEADS)
MLP = Described(
    lambda mlp: FFNParts(mlp.fc1, plain(mlp.activation_fn), mlp.fc2),
    holds=("fc1", "activation_fn", "fc2"),
    may_hold=("config",),
)

# --- layers -----------------------------------------------------------------------------------------------------------


def _layer(attn: str, norms: tuple[str, str], *after: tuple[str, ...], **options: Any) -> Described:
    """A layer whose attention, norms and what follows each half (scale, dropout) have these names."""
    first, second = after or ((), ())

    def parts(layer: Any) -> TransformersLayer:
        attention = getattr(layer, attn)
        closed = TransformersLayer(
            FirstOfTuple(getattr(layer, norms[0]), attention, *(_scale(getattr(layer, name)) for name in first)),
            OpenBranch(getattr(layer, norms[1]), layer.mlp, *(_scale(getattr(layer, name)) for name in second)),
        )
        vars(closed)["attention_config"] = attention.config
        return closed

    held = dict.fromkeys((attn, "mlp", *norms, *first, *second))
    return Described(parts, holds=tuple(held), keeps_class=True, **options)


def _scale(after: Any) -> nn.Module:
    """What follows a half: a module, a LayerScale vector, or the number one."""
    if isinstance(after, nn.Module):
        return after
    return nn.Identity() if after == 1.0 and isinstance(after, float) else ChannelScale(after)


VIT_LAYER = _layer("attention", ("layernorm_before", "layernorm_after"), ("dropout",), ("dropout",))
DINO_LAYER = _layer("attention", ("norm1", "norm2"), ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
CLIP_LAYER = _layer("self_attn", ("layer_norm1", "layer_norm2"), may_hold=("embed_dim",))

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
    return WindowBlock(windows, OpenBranch(layer.layernorm_after, layer.mlp, layer.dropout), TransformersSwinLayer)


SWIN_LAYER = Described(
    _swin_layer,
    holds=("attention", "layernorm_before", "layernorm_after", "mlp", "dropout", "drop_path"),
    may_hold=("window_size", "shift_size", "input_resolution"),
    keeps_class=True,
    unless=lambda layer: _needs_maps(layer.attention),
)


def _reset_swin_stage(stage: Any) -> None:
    """SwinLayer drops its shift for good once a map is no larger than its window; a model just built has it."""
    for i, layer in enumerate(stage.blocks):
        if hasattr(layer, "shift_size") and hasattr(layer, "window_size"):
            layer.window_size = stage.config.window_size
            layer.shift_size = 0 if i % 2 == 0 else stage.config.window_size // 2


# --- what else stands in a model --------------------------------------------------------------------------------------

MODELS = "transformers.models."
VIT_LIKE = {  # module → prefix of its classes
    "vit.modeling_vit": "ViT",
    "deit.modeling_deit": "DeiT",
    "vit_mae.modeling_vit_mae": "ViTMAE",
    "vit_msn.modeling_vit_msn": "ViTMSN",
    "ijepa.modeling_ijepa": "IJepa",
}
DINO_LIKE = {
    "dinov2.modeling_dinov2": "Dinov2",
    "dinov2_with_registers.modeling_dinov2_with_registers": "Dinov2WithRegisters",
}
CLIP_LIKE = {
    "clip.modeling_clip": "CLIP",
    "siglip.modeling_siglip": "Siglip",
    "siglip2.modeling_siglip2": "Siglip2",
    "owlvit.modeling_owlvit": "OwlViT",
}
SWIN_LIKE = {"swin.modeling_swin": "Swin"}


def _classes(suffix: str, value: Any, *groups: dict[str, str]) -> dict[str, Any]:
    """The classes of these modules that end in ``suffix``, by dotted name."""
    return {f"{MODELS}{module}.{prefix}{suffix}": value for group in groups for module, prefix in group.items()}


TRANSFORMERS = Family(
    "transformers",
    attentions={
        **_classes("Attention", ATTENTION, VIT_LIKE, DINO_LIKE),
        **_classes("Attention", CLIP_ATTENTION, CLIP_LIKE),
    },
    ffns=_classes("MLP", MLP, VIT_LIKE, DINO_LIKE, CLIP_LIKE, SWIN_LIKE),
    blocks={
        **_classes("Layer", VIT_LAYER, VIT_LIKE),
        **_classes("Layer", DINO_LAYER, DINO_LIKE),
        **_classes("EncoderLayer", CLIP_LAYER, CLIP_LIKE),
    },
    window_blocks=_classes("Layer", SWIN_LAYER, SWIN_LIKE),
    loops={
        **_classes("Model", "layers", VIT_LIKE),
        **_classes("Encoder", "layer", DINO_LIKE),
        **_classes("Encoder", "layers", CLIP_LIKE),
        **_classes("Stage", "blocks", SWIN_LIKE),
    },
    resets=_classes("Stage", _reset_swin_stage, SWIN_LIKE),
    resembling=re.compile(r"Vi(T|sion)\w*(Attention|MLP)$"),
    meanings={
        "transformers.activations.GELUActivation": lambda act: nn.GELU() if act.act is nn.functional.gelu else act,
        "transformers.activations.GELUTanh": lambda act: nn.GELU("tanh"),
        "transformers.activations.NewGELUActivation": lambda _: nn.GELU("tanh"),
        **_classes("LayerScale", lambda scale: ChannelScale(scale.lambda1), DINO_LIKE),
        **_classes("DropPath", lambda _: nn.Identity(), DINO_LIKE, SWIN_LIKE),
    },
    patch_embeddings={
        **_classes("PatchEmbeddings", "projection", VIT_LIKE, DINO_LIKE, SWIN_LIKE),
        **_classes("VisionEmbeddings", "patch_embedding", CLIP_LIKE),
    },
)
