"""The models of the coverage table: one row each, small for tests or of a published size, and what of each fuses.

Libraries are imported where a row is built; a row whose library is missing raises ImportError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[bool], tuple[tuple[Any, ...], dict[str, Any]]]  # (published size) → arguments of a forward
# "whole": every block in both halves; "ffn": one half of each, the other is skipped with a reason; "nothing"
WHOLE, FFN, NOTHING = "whole", "ffn", "nothing"
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
BASE = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL_SWIN = {"image_size": 56, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}
BASE_SWIN = {"image_size": 224, "patch_size": 4, "embed_dim": 96, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24]}
TOKENS = 11  # of a text


@dataclass(frozen=True)
class Row:
    """One model.

    Args:
        library: its package.  fuses: WHOLE, FFN or NOTHING.
        build: (published size) → the model, freshly initialised.
        inputs: (published size) → arguments of its forward.
        skipped: words of the reasons for what is left.
    """

    library: str
    build: Callable[[bool], nn.Module]
    inputs: Inputs
    fuses: str = WHOLE
    skipped: tuple[str, ...] = ()


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- transformers -----------------------------------------------------------------------------------------------------


def _side(published: bool) -> int:
    return 224 if published else 32


def _patch(published: bool) -> int:
    return 16 if published else 8


def _images(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (seeded(2, 3, _side(published), _side(published)),), {}


def _images_and_noise(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    noise = seeded(2, (_side(published) // _patch(published)) ** 2).argsort(-1).float()  # in order in bfloat16 too
    return _images(published)[0], {"noise": noise}


def _maps(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side = 224 if published else 56
    return (seeded(2, 3, side, side),), {}


def _wide_maps(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side = 224 if published else 56
    return (seeded(2, 3, side, 2 * side),), {}


def _padded_maps(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (seeded(2, 3, *((200, 250) if published else (44, 92))),), {}


def _text(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 7:] = 0
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS) % 90 + 3
    return (tokens,), {"attention_mask": mask}


def _naflex(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    valid = torch.arange(16) < torch.tensor([[16], [9]])
    shapes = torch.tensor([[4, 4], [3, 3]])
    return (seeded(2, 16, 768 if published else 192),), {
        "pixel_attention_mask": valid.long(),
        "spatial_shapes": shapes,
    }


def hf(
    model: str,
    config: str = "",
    *,
    swin: bool = False,
    without: tuple[str, ...] = (),
    inputs: Inputs = _images,
    fuses: str = WHOLE,
    skipped: tuple[str, ...] = (),
    **settings: Any,
) -> Row:
    """A model of transformers: ``config`` by default the class named after the model's."""

    def build(published: bool) -> nn.Module:
        import transformers

        base = (
            {**(BASE_SWIN if published else SMALL_SWIN), "window_size": 7}
            if swin
            else {
                **(BASE if published else SMALL),
                "image_size": _side(published),
                "patch_size": _patch(published),
            }
        )
        for name in ("Model", "Backbone", "ForDepthEstimation"):
            guess = model.removesuffix(name) if model.endswith(name) else ""
            if guess:
                break
        given = {**base, **settings}
        arguments = {k: v(published) if callable(v) else v for k, v in given.items() if k not in without}
        made = _class(transformers, model)(_class(transformers, config or f"{guess}Config")(**arguments))
        return made.eval()

    return Row("transformers", build, inputs, fuses, skipped)


def made(
    model: str, config: str, inputs: Inputs, fuses: str = WHOLE, skipped: tuple[str, ...] = (), **settings: Any
) -> Row:
    """A model of transformers by the settings of its configuration, which are given whole."""

    def build(published: bool) -> nn.Module:
        import transformers

        values = {k: v(published) if callable(v) else v for k, v in settings.items()}
        return _class(transformers, model)(_class(transformers, config)(**values)).eval()

    return Row("transformers", build, inputs, fuses, skipped)


def _class(transformers: Any, name: str) -> Any:
    """A class of transformers, which exports not all of them at its top."""
    if hasattr(transformers, name):
        return getattr(transformers, name)
    import importlib

    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


MLP_RATIO = {"without": ("intermediate_size",), "mlp_ratio": 2}
TEXT = {"without": ("image_size", "patch_size"), "inputs": _text, "vocab_size": 99, "max_position_embeddings": 16}
GELU = {"hidden_act": "gelu"}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE, RELATIVE, COSINE, POOLED, UNKNOWN = "rotary", "relative position", "cosine", "pooled", "no operator"

