"""Other libraries' models, fused by one call: ``pytest bench/bench_foreign_models.py [-k "vit_b16 and batch1"]``.

Published sizes, 12 blocks, random weights. Each row times the fused model beside itself in eager PyTorch (SDPA), beside
timm's model of the same size, fused too, and beside OpenVINO on an ONNX export of the original where both are
installed. Numbers are checked against float64 first.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coverage import randomise
from coverage_models import tensors_of
from torch import Tensor, nn

import repavit_ops
from repavit_ops.benchmarking import runtimes
from repavit_ops.benchmarking.harness import check, interleave

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}


class FirstOutput(nn.Module):
    """The model as a function of images with one tensor as its result, for exporters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return tensors_of(self.model(x))[0]


def _hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        transformers.logging.set_verbosity_error()
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return build


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: nn.Module = pytest.importorskip("timm").create_model(name, num_classes=0)
        return model

    return build


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = pytest.importorskip("torchvision").models
        model = getattr(models, name)()
        return model

    return build


def _open_clip() -> nn.Module:
    pytest.importorskip("open_clip")
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(224, 32, 768, 12, 12, 4.0, output_dim=512)


# model → how it is built, pixels, timm's of the same size
MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, dict[str, Any]]]] = {
    "transformers vit_b16": (_hf("ViTModel", "ViTConfig"), 224, ("vit_base_patch16_224", {})),
    "transformers dinov2_s14": (
        _hf("Dinov2Model", "Dinov2Config", **SMALL, image_size=224, patch_size=14),
        224,
        ("vit_small_patch14_dinov2", {"img_size": 224}),
    ),
    "transformers clip_b32": (
        _hf("CLIPVisionModel", "CLIPVisionConfig"),
        224,
        ("vit_base_patch32_clip_quickgelu_224", {}),
    ),
    "transformers siglip_b16": (
        _hf("SiglipVisionModel", "SiglipVisionConfig", **BASE, image_size=224, patch_size=16),
        224,
        ("vit_base_patch16_siglip_224", {}),
    ),
    "transformers dinov3_s16": (
        _hf("DINOv3ViTModel", "DINOv3ViTConfig", **SMALL, intermediate_size=1536, image_size=224),
        224,
        ("vit_small_patch16_dinov3", {"img_size": 224}),
    ),
    "transformers dinov3_b16": (
        _hf("DINOv3ViTModel", "DINOv3ViTConfig", **BASE, intermediate_size=3072, image_size=224),
        224,
        ("vit_base_patch16_dinov3", {"img_size": 224}),
    ),
    "timm eva02_s14": (
        _timm("eva02_small_patch14_224"),
        224,
        ("eva02_small_patch14_224", {}),
    ),
    "timm eva02_b14": (
        _timm("eva02_base_patch14_224"),
        224,
        ("eva02_base_patch14_224", {}),
    ),
    "transformers swin_t": (_hf("SwinModel", "SwinConfig"), 224, ("swin_tiny_patch4_window7_224", {})),
    "torchvision vit_b16": (_torchvision("vit_b_16"), 224, ("vit_base_patch16_224", {})),
    "torchvision swin_t": (_torchvision("swin_t"), 224, ("swin_tiny_patch4_window7_224", {})),
    "open_clip vit_b32": (_open_clip, 224, ("vit_base_patch32_clip_224", {})),
}


@pytest.fixture(scope="module", autouse=True)
def _stub():
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("stub"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8], ids=lambda batch: f"batch{batch}")
@pytest.mark.parametrize("name", MODELS, ids=[name.replace(" ", "-") for name in MODELS])
@torch.no_grad()
def test_model(benchmark, report, wanted_peers, name, batch, dtype):
    build, side, (timm_name, settings) = MODELS[name]
    torch.manual_seed(0)
    model = FirstOutput(randomise(build())).eval()
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)
    fused = repavit_ops.fuse(model, dtype=dtype)
    cast = model if dtype == torch.float32 else FirstOutput(randomise(build())).eval().to(dtype)
    calls = {"repavit_ops": lambda: fused(x), "eager": lambda: cast(x)}
    if "openvino" in wanted_peers and importlib.util.find_spec("openvino") and importlib.util.find_spec("onnxscript"):
        call = runtimes.openvino(runtimes.onnx_bytes(model, x.float()), x, dtype)
        if call is not None:
            calls["openvino"] = call
    truth = FirstOutput(randomise(build())).eval().double()(x.double())
    plain = calls["eager"]()
    for provider, call in calls.items():
        check(provider, call(), plain, truth, slack=2.0 if provider == "repavit_ops" else 8.0)
    if importlib.util.find_spec("timm"):
        import timm

        same = repavit_ops.fuse(randomise(timm.create_model(timm_name, num_classes=0, **settings)), dtype=dtype)
        calls["timm fused"] = lambda: same(x)
    times = interleave(calls, seconds=3.0, rounds=7)
    benchmark.pedantic(calls["repavit_ops"], rounds=1)
    ours = times["repavit_ops"].p50
    ratios = {provider: t.p50 / ours for provider, t in times.items() if provider != "repavit_ops"}
    report(
        case=f"{name} batch {batch}",
        dtype=str(dtype).removeprefix("torch."),
        ratio=min(ratio for provider, ratio in ratios.items() if provider != "timm fused"),
        ratios=ratios,
        images_per_second={provider: batch / t.p50 for provider, t in times.items()},
        seconds={provider: [t.p20, t.p50, t.p80] for provider, t in times.items()},
    )
    benchmark.extra_info.update(ratios)
