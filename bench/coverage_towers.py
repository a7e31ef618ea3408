"""Rows of the coverage table whose queries and keys turn or are normed: towers of language models, video, segmentation.

Towers of Qwen-VL's kind hold images of many sizes in one sequence. The rows have three images or videos of different
sizes, of which none fills its windows.
"""

from __future__ import annotations

from typing import Any

import torch
from coverage_models import FFN, WHOLE, Inputs, Row, _images, _patch, _side, hf, made, seeded

GRIDS = torch.tensor([[1, 4, 6], [2, 4, 4], [1, 6, 6]])  # frames, rows and columns of patches
STILLS = torch.tensor([[1, 4, 6], [1, 4, 4], [1, 6, 6]])  # GLM-4V's tower takes each frame as an image
ONE = torch.tensor([[1, 4, 4]])


def _wide(width: int, small: int = 64) -> Any:
    """A width of the published model, and of a small one."""
    return lambda published: width if published else small


def _patches(channels: int, grids: torch.Tensor = GRIDS) -> Inputs:
    return lambda _: ((seeded(int(grids.prod(-1).sum()), channels), grids), {})


def _maps(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    grids = STILLS * torch.tensor([2, 1, 1])  # videos of as many frames each
    return (seeded(int(grids.prod(-1).sum()), 3, 14, 14), grids), {}


def _tower(model: str, config: str, inputs: Inputs, fuses: str = WHOLE, skipped: tuple[str, ...] = (), **settings: Any):
    """A tower by the module that it stands in, its blocks as wide as published."""
    module = model.partition(".")[0]
    path = f"{module}.modeling_{model}", f"{module}.configuration_{module}.{config}"
    sizes = {"depth": 2, "hidden_size": _wide(1024), "intermediate_size": _wide(4096, 128)}
    given = {**sizes, "num_heads": _wide(16, 4), "out_hidden_size": 64, **settings}
    return made(*path, inputs, fuses, skipped, **{k: v for k, v in given.items() if v is not None})


QWEN2 = "qwen2_vl.Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig"
QWEN2_5 = "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig"
QWEN2_SIZES = {"embed_dim": _wide(1280), "hidden_size": 64, "intermediate_size": None, "out_hidden_size": None}
QWEN2_5_SIZES = {"hidden_size": _wide(1280), "intermediate_size": _wide(3420, 128), "fullatt_block_indexes": [1]}
WIDE_1152 = {"hidden_size": _wide(1152, 96), "intermediate_size": _wide(4304, 128)}
QWEN3_SIZES = {**WIDE_1152, "num_position_embeddings": 16}
DEEPSTACK = {**QWEN3_SIZES, "deepstack_visual_indexes": [0]}
OF_LAYERS = {"depth": None, "num_heads": None, "out_hidden_size": None}  # whose settings have other names
LAYERS = {**OF_LAYERS, **WIDE_1152, "num_hidden_layers": 2, "num_attention_heads": _wide(16, 4)}

PACKED_ROWS = {
    "Qwen2-VL, one image": _tower(*QWEN2, _patches(3 * 2 * 14**2, ONE), **QWEN2_SIZES),
    "Qwen2-VL": _tower(*QWEN2, _patches(3 * 2 * 14**2), **QWEN2_SIZES),
    "Qwen2.5-VL, one image": _tower(*QWEN2_5, _patches(3 * 2 * 14**2, ONE), **QWEN2_5_SIZES),
    "Qwen2.5-VL": _tower(*QWEN2_5, _patches(3 * 2 * 14**2), **QWEN2_5_SIZES, window_size=56),
    "Qwen2.5-Omni vision": _tower(
        *("qwen2_5_omni.Qwen2_5OmniVisionEncoder", "Qwen2_5OmniVisionEncoderConfig", _patches(3 * 2 * 14**2)),
        **{**QWEN2_5_SIZES, "window_size": 56},
    ),
    "Qwen3-VL": _tower("qwen3_vl.Qwen3VLVisionModel", "Qwen3VLVisionConfig", _patches(3 * 2 * 16**2), **DEEPSTACK),
    "Qwen3.5": _tower("qwen3_5.Qwen3_5VisionModel", "Qwen3_5VisionConfig", _patches(3 * 2 * 16**2), **QWEN3_SIZES),
    "GLM-4V": _tower(
        *("glm4v.Glm4vVisionModel", "Glm4vVisionConfig", _patches(3 * 2 * 14**2, STILLS)),
        **{"hidden_size": _wide(1536), "num_heads": _wide(12, 4), "image_size": 84},
    ),
    "GLM-OCR": _tower("glm_ocr.GlmOcrVisionModel", "GlmOcrVisionConfig", _patches(3 * 2 * 14**2)),
    "ERNIE 4.5-VL": _tower(
        *("ernie4_5_vl_moe.Ernie4_5_VLMoeVisionTransformerPretrainedModel", "Ernie4_5_VLMoeVisionConfig"),
        _patches(3 * 14**2),
        **{"hidden_size": _wide(1280), "out_hidden_size": None},
    ),
    "Kimi K2.5": _tower("kimi_k25.Kimi_K25VisionModel", "Kimi_K25VisionConfig", _maps, **LAYERS),
    "PaddleOCR-VL": _tower(
        *("paddleocr_vl.PaddleOCRVisionModel", "PaddleOCRVisionConfig"),
        lambda _: ((seeded(1, 92, 3, 14, 14), GRIDS), {}),
        **{**LAYERS, "image_size": 84, "patch_size": 14},
    ),
    "VideoLLaMA 3": _tower(
        *("video_llama_3.VideoLlama3VisionModel", "VideoLlama3VisionConfig"),
        lambda _: ((seeded(92, 3 * 14**2), GRIDS, torch.tensor([1, 2, 2])), {}),
        **{**LAYERS, "patch_size": 14},
    ),
}


def _two_images(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    side, patch = _side(published), _patch(published)
    return (seeded(2, 3, side, side),), {"image_sizes": torch.tensor([[side, side - patch], [side - patch, side]])}


def _padded(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    grid = _side(published) // _patch(published)
    mask = torch.ones(2, grid, grid, dtype=torch.bool)
    mask[1, :, grid // 2 :] = False
    return _images(published)[0], {"patch_attention_mask": mask}


def _video(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (seeded(2, 4, 3, _side(published), _side(published)),), {}


def _masked_video(published: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    places = torch.randperm(
        2 * (_side(published) // _patch(published)) ** 2, generator=torch.Generator().manual_seed(0)
    )
    context, target = torch.stack((places[:9], places[3:12])), torch.stack((places[9:14], places[12:17]))
    return _video(published)[0], {"context_mask": [context], "target_mask": [target]}


VJEPA2 = {
    "without": ("intermediate_size", "image_size"),
    "mlp_ratio": 2,
    "crop_size": _side,
    "frames_per_clip": 4,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 3,
    "pred_num_hidden_layers": 2,
    "pred_num_mask_tokens": 2,
    "pred_mlp_ratio": 2,
}
SAM3 = {"num_attention_heads": 4, "patch_size": 14, "window_size": 2, "global_attn_indexes": [1]}
SAM3 |= {"pretrain_image_size": 28}


def _sides(side: int) -> Inputs:
    return lambda _: ((seeded(2, 3, side, side),), {})


TURNED_ROWS = {
    "V-JEPA 2": hf("VJEPA2Model", inputs=_video, **VJEPA2),
    "V-JEPA 2, masked": hf("VJEPA2Model", inputs=_masked_video, **VJEPA2),
    "InternVL, QK-norm": hf(
        *("InternVLVisionModel", "InternVLVisionConfig"),
        image_size=lambda published: [_side(published)] * 2,
        patch_size=lambda published: [_patch(published)] * 2,
        use_qk_norm=True,
        fuses=FFN,
        skipped=("over the channels of all heads together",),
    ),
    "Sapiens2, heads that share keys": hf(
        *("Sapiens2Model", "Sapiens2Config"),
        num_attention_heads=4,
        num_key_value_heads_per_layer=[2, 4],
    ),
    "MLCD": hf("MLCDVisionModel", "MLCDVisionConfig", num_attention_heads=4),
    "Llama 4 vision": hf(
        *("Llama4VisionModel", "Llama4VisionConfig"),
        without=("num_channels",),
        intermediate_size=lambda published: 4 * (768 if published else 48),
        vision_output_dim=48,
        projector_input_dim=48,
        projector_output_dim=48,
        fuses=FFN,
        skipped=("gives another width",),
    ),
    "Pixtral": hf("PixtralVisionModel", "PixtralVisionConfig", num_attention_heads=4),
    "Pixtral, two sizes": hf("PixtralVisionModel", "PixtralVisionConfig", inputs=_two_images, num_attention_heads=4),
    "Phi-4 vision": hf("Phi4MultimodalVisionModel", "Phi4MultimodalVisionConfig", crop_size=_side),
    "Phi-4 vision, padded": hf(
        "Phi4MultimodalVisionModel", "Phi4MultimodalVisionConfig", inputs=_padded, crop_size=_side
    ),
    "SAM 3": hf("Sam3ViTModel", "Sam3ViTConfig", inputs=_sides(56), image_size=56, **SAM3),
    "SAM 3, padded windows": hf("Sam3ViTModel", "Sam3ViTConfig", inputs=_sides(70), image_size=70, **SAM3),
}
TOWERS: dict[str, Row] = {**TURNED_ROWS, **PACKED_ROWS}
