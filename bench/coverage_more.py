"""All rows of the coverage table; here the vision encoders of transformers beyond those that most people run.

Towers of videos, audio and vision-language models, and encoders of which nothing but the FFN fuses, or not even that.
"""

from __future__ import annotations

from typing import Any

import torch
from coverage_models import (
    ENDS,
    FFN,
    MLP_RATIO,
    NOTHING,
    OTHERS,
    RELATIVE,
    TEXT,
    TRANSFORMERS,
    Inputs,
    Row,
    _images,
    _patch,
    _side,
    _text,
    hf,
    made,
    seeded,
)
from coverage_towers import TOWERS
from torch import nn

REDUCED, CONVOLUTION, CROSS, GATED = "smaller map", "convolution", "cross-attention", "gated"
FLOAT_RATIO = {"without": ("intermediate_size",), "mlp_ratio": 2.0}
STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}


def _pairs(published: bool) -> list[int]:
    return [_side(published)] * 2


def _patch_pair(published: bool) -> list[int]:
    return [_patch(published)] * 2


def _side_64(batch: int = 2, side: int = 64) -> Inputs:
    return lambda _: ((seeded(batch, 3, side, side),), {})


def _video(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (seeded(1, 4, 3, _side(published), _side(published)),), {}


def _frames(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (seeded(8, 3, _side(published), _side(published)),), {}


def _with_patch_mask(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    grid = _side(published) // _patch(published)
    mask = torch.ones(2, grid, grid, dtype=torch.bool)
    mask[1, grid // 2 :] = False
    return (seeded(2, 3, _side(published), _side(published)), mask), {}


def _spectrogram(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (seeded(2, 64, 32),), {}


def _packed_images(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    grids = torch.tensor([[4, 4], [2, 3], [1, 2]])
    return (seeded(1, int(grids.prod(-1).sum()), 3 * _patch(published) ** 2),), {"image_grid_hw": grids}


def _tiles(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pixels = seeded(1, 1, 4, 3, _side(published), _side(published))
    return (pixels, torch.tensor([[1]]), torch.tensor([[[1, 1, 1, 0]]])), {}


def _image_beside_text(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tokens = _text(published)[0][0]
    pixels = seeded(2, 3, _side(published), _side(published))
    return (tokens,), {"pixel_values": pixels, "pixel_mask": torch.ones(2, _side(published), _side(published))}


WHOLE_ROWS = {
    "AST": hf(
        *("ASTModel", "ASTConfig"),
        without=("image_size",),
        inputs=_spectrogram,
        num_mel_bins=32,
        max_length=64,
        frequency_stride=10,
        time_stride=10,
        patch_size=16,
    ),
    "AIMv2": hf("Aimv2VisionModel", "Aimv2VisionConfig"),
    "DINOv2 giant's FFN": hf("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
    "ViViT": hf(
        "VivitModel", inputs=_video, num_frames=4, without=("patch_size",), tubelet_size=lambda p: [2, *_patch_pair(p)]
    ),
    "VideoMAE": hf("VideoMAEModel", inputs=_video, num_frames=4, tubelet_size=2),
    "Idefics2": hf(
        "idefics2.modeling_idefics2.Idefics2VisionTransformer",
        "idefics2.configuration_idefics2.Idefics2VisionConfig",
        inputs=_with_patch_mask,
    ),
    "Idefics3": hf(
        "idefics3.modeling_idefics3.Idefics3VisionTransformer",
        "idefics3.configuration_idefics3.Idefics3VisionConfig",
        inputs=_with_patch_mask,
    ),
    "SmolVLM": hf(
        "smolvlm.modeling_smolvlm.SmolVLMVisionTransformer", "smolvlm.configuration_smolvlm.SmolVLMVisionConfig"
    ),
    "InstructBLIP": hf("InstructBlipVisionModel", "InstructBlipVisionConfig"),
    "InstructBLIPVideo": hf("InstructBlipVideoVisionModel", "InstructBlipVideoVisionConfig"),
    "Kosmos-2": hf("kosmos2.modeling_kosmos2.Kosmos2VisionModel", "kosmos2.configuration_kosmos2.Kosmos2VisionConfig"),
    "CLIPSeg": hf("CLIPSegVisionModel", "CLIPSegVisionConfig"),
    "X-CLIP vision": hf(
        *("XCLIPVisionModel", "XCLIPVisionConfig"),
        inputs=_frames,
        mit_hidden_size=24,
        mit_num_hidden_layers=1,
        mit_num_attention_heads=3,
        mit_intermediate_size=48,
    ),
    "X-CLIP text": hf("XCLIPTextModel", "XCLIPTextConfig", **TEXT, **ENDS),
    "GIT": hf("git.modeling_git.GitVisionModel", "git.configuration_git.GitVisionConfig"),
    "GroupViT text": hf("GroupViTTextModel", "GroupViTTextConfig", **TEXT, **ENDS),
    "FLAVA": hf("FlavaImageModel", "FlavaImageConfig"),
    "ViLT": hf("ViltModel", inputs=_image_beside_text, vocab_size=99, max_position_embeddings=16, max_image_length=-1),
    "BridgeTower vision": made(
        *("bridgetower.modeling_bridgetower.BridgeTowerVisionModel", "BridgeTowerVisionConfig"),
        _images,
        hidden_size=lambda published: 768 if published else 64,
        num_hidden_layers=2,
        image_size=_side,
        patch_size=_patch,
    ),
    "InternVL": hf("InternVLVisionModel", "InternVLVisionConfig", image_size=_pairs, patch_size=_patch_pair),
    "Janus": hf("JanusVisionModel", "JanusVisionConfig", **FLOAT_RATIO),
    "Llama 3.2 vision": hf(
        *("MllamaVisionModel", "mllama.configuration_mllama.MllamaVisionConfig"),
        without=("num_attention_heads",),
        inputs=_tiles,
        num_global_layers=1,
        attention_heads=4,
        vision_output_dim=lambda published: 2 * (768 if published else 48),
        max_num_tiles=4,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [3, 1], [1, 4], [4, 1]],
    ),
    "Pixio": hf("PixioModel", **MLP_RATIO),
    "RADIO": hf("RadioModel", **FLOAT_RATIO),
    "RADIO, images in one sequence": hf("RadioModel", inputs=_packed_images, **FLOAT_RATIO),
    "TIPSv2": hf("Tipsv2VisionModel", "Tipsv2VisionConfig", **FLOAT_RATIO),
    "VideoMT": hf(
        *("VideomtForUniversalSegmentation", "VideomtConfig"),
        inputs=lambda published: ((_video(published)[0][0][:, :2],), {}),
        **MLP_RATIO,
        num_queries=4,
        num_blocks=1,
        num_upscale_blocks=1,
        num_labels=3,
    ),
    "LW-DETR (windowed ViT)": hf(
        *("lw_detr.modeling_lw_detr.LwDetrViTBackbone", "LwDetrViTConfig"),
        without=("intermediate_size",),
        inputs=_side_64(),
        mlp_ratio=2,
        image_size=64,
        pretrain_image_size=64,
        patch_size=8,
        window_block_indices=[0],
        num_windows=4,
        num_windows_side=2,
        out_features=["stage1", "stage2"],
    ),
    "CLAP audio": made(
        *("ClapAudioModel", "ClapAudioConfig"),
        lambda _: ((seeded(2, 1, 64, 8),), {"is_longer": torch.tensor([[False], [False]])}),
        patch_embeds_hidden_size=16,
        hidden_size=32,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        num_hidden_layers=2,
        window_size=4,
        spec_size=32,
        num_mel_bins=8,
        patch_size=4,
        patch_stride=[4, 4],
        enable_fusion=False,
    ),
    "TimmWrapper": made(
        *("TimmWrapperModel", "TimmWrapperConfig"),
        _images,
        architecture="vit_tiny_patch16_224",
        model_args=lambda published: {"img_size": _side(published), "patch_size": _patch(published), "depth": 2},
    ),
}

SAM_SIZES = {"without": ("intermediate_size",), "mlp_dim": 96, "window_size": 2, "global_attn_indexes": [1]}
FFN_ROWS = {
    "Hiera": made(
        *("HieraModel", "HieraConfig", _side_64(), FFN, ("queries are pooled",)),
        embed_dim=24,
        image_size=[64, 64],
        patch_stride=[4, 4],
        patch_size=[7, 7],
        patch_padding=[3, 3],
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        masked_unit_size=[8, 8],
        query_stride=[2, 2],
        num_query_pool=3,
    ),
    "TimeSformer": hf("TimesformerModel", inputs=_video, num_frames=4, fuses=FFN, skipped=("in time and in space",)),
    "GroupViT": made(
        *(
            "GroupViTVisionModel",
            "GroupViTVisionConfig",
            _side_64(side=32),
            FFN,
            (CROSS, "mixes tokens", "no operator"),
        ),
        hidden_size=48,
        intermediate_size=96,
        depths=[2, 1, 1],
        num_group_tokens=[4, 2, 0],
        num_output_groups=[4, 2, 0],
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
    ),
    "MGP-STR": hf("MgpstrModel", image_size=_pairs, fuses=FFN, skipped=("attention maps",), **MLP_RATIO),
    "SAM-HQ": hf(
        *("SamHQVisionModel", "SamHQVisionConfig"), **SAM_SIZES, output_channels=16, fuses=FFN, skipped=(RELATIVE,)
    ),
    "Florence-2 (DaViT)": made(
        "florence2.modeling_florence2.Florence2VisionBackbone",
        *("Florence2VisionConfig", _side_64(), FFN, ("between channels", "windows are cut")),
        embed_dim=[16, 32],
        depths=[1, 1],
        num_heads=[2, 4],
        num_groups=[2, 4],
        patch_size=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[3, 1],
        patch_prenorm=[False, True],
        window_size=4,
        mlp_ratio=2.0,
    ),
    "Swin2SR": made(
        *("Swin2SRModel", "Swin2SRConfig", _side_64(side=32), FFN, ("cosine",)),
        **{"image_size": 32, "patch_size": 1, "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4},
    ),
    "PVT": made(*("PvtModel", "PvtConfig", _side_64(), FFN, (REDUCED,)), image_size=64, **STAGES),
    "FocalNet": made(
        *("FocalNetModel", "FocalNetConfig", _side_64(), FFN, ("focal modulation",)),
        **{
            "image_size": 64,
            "embed_dim": 16,
            "depths": [1, 1, 2, 1],
            "focal_levels": [2] * 4,
            "focal_windows": [3] * 4,
        },
    ),
    "ConvNeXt": made(
        *("ConvNextModel", "ConvNextConfig", _side_64()), hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]
    ),
}

NOTHING_ROWS = {
    "SegFormer": made(*("SegformerModel", "SegformerConfig", _side_64(), NOTHING, (REDUCED, CONVOLUTION)), **STAGES),
    "PVTv2": made(*("PvtV2Model", "PvtV2Config", _side_64(), NOTHING, (REDUCED, CONVOLUTION)), image_size=64, **STAGES),
}


def _oneformer(published: bool) -> nn.Module:
    from transformers import OneFormerConfig, OneFormerModel, SwinConfig

    dim = 96 if published else 24
    stages = {"depths": [1, 2, 1, 1], "num_heads": [2, 2, 2, 2], "out_features": [f"stage{i}" for i in (1, 2, 3, 4)]}
    swin = SwinConfig(image_size=64, embed_dim=dim, window_size=4, **stages)
    widths = dict.fromkeys(
        ("hidden_dim", "conv_dim", "mask_dim", "encoder_feedforward_dim", "dim_feedforward", "text_encoder_width"), 32
    )
    rest = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 4, "task_seq_len": 7}
    text = {"text_encoder_num_layers": 1, "text_encoder_vocab_size": 99, "text_encoder_n_ctx": 2, "max_seq_len": 7}
    return OneFormerModel(
        OneFormerConfig(backbone_config=swin, **widths, **rest, **text, query_dec_layers=1, is_training=False)
    ).eval()


WHOLE_ROWS["OneFormer (Swin backbone)"] = Row(
    "transformers", _oneformer, lambda _: ((seeded(1, 3, 64, 64), torch.arange(3, 10)[None]), {})
)
ROWS: dict[str, Row] = {**TRANSFORMERS, **WHOLE_ROWS, **TOWERS, **FFN_ROWS, **NOTHING_ROWS, **OTHERS}