TRANSFORMERS = {
    "ViT": hf("ViTModel"),
    "DeiT": hf("DeiTModel"),
    "ViTMAE": hf("ViTMAEModel", mask_ratio=0.25, inputs=_images_and_noise),
    "ViT-MSN": hf("ViTMSNModel"),
    "I-JEPA": hf("IJepaModel"),
    "DINOv2": hf("Dinov2Model", **MLP_RATIO),
    "DINOv2 with registers": hf("Dinov2WithRegistersModel", **MLP_RATIO),
    "CLIP vision": hf("CLIPVisionModel", "CLIPVisionConfig", **GELU),
    "CLIP vision, quick GELU": hf("CLIPVisionModel", "CLIPVisionConfig"),
    "CLIP text": hf("CLIPTextModel", "CLIPTextConfig", **TEXT, **GELU, **ENDS),
    "SigLIP vision": hf("SiglipVisionModel", "SiglipVisionConfig"),
    "SigLIP text": hf("SiglipTextModel", "SiglipTextConfig", **TEXT, **ENDS),
    "SigLIP2": hf(
        *("Siglip2VisionModel", "Siglip2VisionConfig"), without=("image_size",), num_patches=16, inputs=_naflex
    ),
    "BEiT": hf("BeitModel", use_relative_position_bias=True, use_absolute_position_embeddings=True),
    "BEiT, shared biases": hf("BeitModel", use_shared_relative_position_bias=True),
    "Swin": hf("SwinModel", swin=True, inputs=_maps),
    "Swin, oblong": hf("SwinModel", swin=True, inputs=_wide_maps),
    "Swin backbone": hf("SwinBackbone", "SwinConfig", swin=True, inputs=_maps, out_features=["stage1", "stage2"]),
    "DonutSwin": hf("donut.modeling_donut_swin.DonutSwinModel", "DonutSwinConfig", swin=True, inputs=_maps),
    "MaskFormerSwin": hf(
        *("maskformer.modeling_maskformer_swin.MaskFormerSwinModel", "MaskFormerSwinConfig"),
        swin=True,
        inputs=_padded_maps,
    ),
    "ViTPose": hf("VitPoseBackbone", "VitPoseBackboneConfig", **MLP_RATIO),
    "OWL-ViT": hf("OwlViTVisionModel", "OwlViTVisionConfig", **GELU),
    "OWLv2": hf("Owlv2VisionModel", "Owlv2VisionConfig", **GELU),
    "MetaCLIP 2": hf("MetaClip2VisionModel", "MetaClip2VisionConfig", **GELU),
    "AltCLIP": hf("AltCLIPVisionModel", "AltCLIPVisionConfig", **GELU),
    "Chinese CLIP": hf("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", **GELU),
    "BLIP": hf("BlipVisionModel", "BlipVisionConfig"),
    "BLIP-2": hf("Blip2VisionModel", "Blip2VisionConfig"),
    "DPT": hf("DPTModel"),
    "YOLOS": hf("YolosModel", image_size=lambda published: [_side(published)] * 2, num_detection_tokens=4),
    "DINOv3-ViT": hf("DINOv3ViTModel"),
    "DINOv3-ViT, gated": hf("DINOv3ViTModel", use_gated_mlp=True),
    "SwinV2": hf("Swinv2Model", swin=True, inputs=_maps, fuses=FFN, skipped=(COSINE,)),
    "Data2Vec": hf("Data2VecVisionModel", fuses=FFN, skipped=(UNKNOWN,)),
    "ViTDet": hf("VitDetModel", **MLP_RATIO, use_relative_position_embeddings=True, fuses=FFN, skipped=(RELATIVE,)),
    "SAM": hf(
        *("SamVisionModel", "SamVisionConfig"),
        without=("intermediate_size",),
        mlp_dim=96,
        output_channels=16,
        window_size=2,
        global_attn_indexes=[1],
        fuses=FFN,
        skipped=(RELATIVE,),
    ),
}


