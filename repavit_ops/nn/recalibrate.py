"""Fresh BatchNorm statistics for a trained model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .given import unwrapped


@torch.no_grad()
def recalibrate_bn(model: nn.Module, loader: Iterable[Any]) -> int:
    """Measure every BatchNorm's running mean and variance anew, over all of ``loader``; returns how many there are.

    Running averages lag behind the weights, and DropPath or Dropout shifts them: after such training, recalibrate on
    clean training data, then merge. Everything but the BatchNorms runs in evaluation mode, so the statistics are those
    of the model as it is used: the plain mean over the batches, whose number of tokens should be the same. The model
    is left as it was, statistics apart; one without BatchNorm is left alone.

    Args:
        model: changed in place. DistributedDataParallel, DataParallel, AveragedModel and torch.compile's wrapper are
            looked through: each process measures what its own loader gives.
        loader: batches of model inputs: a tensor each, or a tuple or list whose first element is one (labels follow).

    Raises:
        ValueError: the loader is empty.
    """
    model = unwrapped(model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative: every batch counts the same
            norm.train()
        batches = 0
        for batch in loader:
            images: Tensor = batch if isinstance(batch, Tensor) else batch[0]
            model(images.to(device))
            batches += 1
        if not batches:
            for norm, buffers in zip(norms, before, strict=True):
                for name, buffer in buffers.items():
                    getattr(norm, name).copy_(buffer)
            raise ValueError("loader: got no batches, wanted the training images once or in part")
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return len(norms)
