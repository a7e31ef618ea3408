"""The models of the papers by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .features import FeatureExtractor
from .joined import JoinedVisionTransformer
from .lvvit import LVViT
from .swin import SwinTransformer
from .vit import VisionTransformer


@dataclass(frozen=True)
class ModelSpec:
    """One model: its class, the arguments of its constructor, and which channels idle by default."""

    family: Callable[..., nn.Module]
    config: dict[str, Any]
    idle: dict[str, Any] | None = None  # idle_ratio or act_channels; None where the model must not have idle channels


def _vit(embed_dim: int, depth: int, num_heads: int, **config: Any) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, **config}


def _swin(embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...]) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads}


_PLAIN = {"pre_norm": False, "norm_eps": 1e-6, "block_norm_eps": 1e-6}  # ViT as first published
_DINO = {**_PLAIN, "num_classes": 0}
_CLIP = {"norm_eps": 1e-5, "num_classes": 512, "head_bias": False}  # the head is the projection to the joint space

# name without its prefix → class, config, default idle channels of the repa_ model
_REPA: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], dict[str, Any]]] = {
    "deit_tiny": (VisionTransformer, _vit(192, 12, 3), {"idle_ratio": 0.75}),
    "deit_small": (VisionTransformer, _vit(384, 12, 6), {"idle_ratio": 0.75}),
    "deit_base": (VisionTransformer, _vit(768, 12, 12), {"idle_ratio": 0.75}),
    "vit_large": (VisionTransformer, _vit(1024, 24, 16), {"idle_ratio": 0.75}),
    "vit_huge": (VisionTransformer, _vit(1280, 32, 16), {"idle_ratio": 0.75}),
    "swin_tiny": (SwinTransformer, _swin(96, (2, 2, 6, 2), (3, 6, 12, 24)), {"idle_ratio": 0.75}),
    "swin_small": (SwinTransformer, _swin(96, (2, 2, 18, 2), (3, 6, 12, 24)), {"idle_ratio": 0.75}),
    "swin_base": (SwinTransformer, _swin(128, (2, 2, 18, 2), (4, 8, 16, 32)), {"idle_ratio": 0.75}),
    # the paper's "0.75" of LV-ViT is m = C at ρ = 3, θ = 2/3, which as a float ratio would round up to m = C + 1
    "lvvit_s": (LVViT, _vit(384, 16, 6), {"act_channels": 384}),
    "lvvit_m": (LVViT, _vit(512, 20, 8), {"act_channels": 512}),
    "clip_vit_b32": (VisionTransformer, _vit(768, 12, 12, patch_size=32, **_CLIP), {"idle_ratio": 0.75}),
    "clip_vit_b16": (VisionTransformer, _vit(768, 12, 12, patch_size=16, **_CLIP), {"idle_ratio": 0.75}),
    "dino_vit_s": (VisionTransformer, _vit(384, 12, 6, **_DINO), {"idle_ratio": 0.75}),
    "dino_vit_b": (VisionTransformer, _vit(768, 12, 12, **_DINO), {"idle_ratio": 0.75}),
}

MODELS: dict[str, ModelSpec] = {
    **{f"repa_{name}": ModelSpec(*spec) for name, spec in _REPA.items()},
    **{f"vanilla_{name}": ModelSpec(family, config) for name, (family, config, _) in _REPA.items()},
    "vanilla_vit_tiny": ModelSpec(VisionTransformer, _vit(192, 12, 3, **_PLAIN)),
    **{
        f"joined_vit_tiny_{depth}": ModelSpec(
            JoinedVisionTransformer, _vit(192, depth, 3, branches=12 // depth, **_PLAIN), {}
        )
        for depth in (6, 4, 3)
    },
}


def create_model(
    name: str,
    *,
    idle_ratio: float | Sequence[float] | None = None,
    act_channels: int | Sequence[int] | None = None,
    img_size: int | tuple[int, int] = 224,
    num_classes: int | None = None,
    pretrained: bool = False,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    output_fmt: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a model by name, freshly initialised.

    ``repa_*`` are the papers' models with idle channels, ``vanilla_*`` their twins without, ``joined_vit_tiny_L`` the
    12-block ViT-Tiny as L blocks of 12 / L branches.

    Args:
        name: one of :func:`list_models`.
        idle_ratio: θ of all blocks or of each; or
        act_channels: m of all blocks or of each. Default for ``repa_*``: θ = 0.75, and m = C (θ = 2/3) for LV-ViT;
            none for ``joined_*``.
        img_size: pixels, one number or (height, width).
        num_classes: outputs of the head, 0 for none; default 1000, CLIP's 512-wide projection, none for DINO.
        pretrained: no weights are published for these names, so True is refused with a sentence.
        features_only: build a :class:`repavit_ops.models.FeatureExtractor` of maps, as timm does; its
        out_indices, output_fmt: which blocks or stages, and the layout of the maps.
        overrides: other arguments of the model's class, e.g. ``form="deployed"``, ``drop_path_rate=0.1``.

    Raises:
        ValueError: an unknown name (with close matches), idle channels for a model that has none, indices or a format
            without features_only, or what the model's class raises.
        RuntimeError: pretrained is True.
    """
    spec = find_model(name)
    if pretrained:
        raise RuntimeError(
            f"{name}: pretrained=True, but no weights are published under this name; load a checkpoint of your own "
            "with repavit_ops.load_checkpoint(path), or a pretrained DINOv2 with repavit_ops.models.load_dinov2_small()"
        )
    if not features_only and (out_indices is not None or output_fmt is not None):
        raise ValueError("out_indices, output_fmt: they say which features are taken; add features_only=True")
    given = {"idle_ratio": idle_ratio, "act_channels": act_channels}
    given = {key: value for key, value in given.items() if value is not None}
    if given and spec.idle is None:
        hint = (
            f"; use repa_{name.removeprefix('vanilla_')}" if f"repa_{name.removeprefix('vanilla_')}" in MODELS else ""
        )
        raise ValueError(f"{', '.join(given)}: {name} has no idle channels{hint}")
    config = {**spec.config, **(given or spec.idle or {}), "img_size": img_size, **overrides}
    if num_classes is not None:
        config["num_classes"] = num_classes
    model: Any = spec.family(**config)
    return FeatureExtractor(model, out_indices, output_fmt=output_fmt) if features_only else model


def list_models() -> list[str]:
    """Names that :func:`create_model` knows."""
    return list(MODELS)


def find_model(name: str) -> ModelSpec:
    """The specification of a model; ValueError with close matches for an unknown name."""
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5)
    raise ValueError(
        f"name: got {name!r}, wanted one of list_models()" + (f"; close: {', '.join(close)}" if close else "")
    )
