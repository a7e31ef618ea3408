"""Parameters and multiply-accumulates, counted as the RePaViT paper counts them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..library import OPERATORS
from ..nn.given import require_whole, unwrapped
from .patch_embed import pair

LAYER_NORM_MACS = 5  # per element: mean, variance, normalisation, scale, shift


class Complexity(NamedTuple):
    """Size of a model.

    params: number of parameters. macs: multiply-accumulates of one image.
    """

    params: int
    macs: int

    @property
    def mparams(self) -> float:
        """Millions of parameters."""
        return self.params / 1e6

    @property
    def gmacs(self) -> float:
        """Billions of multiply-accumulates."""
        return self.macs / 1e9


def complexity(
    model: nn.Module, img_size: int | tuple[int, int] = 224, attention_products: bool = False, in_chans: int = 3
) -> Complexity:
    """Count parameters and MACs of one image as the paper's tables do, without computing anything.

    Counted are Linear and convolution products and their biases, and 5 per LayerNorm element; not BatchNorm,
    activations, softmax and, unless asked for, the products q kᵀ and p v. An operator of this library counts what its
    definition in :mod:`repavit_ops.reference` counts. Runs one image through ``model`` in evaluation mode on the meta
    device, whatever device the model is on; the model is left as it was.

    Args:
        model: any module that maps images [1, in_chans, H, W].
        img_size: pixels, one number or (height, width).
        attention_products: count q kᵀ and p v (the paper's CLIP rows do, its others do not).
        in_chans: channels of the image.

    Raises:
        ValueError: the model is sharded by FSDP; says how to gather its weights.
    """
    model = unwrapped(model)
    require_whole(model, "count")
    meta = {name: tensor.detach().to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    dtype = next((t.dtype for t in meta.values() if t.is_floating_point()), torch.float32)
    image = torch.empty(1, in_chans, *pair(img_size), device="meta", dtype=dtype)
    counter = MacCounter(attention_products)
    with _evaluating(model), torch.no_grad(), counter:
        torch.func.functional_call(model, meta, (image,))
    return Complexity(sum(p.numel() for p in model.parameters()), counter.macs)


class MacCounter(TorchFunctionMode):
    """Adds up the MACs of every functional call made while it is active."""

    def __init__(self, attention_products: bool) -> None:
        super().__init__()
        self.macs = 0
        self.rules: dict[Any, Callable[..., int]] = dict(MACS)
        if attention_products:
            self.rules[F.scaled_dot_product_attention] = _attention_macs
        self.references = {getattr(torch.ops.repavit_ops, op.name): op for op in OPERATORS}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = self.references.get(func)
        if operator is not None:
            with self:
                return operator.reference(*args[: operator.inputs], **kwargs)
        out = func(*args, **kwargs)
        if func in self.rules:
            self.macs += self.rules[func](out, *args, **kwargs)
        return out


def _linear_macs(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    return out.numel() * (weight.shape[-1] + (bias is not None))


def _conv_macs(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> int:
    return out.numel() * (weight[0].numel() + (bias is not None))


def _layer_norm_macs(out: Tensor, *_: Any, **__: Any) -> int:
    return LAYER_NORM_MACS * out.numel()


def _attention_macs(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    rows = math.prod(q.shape[:-1])
    return rows * k.shape[-2] * (q.shape[-1] + v.shape[-1])


MACS: dict[Any, Callable[..., int]] = {
    F.linear: _linear_macs,
    F.conv2d: _conv_macs,
    F.layer_norm: _layer_norm_macs,
}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each submodule then gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
