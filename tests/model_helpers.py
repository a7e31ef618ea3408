"""Small models with every weight and statistic randomised, as after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repavit_ops.models import SwinTransformer, VisionTransformer

# timm imports torchvision, whose wheels for other torch builds lack the operators that this module describes
TORCHVISION_STUB = "torchvision._meta_registrations"


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill weights, affines, biases and BatchNorm statistics with seeded numbers; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        scale = max(p.shape[-1], 1) ** -0.5 if p.dim() > 1 else 0.3
        p.normal_(0, scale, generator=generator)
        if p.dim() == 1 and "norm" in name and name.endswith("weight"):
            p.add_(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
    return model.eval()


def tiny_vit(seed: int = 0, **overrides) -> nn.Module:
    """ViT of 2 blocks, C = 48, 17 tokens, θ = 0.75 unless overridden."""
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    config.update({"idle_ratio": 0.75} if "act_channels" not in overrides else {}, **overrides)
    return randomise(VisionTransformer(**config), seed)


def tiny_swin(seed: int = 0, **overrides) -> nn.Module:
    """Swin of 2 stages of 2 blocks, C = 24, window 4, θ = 0.75 unless overridden."""
    config = {
        "img_size": 64,
        "embed_dim": 24,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "num_classes": 10,
        "idle_ratio": 0.75,
    }
    return randomise(SwinTransformer(**{**config, **overrides}), seed)


def images(batch: int = 2, height: int = 32, width: int | None = None, seed: int = 1) -> torch.Tensor:
    """Seeded images ~ N(0, 1), float32 [B, 3, H, W]."""
    return torch.randn(batch, 3, height, width or height, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


class Recorder(TorchDispatchMode):
    """Every operator that is called, as namespace::name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def in_threads(call: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], times: int) -> list[Tensor]:
    """The last of ``times`` results for every input, each from a Python thread of its own."""

    def work(x: Tensor) -> Tensor:
        with torch.no_grad():
            return [call(x) for _ in range(times)][-1]

    with ThreadPoolExecutor(len(inputs)) as pool:
        return list(pool.map(work, inputs))