def _depth_anything(published: bool) -> nn.Module:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    sizes = {k: v for k, v in (BASE if published else SMALL).items() if k != "intermediate_size"}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    patch, dim = _patch(published), sizes["hidden_size"]
    backbone = Dinov2Config(
        **{**sizes, "num_hidden_layers": 4},
        mlp_ratio=2,
        image_size=_side(published),
        patch_size=patch,
        out_features=stages,
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=dim,
        patch_size=patch,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    return DepthAnythingForDepthEstimation(config).eval()


def _upernet(published: bool) -> nn.Module:
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    sizes = {"embed_dim": 96 if published else 24, "depths": [1, 2, 1, 1], "num_heads": [2, 2, 2, 2]}
    backbone = SwinConfig(image_size=224, **sizes, out_features=["stage1", "stage2", "stage3", "stage4"])
    settings = {"hidden_size": 16, "num_labels": 3, "pool_scales": [1], "auxiliary_channels": 8}
    config = UperNetConfig(backbone_config=backbone, auxiliary_in_channels=4 * sizes["embed_dim"], **settings)
    return UperNetForSemanticSegmentation(config).eval()


def _llava(published: bool) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {**(BASE if published else SMALL), "num_hidden_layers": 3}  # the last layer but one is what LLaVA reads
    vision = CLIPVisionConfig(**sizes, **GELU, image_size=_side(published), patch_size=_patch(published))
    text = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, **ENDS
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=98)
    return LlavaForConditionalGeneration(config).eval()


