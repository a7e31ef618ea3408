"""Pretrained models, calibration images and solved FFNs for the tests of idling."""

from __future__ import annotations

import torch
from model_helpers import images, randomise, tiny_swin, tiny_vit

import repavit_ops
from repavit_ops.idling.solving import empty_split
from repavit_ops.idling.streams import Tokens
from repavit_ops.nn import PartialGELUFFN

VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5, "img_size": 56}
VANILLA = {"idle_ratio": None, "act_channels": None}
TIMM = {
    "vit_base_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "vit_small_patch14_dinov2": VIT,
    "vit_base_patch16_clip_224": VIT,
    "vit_base_patch16_clip_quickgelu_224": VIT,
    "vit_base_patch16_siglip_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
}
OURS = {"vit": lambda: tiny_vit(**VANILLA), "swin": lambda: tiny_swin(**VANILLA)}


def batches(count=5, size=32, of=8):
    return [images(of, size, seed=seed) for seed in range(count)]


def idle(model, idle_ratio=0.5, size=32, steps=0, **options):
    return repavit_ops.idle_pretrained(model, batches(size=size), idle_ratio, steps=steps, progress=False, **options)


def ffns(model):
    return [module for module in model.modules() if isinstance(module, PartialGELUFFN)]


def vanilla_ffn(dim=12, hidden=40, seed=0):
    ffn = PartialGELUFFN(dim, hidden, merged=False, norm_eps=1e-6, residual=True, backend="reference")
    return randomise(ffn, seed)


@torch.no_grad()
def fitted(ffn, tokens=600, seed=3, noise=0.1, root=None):
    generator = torch.Generator().manual_seed(seed)
    x, error = torch.randn(2, 8, tokens // 8, ffn.dim, generator=generator).to(ffn.w_in)
    after = ffn(x) + noise * error
    split = empty_split(ffn, torch.eye(ffn.dim) if root is None else root)
    split.update(ffn, Tokens(x, after, torch.arange(8) % 4 == 3))
    return x, after, split
