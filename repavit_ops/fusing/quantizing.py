"""Turning fused sub-blocks over to int8: which can be, and what changes in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import reparam
from ..nn import GatedFFN, PartialGELUFFN, RepAttention
from ..nn.packed_weights import PackedWeights
from ..reference_int8 import DEPTH

QUANTIZABLE = (PartialGELUFFN, GatedFFN, RepAttention)  # and windows, which are a RepAttention


def why_in_floats(module: PackedWeights) -> str | None:
    """Why the products of a fused sub-block stay in floats, in one line; None if they can be of int8."""
    if not isinstance(module, QUANTIZABLE):
        return f"{type(module).__name__} has no int8 form"
    deepest = max(w.shape[1] for w in module.sources() if w is not None)
    if deepest > DEPTH:
        return f"a weight has {deepest} inputs; int32 holds the sums of {DEPTH}"
    return None


def quantize_weights(module: PackedWeights, form: str) -> None:
    """Let a fused sub-block run in a form of whole numbers, where it has one; its parameters keep their numbers.

    A shortcut that was folded into w_merged leaves it: beside its 1 a row's other numbers would hardly have a step.

    Raises:
        ValueError: the weights are float64, which has no such form.
    """
    if why_in_floats(module) is not None or module.quantize == form:
        return
    first = getattr(module, module.packed_names[0])
    if first.dtype == torch.float64:
        raise ValueError(f"quantize: {form!r} is for float32, bfloat16 and float16, got a model in float64; give dtype")
    module.restore_unpacked()
    if isinstance(module, PartialGELUFFN) and module.norm_eps is None and not module.residual:
        _take_out_shortcut(module)
    module.quantize = form
    module.requires_grad_(False)
    module.repack()


def _take_out_shortcut(module: PartialGELUFFN) -> None:
    folded = module.w_merged
    if folded is None:
        return
    apart = reparam.unfold_identity(folded.detach()).to(folded.dtype)
    if float(_largest(apart)) < float(_largest(folded.detach())):
        module.w_merged = nn.Parameter(apart, requires_grad=False)
        module.residual = True


def _largest(w: Tensor) -> Tensor:
    """The sum of the rows' steps, up to a factor."""
    return w.abs().amax(dim=1).sum() if w.numel() else w.new_zeros(())
