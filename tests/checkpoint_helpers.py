"""Small random models of every kind for the checkpoint tests, and the authors' state dicts of them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from repavit_ops.checkpoints import save_checkpoint
from repavit_ops.models import SwinTransformer, VisionTransformer, linear_idle_ratios
from repavit_ops.nn import ChannelIdleFFN

VIT = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 48, "depth": 3, "num_heads": 3}
SWIN = {
    "img_size": 64,
    "num_classes": 5,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}
MODELS = {
    "vit": lambda: VisionTransformer(**VIT, idle_ratio=0.75),
    "vit_per_block": lambda: VisionTransformer(**VIT, idle_ratio=[1.0, 2 / 3, 0.0]),
    "vit_all_idle": lambda: VisionTransformer(**VIT, idle_ratio=1.0),
    "vit_none_idle": lambda: VisionTransformer(**VIT, idle_ratio=0.0),
    "vit_linear": lambda: VisionTransformer(**VIT | {"depth": 4}, idle_ratio=linear_idle_ratios(0.75, 4)),
    "vit_head80": lambda: VisionTransformer(**VIT | {"embed_dim": 160, "num_heads": 2, "depth": 1}, act_channels=129),
    "vit_plain_oblong": lambda: VisionTransformer(
        **VIT | {"img_size": (32, 48), "num_classes": 0}, idle_ratio=0.5, pre_norm=False, qkv_bias=False, norm_eps=1e-5
    ),
    "vit_odd_ratio": lambda: VisionTransformer(**VIT | {"embed_dim": 45}, mlp_ratio=3.5, idle_ratio=0.6),
    "swin": lambda: SwinTransformer(**SWIN, idle_ratio=0.75),
    "swin_window7": lambda: SwinTransformer(**SWIN | {"img_size": 56, "window_size": 7}, idle_ratio=2 / 3),
    "swin_per_block": lambda: SwinTransformer(**SWIN, idle_ratio=[1.0, 0.5, 0.0, 0.75]),
    "swin_small_maps": lambda: SwinTransformer(**SWIN | {"img_size": 16}, idle_ratio=0.75),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, affines and BatchNorm statistics, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("num_batches_tracked", "alpha")):
                continue
            draw = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(0.5 + draw.abs())
            elif value.dim() >= 2:
                value.copy_(draw * value[0].numel() ** -0.5)
            else:
                value.copy_(("norm" in name and name.endswith("weight")) + 0.3 * draw)
    return model.eval()


def merged(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, ChannelIdleFFN):
            model.set_submodule(name, module.fuse())
    return model.eval()


def make(name: str, form: str) -> nn.Module:
    model = randomised(MODELS[name]())
    return merged(model) if form == "deployed" else model


def image_of(name: str) -> dict:
    """What save_checkpoint needs to know beyond the model for the authors' layout."""
    sizes = {"swin": 64, "swin_window7": 56, "swin_per_block": 64, "swin_small_maps": 16}
    return {"img_size": sizes[name]} if name in sizes else {}


def images(model: nn.Module, side: int = 32) -> torch.Tensor:
    if isinstance(model, VisionTransformer):
        size = tuple(n * model.patch_size for n in model.grid_size)
    else:
        size = (64, 64)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_function(got: nn.Module, wanted: nn.Module, tolerance: float = 0.0) -> None:
    x = images(wanted)
    assert not got.training
    difference = (got(x) - wanted(x)).abs().max().item()
    assert difference <= tolerance, difference


def authors_state(model: nn.Module, tmp_path: Path, **options) -> dict[str, torch.Tensor]:
    save_checkpoint(model, tmp_path / "theirs.safetensors", "authors", **options)
    return load_file(tmp_path / "theirs.safetensors")
