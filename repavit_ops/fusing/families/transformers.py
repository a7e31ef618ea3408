"""The vision (and CLIP-like text) encoders of transformers 5."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from torch import nn

from ...nn import QuickGELU
from ...nn.foreign_block import ChannelScale
from ...nn.foreign_windows import TokensMerging
from ..family import Family
from ..folding import gelu_variant, rms_norm
from ..patches import MergingParts
from ..rules import plain
from .transformers_layers import (
    AIM_LAYER,
    ATTENTION,
    BEIT_LAYER,
    BLIP2_ATTENTION,
    BLIP_ATTENTION,
    BLIP_LAYER,
    BRIDGETOWER_BLOCK,
    CLIP_ATTENTION,
    CLIP_LAYER,
    DINO_LAYER,
    DONUT_LAYER,
    EAGER_ATTENTION,
    EAGER_LAYER,
    GATED_MLP,
    GROUPVIT_LAYER,
    INTERNVL_LAYER,
    LW_DETR_LAYER,
    MASKFORMER_LAYER,
    MLLAMA_LAYER,
    MLP,
    NORMED_HEADS,
    OLDER_LAYER,
    PIXIO_LAYER,
    RF_DETR_LAYER,
    SWIN_LAYER,
    TUPLE_LAYER,
    VIT_LAYER,
    VITPOSE_LAYER,
    mlp_of,
    reset_swin_stage,
)
from .transformers_names import (
    AIM_LIKE,
    BEIT_LIKE,
    BLIP2_LIKE,
    BLIP_LIKE,
    CLIP_LIKE,
    DINO3_LIKE,
    DINO_LIKE,
    EOMT_LIKE,
    FFNS_APART,
    GATED,
    GATED_MLPS,
    GIT_LIKE,
    INTERNVL_LIKE,
    JANUS_LIKE,
    KIMI_LIKE,
    LLAMA4_LIKE,
    LW_DETR_LIKE,
    MLCD_LIKE,
    MODELS,
    OMNI_LIKE,
    ONLY_FFN,
    PACKED_LIKE,
    PHI4_LIKE,
    PIXIO_LIKE,
    PIXTRAL_LIKE,
    REFUSED,
    RF_DETR_LIKE,
    RMS_NORMS,
    SAM3_LIKE,
    SAPIENS2_LIKE,
    SWIN_LIKE,
    TEXT_LIKE,
    TIPS_LIKE,
    TURNED,
    VIDEO_LLAMA_LIKE,
    VIT_LIKE,
    VJEPA2_LIKE,
    Names,
)
from .transformers_rotary import (
    DINO3_ATTENTION,
    DINO3_LAYER,
    KIMI_ATTENTION,
    LLAMA4_ATTENTION,
    LLAMA4_LAYER,
    MLCD_ATTENTION,
    MLCD_LAYER,
    OMNI_ATTENTION,
    PACKED_ATTENTION,
    PACKED_SEQUENCE_BLOCK,
    PHI4_ATTENTION,
    PHI4_LAYER,
    PIXTRAL_ATTENTION,
    PIXTRAL_LAYER,
    SAM3_ATTENTION,
    SAPIENS2_ATTENTION,
    VIDEO_LLAMA_ATTENTION,
    VIDEO_LLAMA_LAYER,
    VJEPA2_ATTENTION,
    VJEPA2_LAYER,
)

LAYER, ATTN, FFN, LOOP = range(4)
DINOS = (DINO_LIKE, EOMT_LIKE, TIPS_LIKE)


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


# --- what nothing else knows ------------------------------------------------------------------------------------------

LOOKS_LIKE_ONE = re.compile(r"(Attention|MLP|Mlp|FFN|FeedForward(Network)?|Intermediate)$")
OF_TEXT = re.compile(r"Text|Decoder|Bert|Roberta")
SEEN = re.compile(r"Vi(T|sion)\w*(Attention|MLP|Mlp)$")


def _resembles(cls: type[nn.Module]) -> bool:
    """Whether a class looks like an attention or FFN of an encoder of images.

    By its name, and by what models of its module take. What stands around a backbone (decoders of detection and
    segmentation) is no encoder's.
    """
    if SEEN.search(cls.__name__):
        return True
    if not LOOKS_LIKE_ONE.search(cls.__name__) or OF_TEXT.search(cls.__name__):
        return False
    module = vars(sys.modules[cls.__module__])
    takes = {str(getattr(other, "main_input_name", "")) for other in module.values()}
    return any(name.startswith("pixel_values") for name in takes) and "load_backbone" not in module


def _why_unknown(module: nn.Module) -> str | None:
    """What of an attention or FFN without a rule is in the way, as far as its parts and its forward tell."""
    children = dict(module.named_children())
    calls = inspect.unwrap(type(module).forward).__code__.co_names
    if any("gate" in name for name in children) and len(children) > 2:
        return GATED
    if any(name in ("q_norm", "k_norm", "query_norm", "key_norm") for name in children):
        return "it normalises queries and keys"
    if any("rotary" in name or "rope" in name for name in calls):
        return TURNED
    if any(isinstance(child, nn.Conv2d) for child in module.modules()):
        return "a convolution stands in it"
    for child in map(plain, children.values()):
        if type(child).__module__ in ACTIVATIONS and gelu_variant(child) is None:
            return f"its activation is {type(child).__name__}; only GELU (erf, tanh or quick) can be fused"
    return None


ACTIVATIONS = ("transformers.activations", nn.ReLU.__module__)

TRANSFORMERS = Family(
    "transformers",
    oldest="5.10",  # up to 5.15 without DINOv2, whose parts had other names
    attentions={
        **_classes(ATTN, ATTENTION, VIT_LIKE, DINO_LIKE, TIPS_LIKE, PIXIO_LIKE, LW_DETR_LIKE, RF_DETR_LIKE, BEIT_LIKE),
        **_classes(ATTN, CLIP_ATTENTION, CLIP_LIKE, TEXT_LIKE, EOMT_LIKE, AIM_LIKE),
        **_classes(ATTN, DINO3_ATTENTION, DINO3_LIKE),
        **_classes(ATTN, SAPIENS2_ATTENTION, SAPIENS2_LIKE),
        **_classes(ATTN, MLCD_ATTENTION, MLCD_LIKE),
        **_classes(ATTN, PIXTRAL_ATTENTION, PIXTRAL_LIKE),
        **_classes(ATTN, LLAMA4_ATTENTION, LLAMA4_LIKE),
        **_classes(ATTN, SAM3_ATTENTION, SAM3_LIKE),
        **_classes(ATTN, PHI4_ATTENTION, PHI4_LIKE),
        **_classes(ATTN, VJEPA2_ATTENTION, VJEPA2_LIKE),
        **_classes(ATTN, PACKED_ATTENTION, PACKED_LIKE),
        **_classes(ATTN, OMNI_ATTENTION, OMNI_LIKE),
        **_classes(ATTN, KIMI_ATTENTION, KIMI_LIKE),
        **_classes(ATTN, VIDEO_LLAMA_ATTENTION, VIDEO_LLAMA_LIKE),
        **_classes(ATTN, EAGER_ATTENTION, GIT_LIKE),
        **_classes(ATTN, NORMED_HEADS, INTERNVL_LIKE, JANUS_LIKE),
        **_classes(ATTN, BLIP_ATTENTION, BLIP_LIKE),
        **_classes(ATTN, BLIP2_ATTENTION, BLIP2_LIKE),
    },
    ffns={
        **_classes(FFN, MLP, VIT_LIKE, *DINOS, PIXIO_LIKE, RF_DETR_LIKE, BEIT_LIKE, INTERNVL_LIKE, JANUS_LIKE),
        **_classes(FFN, MLP, CLIP_LIKE, GIT_LIKE, TEXT_LIKE, BLIP_LIKE, BLIP2_LIKE, SWIN_LIKE),
        **_classes(FFN, mlp_of("fc1", "act", "fc2"), LW_DETR_LIKE, KIMI_LIKE),
        **{f"{MODELS}{path}": mlp_of(*names) for path, names in ONLY_FFN.items()},
    },
    gated_ffns={f"{MODELS}{path}": GATED_MLP for path in GATED_MLPS},
    blocks={
        **_classes(LAYER, AIM_LAYER, AIM_LIKE),
        **_classes(LAYER, PACKED_SEQUENCE_BLOCK, PACKED_LIKE, OMNI_LIKE, KIMI_LIKE),
        **_classes(LAYER, VIDEO_LLAMA_LAYER, VIDEO_LLAMA_LIKE),
        **_classes(LAYER, VIT_LAYER, VIT_LIKE),
        **_classes(LAYER, DINO_LAYER, DINO_LIKE, TIPS_LIKE, EOMT_LIKE),
        **_classes(LAYER, PIXIO_LAYER, PIXIO_LIKE),
        **_classes(LAYER, CLIP_LAYER, CLIP_LIKE, TEXT_LIKE, BLIP2_LIKE, JANUS_LIKE),
        **_classes(LAYER, EAGER_LAYER, GIT_LIKE),
        **_classes(LAYER, INTERNVL_LAYER, INTERNVL_LIKE),
        **_classes(LAYER, LW_DETR_LAYER, LW_DETR_LIKE),
        **_classes(LAYER, BLIP_LAYER, BLIP_LIKE),
        **_classes(LAYER, BEIT_LAYER, BEIT_LIKE),
        **_classes(LAYER, RF_DETR_LAYER, RF_DETR_LIKE),
        **_classes(LAYER, DINO3_LAYER, DINO3_LIKE, SAPIENS2_LIKE),
        **_classes(LAYER, MLCD_LAYER, MLCD_LIKE),
        **_classes(LAYER, PIXTRAL_LAYER, PIXTRAL_LIKE),
        **_classes(LAYER, LLAMA4_LAYER, LLAMA4_LIKE),
        **_classes(LAYER, PHI4_LAYER, PHI4_LIKE),
        **_classes(LAYER, VJEPA2_LAYER, VJEPA2_LIKE),
    },
    whole_blocks={
        f"{MODELS}bridgetower.modeling_bridgetower.BridgeTowerResidualAttention": BRIDGETOWER_BLOCK,
        f"{MODELS}flava.modeling_flava.FlavaLayer": TUPLE_LAYER,
        f"{MODELS}groupvit.modeling_groupvit.GroupViTEncoderLayer": GROUPVIT_LAYER,
        f"{MODELS}mllama.modeling_mllama.MllamaVisionEncoderLayer": MLLAMA_LAYER,
        f"{MODELS}videomae.modeling_videomae.VideoMAELayer": OLDER_LAYER,
        f"{MODELS}vilt.modeling_vilt.ViltLayer": TUPLE_LAYER,
        f"{MODELS}vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneLayer": VITPOSE_LAYER,
        f"{MODELS}dpt.modeling_dpt.DPTViTLayer": OLDER_LAYER,
        f"{MODELS}yolos.modeling_yolos.YolosLayer": OLDER_LAYER,
    },
    window_blocks={
        **_classes(LAYER, SWIN_LAYER, SWIN_LIKE),
        f"{MODELS}clap.modeling_clap.ClapAudioLayer": DONUT_LAYER,
        f"{MODELS}donut.modeling_donut_swin.DonutSwinLayer": DONUT_LAYER,
        f"{MODELS}maskformer.modeling_maskformer_swin.MaskFormerSwinLayer": MASKFORMER_LAYER,
    },
    ffns_apart={f"{MODELS}{path}": names for path, names in FFNS_APART.items()},
    refused={f"{MODELS}{path}": reason for path, reason in REFUSED.items()},
    loops={
        **_classes(
            LOOP,
            "layers",
            VIT_LIKE,
            CLIP_LIKE,
            GIT_LIKE,
            TEXT_LIKE,
            BEIT_LIKE,
            BLIP_LIKE,
            BLIP2_LIKE,
            PIXIO_LIKE,
            JANUS_LIKE,
            AIM_LIKE,
            MLCD_LIKE,
            PIXTRAL_LIKE,
            VIDEO_LLAMA_LIKE,
            KIMI_LIKE,
        ),
        f"{MODELS}clap.modeling_clap.ClapAudioStage": "blocks",
        f"{MODELS}groupvit.modeling_groupvit.GroupViTTextEncoder": "layers",
        f"{MODELS}videomae.modeling_videomae.VideoMAEEncoder": "layer",
        f"{MODELS}vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneEncoder": "layer",
        f"{MODELS}donut.modeling_donut_swin.DonutSwinStage": "blocks",
        f"{MODELS}dpt.modeling_dpt.DPTViTEncoder": "layer",
        **_classes(LOOP, "layer", DINO_LIKE, DINO3_LIKE, TIPS_LIKE, INTERNVL_LIKE, VJEPA2_LIKE, SAPIENS2_LIKE),
        f"{MODELS}vjepa2.modeling_vjepa2.VJEPA2Predictor": "layer",
        **_classes(LOOP, "blocks", SWIN_LIKE, PACKED_LIKE),
    },
    resets={
        **_classes(LOOP, reset_swin_stage, SWIN_LIKE),
        f"{MODELS}clap.modeling_clap.ClapAudioStage": reset_swin_stage,
        f"{MODELS}donut.modeling_donut_swin.DonutSwinStage": reset_swin_stage,
    },
    resembling=_resembles,
    why_unknown=_why_unknown,
    meanings={
        "transformers.activations.GELUActivation": lambda act: nn.GELU() if act.act is nn.functional.gelu else act,
        "transformers.activations.GELUTanh": lambda _: nn.GELU("tanh"),
        "transformers.activations.NewGELUActivation": lambda _: nn.GELU("tanh"),
        "transformers.activations.FastGELUActivation": lambda _: nn.GELU("tanh"),  # sqrt(2/pi) to ten digits
        "transformers.activations.AccurateGELUActivation": lambda _: nn.GELU("tanh"),
        "transformers.activations.QuickGELUActivation": lambda _: QuickGELU(),
        "transformers.activations.SiLUActivation": lambda _: nn.SiLU(),
        **{f"{MODELS}{path}": lambda norm: rms_norm(norm, norm.variance_epsilon) for path in RMS_NORMS},
        **_named("LayerScale", lambda scale: ChannelScale(scale.lambda1), *DINOS, RF_DETR_LIKE),
        **_named("DropPath", lambda _: nn.Identity(), *DINOS, PIXIO_LIKE, RF_DETR_LIKE, SWIN_LIKE, BEIT_LIKE),
        f"{MODELS}dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayerScale": lambda scale: ChannelScale(scale.lambda1),
        f"{MODELS}dinov3_vit.modeling_dinov3_vit.DINOv3ViTDropPath": lambda _: nn.Identity(),
        f"{MODELS}vjepa2.modeling_vjepa2.VJEPA2DropPath": lambda _: nn.Identity(),
        f"{MODELS}sapiens2.modeling_sapiens2.Sapiens2LayerScale": lambda scale: ChannelScale(scale.lambda1),
        f"{MODELS}sapiens2.modeling_sapiens2.Sapiens2DropPath": lambda _: nn.Identity(),
    },
    mergings=dict.fromkeys(
        (
            f"{MODELS}swin.modeling_swin.SwinPatchMerging",
            f"{MODELS}clap.modeling_clap.ClapAudioPatchMerging",
            f"{MODELS}donut.modeling_donut_swin.DonutSwinPatchMerging",
            f"{MODELS}maskformer.modeling_maskformer_swin.MaskFormerSwinPatchMerging",
        ),
        lambda part: MergingParts(part.norm, part.reduction, wrap=TokensMerging),
    ),
    patch_embeddings={
        **_named(
            "PatchEmbeddings",
            "projection",
            VIT_LIKE,
            DINO_LIKE,
            EOMT_LIKE,
            PIXIO_LIKE,
            RF_DETR_LIKE,
            SWIN_LIKE,
            BEIT_LIKE,
        ),
        **_named("VisionEmbeddings", "patch_embedding", CLIP_LIKE, GIT_LIKE, BLIP_LIKE, BLIP2_LIKE),
    },
)
