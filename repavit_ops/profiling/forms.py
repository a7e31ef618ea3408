"""A model in the forms that it is compared in: vanilla, deployed, fused."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..fusing import TRAINING_FORMS, fuse, reparameterize
from .profile import Profile, profile


def profile_forms(
    model: nn.Module, images: Tensor, *, vanilla: nn.Module | None = None, seconds: float = 2.0
) -> dict[str, Profile]:
    """:func:`profile` of a model in plain PyTorch and fused, as RePaViT's Figure 3 has it.

    Args:
        model: training form, deployed or vanilla, in evaluation mode, on a CPU; not changed.
        images: one batch, in the dtype to profile; every form is cast to it.
        vanilla: the model's twin without a method, to compare with.
        seconds: for each form, about.

    Returns:
        "vanilla", "deployed" and "fused", in that order. A model without a training form is itself the first of the
        two and "deployed" is left out.

    Raises:
        RuntimeError, ValueError: as :func:`profile`, and as the verbs do.
    """
    forms: dict[str, nn.Module] = {}
    trained = any(isinstance(module, TRAINING_FORMS) for module in model.modules())
    if vanilla is not None:
        forms["vanilla"] = copy.deepcopy(vanilla).to(images.dtype)
    if trained or vanilla is not None:
        forms["deployed"] = reparameterize(model).to(images.dtype)
    else:
        forms["vanilla"] = copy.deepcopy(model).to(images.dtype)
    forms["fused"] = fuse(model, dtype=None if images.dtype == torch.float64 else images.dtype)
    return {name: profile(form, images, seconds) for name, form in forms.items()}
