"""Small ViTs that learn from little: of the demo, one size of block, 12 layers or 12 layers' worth of branches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import JoinedVisionTransformer, VisionTransformer
from .digits import IMAGE, PATCH

STEM_CHANNELS = 32


class ConvStem(nn.Module):
    """A 3x3 convolution in front of the patches: with 1,437 images to learn from, it stands in for pretraining.

    Shapes:
        x [B, in_chans, H, W] → [B, dim, H / patch, W / patch]
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, STEM_CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(STEM_CHANNELS)
        self.act = nn.GELU()
        self.proj = nn.Conv2d(STEM_CHANNELS, dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.act(self.norm(self.conv(x))))


class Network(NamedTuple):
    """A model, its short name and what it is made of."""

    name: str
    made_of: str
    model: VisionTransformer


def networks(dim: int, layers: int, branches: int, idle_ratio: float, seed: int) -> list[Network]:
    """The vanilla twin of both methods, RePaViT of as many layers, and the joined ViT of fewer blocks."""
    blocks = layers // branches
    size: dict[str, Any] = {"image": IMAGE, "patch": PATCH, "classes": 10, "dim": dim}
    vanilla = small_vit(VisionTransformer, seed, **size, depth=layers)
    repavit = small_vit(VisionTransformer, seed, **size, depth=layers, idle_ratio=idle_ratio)
    joined = small_vit(JoinedVisionTransformer, seed, **size, depth=blocks, branches=branches)
    return [
        Network("vanilla", f"{layers} layers of {dim} channels", vanilla),
        Network("RePaViT", f"{layers} layers, idle ratio θ = {idle_ratio:g}", repavit),
        Network("joined", f"{blocks} blocks of {branches} branches", joined),
    ]


def small_vit(
    family: Any, seed: int, *, image: int, patch: int, classes: int, dim: int, **config: Any
) -> VisionTransformer:
    """A ViT of 4 heads for grey images of ``image`` pixels a side, initialised for a short training."""
    torch.manual_seed(seed)
    model: VisionTransformer = family(
        img_size=image,
        patch_size=patch,
        in_chans=1,
        num_classes=classes,
        embed_dim=dim,
        num_heads=4,
        pre_norm=False,
        global_pool="avg",
        embed_layer=ConvStem,
        **config,
    )
    _init_for_short_training(model, image // patch)
    return model


@torch.no_grad()
def _init_for_short_training(model: VisionTransformer, side: int) -> None:
    """Start where a few hundred steps suffice: matrices at unit gain (the usual 0.02 is for 300 epochs), 2-D waves."""
    for linear in (module for module in model.blocks.modules() if isinstance(module, nn.Linear)):
        nn.init.xavier_uniform_(linear.weight)
    model.pos_embed[:, 1:] = sine_positions(side, model.embed_dim)


def sine_positions(side: int, dim: int) -> Tensor:
    """Sines and cosines of row and column at dim / 4 frequencies: [side², dim], one row per patch."""
    place = torch.arange(float(side))
    rows, columns = (grid.flatten()[:, None] for grid in torch.meshgrid(place, place, indexing="ij"))
    frequencies = math.pi / 2 / 2 ** torch.linspace(0, 4, dim // 4)
    waves = [wave(axis * frequencies) for axis in (rows, columns) for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1)
