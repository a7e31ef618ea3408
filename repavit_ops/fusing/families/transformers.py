"""The vision (and CLIP-like text) encoders of transformers 5."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ...nn import QuickGELU
from ...nn.foreign_block import ChannelScale
from ...nn.foreign_signatures import (
    Always,
    EagerAttention,
    FirstOfTuple,
    MaskFormerSwinLayer,
    OpenBranch,
    RfDetrLayer,
    TokensMerging,
    TransformersBeitLayer,
    TransformersLayer,
    TransformersSwinLayer,
    TransformersSwinTuple,
    VitPoseLayer,
)
from ..family import Described, Family, WholeBlock, WindowBlock
from ..folding import AttentionParts, FFNParts, WindowParts
from ..patches import MergingParts
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


def _packed_attention(attn: Any) -> AttentionParts:
    return AttentionParts(attn.qkv, attn.projection, attn.num_heads, attn.head_dim, attn.scale, keep_v_bias=True)


PACKED = ("qkv", "projection", "num_heads", "head_dim", "scale", "embed_dim", "config")
BLIP_ATTENTION = Described(_packed_attention, holds=PACKED, may_hold=DROPS)
BLIP2_ATTENTION = Described(
    _packed_attention, holds=PACKED, may_hold=(*DROPS, "is_causal"), unless=lambda attn: _needs_maps(attn)
)
ATTENTION = _described_attention(HEADS)
CLIP_ATTENTION = _described_attention(CLIP_HEADS)
MLP = Described(
    lambda mlp: FFNParts(mlp.fc1, plain(mlp.activation_fn), mlp.fc2),
    holds=("fc1", "activation_fn", "fc2"),
    may_hold=("config",),
)

# --- layers -----------------------------------------------------------------------------------------------------------


def _layer(
    attn: str,
    norms: tuple[str, str],
    *after: tuple[str, ...],
    block: type[TransformersLayer] = TransformersLayer,
    always_maps: bool = False,
    **options: Any,
) -> Described:
    """A layer whose attention, norms and what follows each half (scale, dropout) have these names.

    ``always_maps``: its attention returns maps whatever the config says.
    """
    first, second = after or ((), ())

    def parts(layer: Any) -> TransformersLayer:
        attention = getattr(layer, attn)
        config = getattr(attention, "config", None)
        closed = block(
            FirstOfTuple(getattr(layer, norms[0]), attention, *(_scale(getattr(layer, name)) for name in first)),
            OpenBranch(getattr(layer, norms[1]), layer.mlp, *(_scale(getattr(layer, name)) for name in second)),
        )
        vars(closed)["gives_maps"] = Always() if always_maps else EagerAttention(config)
        return closed

    held = dict.fromkeys((attn, "mlp", *norms, *first, *second))
    return Described(parts, holds=tuple(held), keeps_class=True, **options)


def _scale(after: Any) -> nn.Module:
    """What follows a half: a module, a LayerScale vector, or the number one."""
    if isinstance(after, nn.Module):
        return after
    return ChannelScale(after) if isinstance(after, nn.Parameter) else nn.Identity()


VIT_LAYER = _layer("attention", ("layernorm_before", "layernorm_after"), ("dropout",), ("dropout",))
DINO_LAYER = _layer("attention", ("norm1", "norm2"), ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
RF_DETR_LAYER = _layer(
    *("attention", ("norm1", "norm2"), ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")),
    block=RfDetrLayer,
    may_hold=("num_windows", "global_attention"),
)
CLIP_LAYER = _layer("self_attn", ("layer_norm1", "layer_norm2"), may_hold=("embed_dim",))

BLIP_LAYER = _layer("self_attn", ("layer_norm1", "layer_norm2"), may_hold=("embed_dim",), always_maps=True)

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
    unless=lambda layer: _needs_maps(layer.attention),
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

# --- BEiT, ViTPose, DPT, YOLOS ----------------------------------------------------------------------------------------


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
    unless=lambda layer: _needs_maps(layer.attention.attention),
    keeps_class=True,
)


def _vitpose_layer(layer: Any) -> WholeBlock:
    mlp = layer.mlp
    ffn = FFNParts(mlp.fc1, plain(mlp.activation), mlp.fc2, norm=layer.layernorm_after, residual=True)
    return WholeBlock(_older_attention(layer), ffn, VitPoseLayer, _maps_of(layer))


def _why_not_vitpose(layer: Any) -> str | None:
    if layer.num_experts != 1:
        return f"its FFN is a mixture of {layer.num_experts} experts"
    return _needs_maps(layer.attention.attention)


VITPOSE_LAYER = Described(
    _vitpose_layer,
    holds=("attention", "mlp", "layernorm_before", "layernorm_after", "num_experts"),
    unless=_why_not_vitpose,
    keeps_class=True,
)


def _reset_swin_stage(stage: Any) -> None:
    """SwinLayer drops its shift for good once a map is no larger than its window; a model just built has it."""
    for i, layer in enumerate(stage.blocks):
        if hasattr(layer, "shift_size") and hasattr(layer, "window_size"):
            layer.window_size = stage.config.window_size
            layer.shift_size = 0 if i % 2 == 0 else stage.config.window_size // 2


# --- what else stands in a model --------------------------------------------------------------------------------------

MODELS = "transformers.models."
Names = dict[str, tuple[str, ...]]

# The classes of each library module, as named there: layer, attention, FFN, and what loops over the layers. Their code
# is the same within a group (compared by syntax tree in transformers 5.23).
VIT_LIKE: Names = {
    "audio_spectrogram_transformer": ("ASTLayer", "ASTAttention", "ASTMLP", "ASTModel"),
    "deit": ("DeiTLayer", "DeiTAttention", "DeiTMLP", "DeiTModel"),
    "ijepa": ("IJepaLayer", "IJepaAttention", "IJepaMLP", "IJepaModel"),
    "vit": ("ViTLayer", "ViTAttention", "ViTMLP", "ViTModel"),
    "vit_mae": ("ViTMAELayer", "ViTMAEAttention", "ViTMAEMLP", "ViTMAEModel"),
    "vit_msn": ("ViTMSNLayer", "ViTMSNAttention", "ViTMSNMLP", "ViTMSNModel"),
    "vivit": ("VivitLayer", "VivitAttention", "VivitMLP", "VivitModel"),
}
DINO_LIKE: Names = {
    "dinov2": ("Dinov2Layer", "Dinov2Attention", "Dinov2MLP", "Dinov2Encoder"),
    "dinov2_with_registers": (
        *("Dinov2WithRegistersLayer", "Dinov2WithRegistersAttention"),
        *("Dinov2WithRegistersMLP", "Dinov2WithRegistersEncoder"),
    ),
}
CLIP_LIKE: Names = {
    "altclip": ("AltCLIPEncoderLayer", "AltCLIPAttention", "AltCLIPMLP", "AltCLIPEncoder"),
    "chinese_clip": (
        *("ChineseCLIPVisionLayer", "ChineseCLIPVisionAttention"),
        *("ChineseCLIPVisionMLP", "ChineseCLIPVisionEncoder"),
    ),
    "clip": ("CLIPEncoderLayer", "CLIPAttention", "CLIPMLP", "CLIPEncoder"),
    "clipseg": ("CLIPSegEncoderLayer", "CLIPSegAttention", "CLIPSegMLP", ""),  # its encoder returns what lies between
    "idefics2": ("Idefics2EncoderLayer", "Idefics2VisionAttention", "Idefics2VisionMLP", "Idefics2Encoder"),
    "idefics3": ("Idefics3EncoderLayer", "Idefics3VisionAttention", "Idefics3VisionMLP", "Idefics3Encoder"),
    "kosmos2": ("Kosmos2VisionEncoderLayer", "Kosmos2VisionAttention", "Kosmos2VisionMLP", "Kosmos2VisionEncoder"),
    "metaclip_2": ("MetaClip2EncoderLayer", "MetaClip2Attention", "MetaClip2MLP", "MetaClip2Encoder"),
    "owlv2": ("Owlv2EncoderLayer", "Owlv2Attention", "Owlv2MLP", "Owlv2Encoder"),
    "owlvit": ("OwlViTEncoderLayer", "OwlViTAttention", "OwlViTMLP", "OwlViTEncoder"),
    "siglip": ("SiglipEncoderLayer", "SiglipAttention", "SiglipMLP", "SiglipEncoder"),
    "siglip2": ("Siglip2EncoderLayer", "Siglip2Attention", "Siglip2MLP", "Siglip2Encoder"),
    "smolvlm": ("SmolVLMEncoderLayer", "SmolVLMVisionAttention", "SmolVLMVisionMLP", "SmolVLMEncoder"),
    "x_clip": ("XCLIPEncoderLayer", "XCLIPAttention", "XCLIPMLP", "XCLIPEncoder"),
}
RF_DETR_LIKE: Names = {"rf_detr": ("RfDetrDinov2Layer", "RfDetrDinov2Attention", "RfDetrDinov2MLP", "")}
BEIT_LIKE: Names = {"beit": ("BeitLayer", "BeitAttention", "BeitMLP", "BeitModel")}
BLIP_LIKE: Names = {"blip": ("BlipEncoderLayer", "BlipAttention", "BlipMLP", "BlipEncoder")}
BLIP2_LIKE: Names = {
    "blip_2": ("Blip2EncoderLayer", "Blip2Attention", "Blip2MLP", "Blip2Encoder"),
    "instructblip": ("InstructBlipEncoderLayer", "InstructBlipAttention", "InstructBlipMLP", "InstructBlipEncoder"),
    "instructblipvideo": (
        *("InstructBlipVideoEncoderLayer", "InstructBlipVideoAttention"),
        *("InstructBlipVideoMLP", "InstructBlipVideoEncoder"),
    ),
}
SWIN_LIKE: Names = {"swin": ("SwinLayer", "SwinAttention", "SwinMLP", "SwinStage")}
LAYER, ATTN, FFN, LOOP = range(4)
OLDER_FFN = ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")

# attention with more to it than any operator has; their FFNs fuse, each under the names that its library gives
ONLY_FFN = {
    "hiera.modeling_hiera.HieraMlp": ("fc1", "activation_fn", "fc2"),
    "sam.modeling_sam.SamMLPBlock": ("lin1", "act", "lin2"),
    "sam_hq.modeling_sam_hq.SamHQMLPBlock": ("lin1", "act", "lin2"),
    "vitdet.modeling_vitdet.VitDetMlp": ("fc1", "act", "fc2"),
    "vjepa2.modeling_vjepa2.VJEPA2MLP": ("fc1", "activation", "fc2"),
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTMLP": ("up_proj", "act_fn", "down_proj"),
}
TURNED = "rotary position embeddings turn q and k in between"
RELATIVE = "relative position biases depend on q"
REFUSED = {
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention": TURNED,
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTGatedMLP": "a gated FFN multiplies two projections",
    "dinov2.modeling_dinov2.Dinov2SwiGLUFFN": "a gated FFN multiplies two projections",
    "hiera.modeling_hiera.HieraMaskUnitAttention": "its queries are pooled, and it attends within mask units",
    "sam.modeling_sam.SamVisionAttention": RELATIVE,
    "sam.modeling_sam.SamVisionSdpaAttention": RELATIVE,
    "sam2.modeling_sam2.Sam2MultiScaleAttention": "its queries are pooled",
    "vitdet.modeling_vitdet.VitDetAttention": RELATIVE,
    "vjepa2.modeling_vjepa2.VJEPA2RopeAttention": TURNED,
    "swinv2.modeling_swinv2.Swinv2SelfAttention": "cosine attention normalises q and k in between",
    "mobilevit.modeling_mobilevit.MobileViTSelfAttention": "its layer has SiLU in the FFN, and its parts are apart",
}


def _module(name: str) -> str:
    return f"{MODELS}{name}.modeling_{name}"


def _classes(which: int, value: Any, *groups: Names) -> dict[str, Any]:
    """The classes in one column of these groups, by dotted name."""
    rows = ((name, names[which]) for group in groups for name, names in group.items())
    return {f"{_module(name)}.{cls}": value for name, cls in rows if cls}


def _named(suffix: str, value: Any, *groups: Names) -> dict[str, Any]:
    """Classes that are named after the layer's, with another ending."""
    rows = ((name, names[FFN].removesuffix("MLP")) for group in groups for name, names in group.items())
    return {f"{_module(name)}.{prefix}{suffix}": value for name, prefix in rows}


