"""What an error behind a block costs at the end of the model: one quadratic form per block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from .blocks import Site

IMAGES = 96  # at most, that are gone through
CHUNK = 16  # images whose activations are in memory at once
FLOOR = 0.05  # of the mean eigenvalue, added to all: no error is free


def metric_roots(model: nn.Module, sites: list[Site], images: Tensor, shown: Progress) -> dict[str, Tensor]:
    """Symmetric roots R [C, C] of every block's metric, float64: an error δ behind the block costs ``|δ R|²``.

    A small δ changes the final features, each token of them scaled to length 1, by J δ. Its expected cost is ``δᵀ M δ``
    with ``M = E[Jᵀ v vᵀ J]``, v standard normal: one backward pass measures it for all blocks at once. M is scaled to a
    mean eigenvalue of 1 after :data:`FLOOR`.

    Args:
        model: unchanged so far. sites: its blocks in the order of the calls. images: [B, 3, H, W].
        shown: gets a task for it.

    Returns:
        By the site's name.

    Raises:
        ValueError: the gradients of a block are zero or not finite.
    """
    metrics = {site.name: torch.zeros(site.ffn.dim, site.ffn.dim, dtype=torch.float64) for site in sites}
    for first in shown.track(range(0, len(images), CHUNK), description="weighing errors"):
        for site, gradient in zip(sites, _gradients(model, sites, images[first : first + CHUNK], first), strict=True):
            rows = gradient.flatten(0, -2)
            metrics[site.name] += (rows.T @ rows).double().cpu()
    return {name: _root(metric, name).to(images.device) for name, metric in metrics.items()}


@torch.enable_grad()
def _gradients(model: nn.Module, sites: list[Site], images: Tensor, first: int) -> list[Tensor]:
    """Jᵀ v of every block's output, float32; v belongs to the image, whose number is ``first`` and up."""
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        outputs.append(output if output.requires_grad else output.detach().requires_grad_())
        return outputs[-1]

    handles = [site.block.register_forward_hook(record) for site in sites]
    try:
        directions = F.normalize(features(model, images), dim=-1)
    finally:
        for handle in handles:
            handle.remove()
    shape, generator = directions.shape[1:], torch.Generator()
    v = torch.stack([torch.randn(shape, generator=generator.manual_seed(first + i)) for i in range(len(images))])
    gradients = torch.autograd.grad((directions * v.to(directions)).sum(), outputs, materialize_grads=True)
    return [gradient.float() for gradient in gradients]


def _root(metric: Tensor, name: str) -> Tensor:
    scale = metric.trace() / len(metric)
    if not (scale.isfinite() and scale > 0):
        raise ValueError(
            f"model: the gradients of its features by {name} have a mean square of {scale:g}, wanted a finite one "
            "above 0; check its weights and the images, and idle float32 or bfloat16 models"
        )
    values, vectors = torch.linalg.eigh(metric / scale)
    values = (values.clamp_min(0) + FLOOR) / (1 + FLOOR)
    return (vectors * values.sqrt()) @ vectors.T


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What is compared at the end of a model: its features in front of the head, where it tells them."""
    forward = getattr(model, "forward_features", model)
    output = forward(images)
    return (output if isinstance(output, Tensor) else output[0]).float()
