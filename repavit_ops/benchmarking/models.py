"""Whole models: ours, eager PyTorch and every peer on the same weights and images."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..fusing import fuse, reparameterize
from ..models import complexity, create_model
from ..models.patch_embed import image_of
from ..nn import set_join
from .measuring import OURS, OWN_SLACK, Call, Case, Provider
from .peers import Subject, find_peers

FAMILIES = ("deit_tiny", "deit_small", "deit_base", "vit_large", "swin_tiny", "lvvit_s", "clip_vit_b32")
MODELS = tuple(f"{kind}_{family}" for family in FAMILIES for kind in ("repa", "vanilla"))
QUICK = ("repa_deit_tiny", "repa_deit_small", "repa_swin_tiny")
CHECKED = 2  # images of a batch whose float64 truth is worth its time


def seeded_model(name: str, **options: object) -> nn.Module:
    """A model by name in evaluation mode, with biases and statistics as after training; joined branches at α = 1."""
    torch.manual_seed(0)
    model = as_trained(create_model(name, **options))  # type: ignore[arg-type]
    if name.startswith("joined"):
        set_join(model, 1.0)
    return model


@torch.no_grad()
def as_trained(model: nn.Module) -> nn.Module:
    """The fresh model in evaluation mode, with biases and BatchNorm statistics as after training."""
    for key, p in model.named_parameters():
        if key.endswith("bias"):
            p.normal_(0, 0.1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


def images_for(model: nn.Module, batch: int, dtype: torch.dtype) -> Tensor:
    """Seeded images of the size that the model was built for."""
    (height, width), channels = image_of(model)
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def float64_of(model: nn.Module, x: Tensor) -> Tensor:
    """What the model gives for the first images in float64."""
    return copy.deepcopy(model).double()(x[:CHECKED].double())


def model_case(
    name: str, batch: int, dtype: torch.dtype, peers: Sequence[str] | None = None, quick: bool = False
) -> Case:
    """A model of the registry, merged, beside eager PyTorch and the peers that are here.

    Raises:
        ValueError: an unknown model or peer.
    """
    usable, missing = find_peers(peers, dtype, quick)
    model = reparameterize(seeded_model(name), inplace=True)
    x = images_for(model, batch, dtype)
    subject = Subject(model, x)

    def ours() -> Call:
        fused = fuse(model, dtype=dtype)
        return lambda: fused(x)

    providers = {
        "eager": Provider(lambda: functools.partial(subject.cast, x)),
        OURS: Provider(ours, own=True, slack=OWN_SLACK),
    }
    for peer in usable:
        providers[peer.name] = Provider(functools.partial(peer.call, subject))
    macs = complexity(model, x.shape[-2:], in_chans=x.shape[1]).macs  # type: ignore[arg-type]
    truths = {"": lambda: float64_of(model, x)}
    return Case(f"{name} batch {batch}", dtype, batch, providers, truths, flop=2 * macs * batch, left_out=missing)