def _mlp(first: str, act: str, second: str) -> Described:
    return Described(
        lambda mlp: FFNParts(getattr(mlp, first), plain(getattr(mlp, act)), getattr(mlp, second)),
        holds=(first, act, second),
        may_hold=("config", "drop", "hidden_size", "intermediate_size"),
    )


TRANSFORMERS = Family(
    "transformers",
    oldest="5.10",  # up to 5.15 without DINOv2, whose parts had other names
    attentions={
        **_classes(ATTN, ATTENTION, VIT_LIKE, DINO_LIKE, RF_DETR_LIKE, BEIT_LIKE),
        **_classes(ATTN, CLIP_ATTENTION, CLIP_LIKE),
        **_classes(ATTN, BLIP_ATTENTION, BLIP_LIKE),
        **_classes(ATTN, BLIP2_ATTENTION, BLIP2_LIKE),
    },
    ffns={
        **_classes(FFN, MLP, VIT_LIKE, DINO_LIKE, RF_DETR_LIKE, BEIT_LIKE, CLIP_LIKE, BLIP_LIKE, BLIP2_LIKE, SWIN_LIKE),
        **{f"{MODELS}{path}": _mlp(*names) for path, names in ONLY_FFN.items()},
    },
    blocks={
        **_classes(LAYER, VIT_LAYER, VIT_LIKE),
        **_classes(LAYER, DINO_LAYER, DINO_LIKE),
        **_classes(LAYER, CLIP_LAYER, CLIP_LIKE, BLIP2_LIKE),
        **_classes(LAYER, BLIP_LAYER, BLIP_LIKE),
        **_classes(LAYER, BEIT_LAYER, BEIT_LIKE),
        **_classes(LAYER, RF_DETR_LAYER, RF_DETR_LIKE),
        f"{MODELS}dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": DINO_LAYER,  # its attention rotates and stays
    },
    whole_blocks={
        f"{MODELS}vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneLayer": VITPOSE_LAYER,
        f"{MODELS}dpt.modeling_dpt.DPTViTLayer": OLDER_LAYER,
        f"{MODELS}yolos.modeling_yolos.YolosLayer": OLDER_LAYER,
    },
    window_blocks={
        **_classes(LAYER, SWIN_LAYER, SWIN_LIKE),
        f"{MODELS}donut.modeling_donut_swin.DonutSwinLayer": DONUT_LAYER,
        f"{MODELS}maskformer.modeling_maskformer_swin.MaskFormerSwinLayer": MASKFORMER_LAYER,
    },
    ffns_apart={
        f"{MODELS}swinv2.modeling_swinv2.Swinv2Layer": OLDER_FFN,
        f"{MODELS}data2vec.modeling_data2vec_vision.Data2VecVisionLayer": OLDER_FFN,
    },
    refused={f"{MODELS}{path}": reason for path, reason in REFUSED.items()},
    loops={
        **_classes(LOOP, "layers", VIT_LIKE, CLIP_LIKE, BEIT_LIKE, BLIP_LIKE, BLIP2_LIKE),
        f"{MODELS}vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneEncoder": "layer",
        f"{MODELS}donut.modeling_donut_swin.DonutSwinStage": "blocks",
        f"{MODELS}dpt.modeling_dpt.DPTViTEncoder": "layer",
        **_classes(LOOP, "layer", DINO_LIKE),
        **_classes(LOOP, "blocks", SWIN_LIKE),
    },
    resets={
        **_classes(LOOP, _reset_swin_stage, SWIN_LIKE),
        f"{MODELS}donut.modeling_donut_swin.DonutSwinStage": _reset_swin_stage,
    },
    resembling=re.compile(r"Vi(T|sion)\w*(Attention|MLP)$"),
    meanings={
        "transformers.activations.GELUActivation": lambda act: nn.GELU() if act.act is nn.functional.gelu else act,
        "transformers.activations.GELUTanh": lambda _: nn.GELU("tanh"),
        "transformers.activations.NewGELUActivation": lambda _: nn.GELU("tanh"),
        "transformers.activations.QuickGELUActivation": lambda _: QuickGELU(),
        **_named("LayerScale", lambda scale: ChannelScale(scale.lambda1), DINO_LIKE, RF_DETR_LIKE),
        **_named("DropPath", lambda _: nn.Identity(), DINO_LIKE, RF_DETR_LIKE, SWIN_LIKE, BEIT_LIKE),
        f"{MODELS}dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayerScale": lambda scale: ChannelScale(scale.lambda1),
        f"{MODELS}dinov3_vit.modeling_dinov3_vit.DINOv3ViTDropPath": lambda _: nn.Identity(),
    },
    mergings=dict.fromkeys(
        (
            f"{MODELS}swin.modeling_swin.SwinPatchMerging",
            f"{MODELS}donut.modeling_donut_swin.DonutSwinPatchMerging",
            f"{MODELS}maskformer.modeling_maskformer_swin.MaskFormerSwinPatchMerging",
        ),
        lambda part: MergingParts(part.norm, part.reduction, wrap=TokensMerging),
    ),
    patch_embeddings={
        **_named("PatchEmbeddings", "projection", VIT_LIKE, DINO_LIKE, RF_DETR_LIKE, SWIN_LIKE, BEIT_LIKE),
        **_named("VisionEmbeddings", "patch_embedding", CLIP_LIKE, BLIP_LIKE, BLIP2_LIKE),
    },
)
