"""What inputs tell before quantizing: which sub-blocks int8 keeps near, and what its mean error takes from biases.

Every sub-block is called as it is and quantized, on what the model in floats hands it. Of its output y [tokens, C], off
by Δ in int8, two things are kept over all tokens t, each weighted by w_t = 1 / |y_t|² since what follows is a norm:

    correction  c  = Σ w_t Δ_t / Σ w_t            leaves the bias of the sub-block
    error       e² = Σ w_t |Δ_t - c|² / tokens    relative to the stream of tokens

Errors of sub-blocks add up as independent ones do, so the cosine of the last tokens is about 1 - Σ e² / 2. As many
sub-blocks stay in floats, those of the largest errors, as it takes for that to be no less than the caller wants.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..nn import GatedFFN, PartialGELUFFN, RepAttention
from ..nn.packed_weights import PackedWeights
from .quantizing import quantize_weights, why_in_floats

Batch: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
OUTPUT_BIAS = {PartialGELUFFN: "bias", GatedFFN: "bias", RepAttention: "b_proj"}


def calibrate(model: nn.Module, batches: Iterable[Batch], form: str, least_cosine: float) -> None:
    """Quantize the sub-blocks of a fused model that ``form`` keeps near enough on these batches; correct their biases.

    Each module keeps its error as ``quantization_error``.

    Args:
        model: in floats, with its plain weights.
        batches: of inputs, each a tensor, a dictionary of arguments, or a sequence whose first item is the input, as
            a DataLoader of images and labels gives them.
        form: "int8".
        least_cosine: of the last tokens with those of floats, as predicted.

    Raises:
        ValueError: there is no batch, or one that is no input; outputs are not finite.
    """
    modules = {name: m for name, m in model.named_modules() if _is_quantizable(m, form)}
    errors = {name: _Errors() for name in modules}
    handles = [
        module.register_forward_hook(_comparing(_quantized(module, form), errors[name]), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        _run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    if wrong := [name for name, e in errors.items() if e.tokens and not math.isfinite(e.squares)]:
        raise ValueError(f"calibration: got batches of which {wrong[0]} makes NaN or infinities; leave those out")
    for name in _near(errors, modules, least_cosine):
        module, bias = modules[name], _bias_of(modules[name])
        quantize_weights(module, form)
        if bias is not None:
            bias.sub_(errors[name].correction().to(bias))
    for name, module in modules.items():
        module.quantization_error = errors[name].error(_bias_of(module) is not None)


@dataclass
class _Errors:
    """Sums over the tokens of one sub-block's outputs, in float64."""

    tokens: int = 0
    weights: float = 0.0  # Σ w_t
    squares: float = 0.0  # Σ w_t |Δ_t|²
    weighted: Tensor | None = None  # Σ w_t Δ_t, [C]

    def add(self, quantized: Tensor, exact: Tensor) -> None:
        y = exact.double().flatten(0, -2)
        off = quantized.double().flatten(0, -2) - y
        sizes = y.square().sum(-1)
        w = torch.where(sizes > 0, 1 / sizes, 0.0)
        self.tokens += y.shape[0]
        self.weights += w.sum().item()
        self.squares += (w * off.square().sum(-1)).sum().item()
        weighted = w @ off
        self.weighted = weighted if self.weighted is None else self.weighted + weighted

    def correction(self) -> Tensor:
        if self.weighted is None:
            raise RuntimeError("no tokens were compared")
        return self.weighted / max(self.weights, 1e-300)

    def error(self, corrected: bool) -> float:
        """e; infinite where no token was seen."""
        if self.weighted is None or self.tokens == 0:
            return math.inf
        taken = self.weighted.square().sum().item() / max(self.weights, 1e-300) if corrected else 0.0
        return (max(self.squares - taken, 0.0) / self.tokens) ** 0.5


def _is_quantizable(module: nn.Module, form: str) -> bool:
    return isinstance(module, PackedWeights) and module.quantize != form and why_in_floats(module) is None


def _quantized(module: PackedWeights, form: str) -> PackedWeights:
    """A copy that runs in ``form`` and, where it is packed, holds nothing else."""
    twin = copy.deepcopy(module)
    quantize_weights(twin, form)
    twin.drop_unpacked()
    return twin


def _comparing(twin: PackedWeights, errors: _Errors) -> Any:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        errors.add(twin(*arguments, **named), output)

    return hook


def _run(model: nn.Module, batches: Iterable[Batch]) -> None:
    place = next(p for p in model.parameters() if p.is_floating_point())
    count = 0

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(place.device, place.dtype if value.is_floating_point() else value.dtype)

    if not isinstance(batches, Iterable):
        raise ValueError(f"calibration: got {type(batches).__name__}, wanted batches, such as a DataLoader or a list")
    with torch.no_grad():
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            count += 1
            if isinstance(batch, Mapping):
                model(**{name: moved(value) for name, value in batch.items()})
                continue
            x = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"calibration: got a batch of {type(batch).__name__}, wanted a tensor, (images, labels), or a "
                    "dictionary of arguments"
                )
            model(moved(x))
    if count == 0:
        raise ValueError("calibration: got no batch, wanted at least one; a generator gives its batches only once")


def _near(errors: Mapping[str, _Errors], modules: Mapping[str, PackedWeights], least_cosine: float) -> list[str]:
    """Names of the sub-blocks to quantize: all but those of the largest errors, as many as have to stay in floats."""
    sizes = {name: e.error(_bias_of(modules[name]) is not None) for name, e in errors.items()}
    left, near = 2 * (1 - least_cosine), list[str]()
    for name in sorted(sizes, key=sizes.__getitem__):
        left -= sizes[name] ** 2
        if left < 0:
            break
        near.append(name)
    return near


def _bias_of(module: PackedWeights) -> Tensor | None:
    name = next(name for kind, name in OUTPUT_BIAS.items() if isinstance(module, kind))
    bias = getattr(module, name)
    return None if bias is None else bias.detach()