def _picture_in_a_text(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    patches = (_side(published) // _patch(published)) ** 2
    tokens = torch.cat([torch.full((1, patches), 98), torch.arange(3, 9).view(1, 6)], dim=1)
    return (), {"input_ids": tokens, "pixel_values": _images(published)[0][0][:1], "use_cache": False}


def _rf_detr(published: bool) -> nn.Module:
    from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Backbone, RfDetrDinov2Config

    sizes = {k: v for k, v in (BASE if published else SMALL).items() if k != "intermediate_size"}
    settings = {"mlp_ratio": 2, "image_size": 64, "patch_size": 8, "num_windows": 2, "window_block_indexes": [0]}
    return RfDetrDinov2Backbone(RfDetrDinov2Config(**sizes, **settings, out_features=["stage1", "stage2"])).eval()


def _mask2former(published: bool) -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig

    dim = 96 if published else 24
    stages = {"depths": [1, 2, 1, 1], "num_heads": [2, 2, 2, 2]}
    swin = SwinConfig(image_size=224, embed_dim=dim, **stages, out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
    rest = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 4}
    widths = dict.fromkeys(
        ("feature_size", "hidden_dim", "mask_feature_size", "encoder_feedforward_dim", "dim_feedforward"), 32
    )
    return Mask2FormerModel(Mask2FormerConfig(backbone_config=swin, **rest, **widths)).eval()


def _zoedepth(published: bool) -> nn.Module:
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation

    backbone = BeitConfig(
        **{**(BASE if published else SMALL), "num_hidden_layers": 4},
        image_size=64,
        patch_size=16,
        use_relative_position_bias=True,
        out_features=[f"stage{i}" for i in (1, 2, 3, 4)],
        reshape_hidden_states=False,
    )
    rest = {"fusion_hidden_size": 8, "bottleneck_features": 8, "num_relative_features": 8}
    config = ZoeDepthConfig(backbone_config=backbone, neck_hidden_sizes=[8, 8, 8, 8], **rest)
    return ZoeDepthForDepthEstimation(config).eval()


TRANSFORMERS |= {
    "RF-DETR (windowed DINOv2)": Row("transformers", _rf_detr, lambda _: ((seeded(2, 3, 64, 64),), {})),
    "Mask2Former (Swin backbone)": Row("transformers", _mask2former, lambda _: ((seeded(1, 3, 224, 224),), {})),
    "ZoeDepth (BEiT backbone)": Row("transformers", _zoedepth, lambda _: ((seeded(1, 3, 64, 64),), {})),
    "LLaVA (CLIP tower)": Row("transformers", _llava, _picture_in_a_text),
    "Depth Anything (DINOv2 backbone)": Row("transformers", _depth_anything, _images),
    "UperNet (Swin backbone)": Row("transformers", _upernet, lambda _: ((seeded(1, 3, 224, 224),), {})),
}

# --- torchvision, open_clip, PyTorch ----------------------------------------------------------------------------------


def _torchvision_vit(published: bool) -> nn.Module:
    from torchvision.models import VisionTransformer

    sizes = (224, 16, 2, 12, 768, 3072) if published else (32, 8, 2, 3, 48, 96)
    model = VisionTransformer(*sizes, num_classes=5)
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model.eval()


def _torchvision_swin(version: str = "") -> Callable[[bool], nn.Module]:
    def build(published: bool) -> nn.Module:
        from torchvision.models import swin_transformer

        dims: Any = (96, [2, 2, 2, 2], [3, 6, 12, 24]) if published else (24, [2, 2], [2, 4])
        parts = (getattr(swin_transformer, name + version) for name in ("SwinTransformerBlock", "PatchMerging"))
        block, merging = parts
        model = swin_transformer.SwinTransformer(
            [4, 4], *dims, [7, 7], num_classes=5, block=block, downsample_layer=merging
        )
        return model.eval()

    return build


def _open_clip(quick_gelu: bool) -> Callable[[bool], nn.Module]:
    def build(published: bool) -> nn.Module:
        from open_clip.model import CLIP

        width, heads, side, patch = (768, 12, 224, 16) if published else (64, 4, 32, 8)
        vision = {"image_size": side, "layers": 2, "width": width, "head_width": width // heads, "patch_size": patch}
        text = {"context_length": TOKENS, "vocab_size": 99, "width": width, "heads": heads, "layers": 2}
        return CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu).eval()

    return build


def _open_clip_eva(trunk: str) -> Callable[[bool], nn.Module]:
    """A CLIP whose image tower is an EVA of timm's, as open_clip's configurations have it, two blocks deep."""

    def build(published: bool) -> nn.Module:
        import timm
        from open_clip.model import CustomTextCLIP

        width, heads = (768, 12) if published else (64, 4)
        vision = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None}
        text = {"context_length": TOKENS, "vocab_size": 99, "width": width, "heads": heads, "layers": 2}
        model: Any = CustomTextCLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
        small = {} if published else {"embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
        model.visual.trunk = timm.create_model(trunk, depth=2, num_classes=32, global_pool="token", **small)
        return model.eval()

    return build


def _image_and_text(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_images(published)[0][0], _text(published)[0][0]), {}


def _torch_encoder(batch_first: bool) -> Callable[[bool], nn.Module]:
    def build(published: bool) -> nn.Module:
        sizes = (768, 12, 3072) if published else (48, 3, 96)
        options = {"activation": "gelu", "norm_first": True, "batch_first": batch_first}
        layer = nn.TransformerEncoderLayer(*sizes, **options)  # type: ignore[arg-type]
        return nn.TransformerEncoder(layer, 2, nn.LayerNorm(sizes[0]), enable_nested_tensor=False).eval()

    return build


def _tokens(batch_first: bool) -> Callable[[bool], tuple[tuple[Any, ...], dict[str, Any]]]:
    def inputs(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, padding = seeded(2, TOKENS, 768 if published else 48), torch.zeros(2, TOKENS, dtype=torch.bool)
        padding[1, 7:] = True
        return (x if batch_first else x.transpose(0, 1),), {"src_key_padding_mask": padding}

    return inputs


OTHERS = {
    "torchvision vit": Row("torchvision", _torchvision_vit, _images),
    "torchvision swin": Row("torchvision", _torchvision_swin(), _maps),
    "torchvision swin, padded": Row("torchvision", _torchvision_swin(), _padded_maps),
    "torchvision swin, oblong": Row("torchvision", _torchvision_swin(), _wide_maps),
    "torchvision swin_v2": Row("torchvision", _torchvision_swin("V2"), _maps, FFN, (COSINE,)),
    "open_clip CLIP": Row("open_clip", _open_clip(False), _image_and_text),
    "open_clip CLIP, quick GELU": Row("open_clip", _open_clip(True), _image_and_text),
    "open_clip EVA01-g": Row("open_clip", _open_clip_eva("eva_giant_patch14_clip_224"), _image_and_text),
    "open_clip EVA02-B": Row("open_clip", _open_clip_eva("eva02_base_patch16_clip_224"), _image_and_text),
    "open_clip EVA02-L": Row("open_clip", _open_clip_eva("eva02_large_patch14_clip_224"), _image_and_text),
    "torch.nn.TransformerEncoder": Row("torch", _torch_encoder(True), _tokens(True)),
    "torch.nn.TransformerEncoder, sequence first": Row("torch", _torch_encoder(False), _tokens(False)),
}


def tensors_of(output: Any) -> list[Tensor]:
    """Every tensor of an output: of tuples, dictionaries and transformers' ModelOutput."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []
