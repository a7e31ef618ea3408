"""What is compared: depth, idle ratio, and training in full or in the deployed shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import photographs
from torch import nn

from repavit_ops.demo import Recipe, digits
from repavit_ops.demo.networks import small_vit
from repavit_ops.demo.training import ImageSet
from repavit_ops.models import JoinedVisionTransformer, VisionTransformer
from repavit_ops.models.feed_forward import Form
from repavit_ops.nn import Attention, Block, DeployedShapeFFN

DIM, LAYERS = 32, 12
THETA = 0.75  # idle ratio of the ablation


@dataclass(frozen=True)
class Task:
    """A set of images, how large they are, and how long every model trains on it."""

    load: Callable[[int], ImageSet]
    image: int
    patch: int
    classes: int
    recipe: Recipe


TASKS = {
    "digits": Task(digits.load_digits, digits.IMAGE, digits.PATCH, 10, Recipe(epochs=20)),
    "photographs": Task(
        photographs.load_photographs,
        photographs.IMAGE,
        photographs.PATCH,
        len(photographs.NAMES),
        Recipe(epochs=20),
    ),
}


def deployed_shape_block(
    dim: int,
    num_heads: int,
    hidden: int,
    act_channels: int,
    form: Form,
    *,
    qkv_bias: bool,
    norm_eps: float,
    batchnorm: bool,
    **branch: Any,
) -> nn.Module:
    """A ViT block whose FFN has its deployed shape from the first step."""
    return Block(
        Attention(dim, num_heads, qkv_bias=qkv_bias, norm=partial(nn.LayerNorm, eps=norm_eps), **branch),
        DeployedShapeFFN(dim, act_channels, batchnorm=batchnorm, **branch),
    )


def _vanilla(depth: int) -> dict[str, Any]:
    return {"family": VisionTransformer, "depth": depth}


def _joined(depth: int) -> dict[str, Any]:
    return {"family": JoinedVisionTransformer, "depth": depth, "branches": LAYERS // depth}


def _idle(ratio: float, **more: Any) -> dict[str, Any]:
    return {**_vanilla(LAYERS), "idle_ratio": ratio, **more}


# name → what to build
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vanilla 12": _vanilla(12),
    **{f"joined {depth}": _joined(depth) for depth in (6, 4, 3)},
    **{f"vanilla {depth}": _vanilla(depth) for depth in (6, 4, 3)},
    **{f"θ {ratio:.2f}": _idle(ratio) for ratio in (0.0, 0.25, 0.5, 0.75, 1.0)},
    **{
        f"deployed shape, {'one BatchNorm' if batchnorm else 'no norm'}": _idle(
            THETA, block=partial(deployed_shape_block, batchnorm=batchnorm)
        )
        for batchnorm in (True, False)
    },
}


def build(name: str, task: Task, seed: int) -> VisionTransformer:
    """The model of a configuration, freshly initialised."""
    return small_vit(
        seed=seed, image=task.image, patch=task.patch, classes=task.classes, dim=DIM, **CONFIGURATIONS[name]
    )
