"""Merge, write, run there, compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..fusing import reparameterize
from ..models.patch_embed import image_of
from . import executorch, litert, onnx

SLACK = 10  # another runtime sums in another order; a GELU of the other form is 20 times eager's error and more


class Target(NamedTuple):
    """One kind of file.

    Args:
        write: (model, x, file, dynamic batch?) → None.
        run: (file, x) → the runtime's name, its output.
        half: whether float16 is exact there. dynamic: whether any number of images can be.
        reader: what takes such files, in words.
    """

    write: Callable[[nn.Module, Tensor, Path, bool], None]
    run: Callable[[Path, Tensor], tuple[str, Tensor]]
    half: bool
    dynamic: bool
    reader: str


TARGETS = {
    ".onnx": Target(onnx.write, onnx.run, half=True, dynamic=True, reader="ONNX Runtime and whatever reads opset 18"),
    ".pte": Target(executorch.write, executorch.run, half=True, dynamic=False, reader="ExecuTorch with XNNPACK"),
    ".tflite": Target(litert.write, litert.run, half=False, dynamic=False, reader="LiteRT, formerly TensorFlow Lite"),
}


@dataclass(frozen=True)
class Exported:
    """What an exported model computes.

    Attributes:
        runtime: what ran it.
        error, eager: max|output - float64| / max|float64| of that runtime, and of PyTorch in the same precision.
    """

    runtime: str
    error: float
    eager: float

    @property
    def passed(self) -> bool:
        """Whether the file computes what the model does: up to ten times what rounding makes of PyTorch's."""
        return self.error <= SLACK * self.eager + 1e-6


def export_model(
    model: nn.Module, target: str | Path, *, half: bool = False, batch: int = 1, image_size: int | None = None
) -> Exported:
    """Merge ``model``, write it for the runtime that ``target``'s suffix names, run it there and compare.

    Args:
        model: any classifier or backbone of this library, or timm's; for .onnx fused ones too, by their formulas.
        target: file to write: .onnx (ONNX Runtime and whatever reads opset 18), .pte (ExecuTorch with XNNPACK) or
            .tflite (LiteRT).
        half: float16 weights, inputs and outputs; otherwise float32. Not for .tflite.
        batch: images per call; 0 for any number, in .onnx alone.
        image_size: pixels; None for what the model was built for.

    Raises:
        ValueError: a suffix without a runtime, a negative batch, a precision or a batch that the runtime does not have.
        RuntimeError: a part is in training mode; a join coefficient α is below 1.
        ImportError: the exporter or the runtime is not installed; says what to install.
    """
    target = Path(target)
    kind = _kind(target, half, batch)
    merged = reparameterize(model)
    (height, width), channels = image_of(merged)
    size = (image_size, image_size) if image_size else (height, width)
    x = torch.randn(batch or 2, channels, *size, generator=torch.Generator().manual_seed(0))
    truth = _run(copy.deepcopy(merged).double(), x.double())
    dtype = torch.float16 if half else torch.float32
    plain, x = merged.to(dtype), x.to(dtype)
    kind.write(plain, x, target, batch == 0)
    name, ours = kind.run(target, x)
    return Exported(name, relative(ours, truth), relative(_run(plain, x), truth))


def _kind(target: Path, half: bool, batch: int) -> Target:
    if target.suffix not in TARGETS:
        raise ValueError(f"OUT: got {target.name}, wanted a name that ends in {', '.join(TARGETS)}")
    kind = TARGETS[target.suffix]
    if batch < 0:
        raise ValueError(f"batch: got {batch}, wanted a number of images, or 0 for any")
    if batch == 0 and not kind.dynamic:
        raise ValueError(f"batch: got 0 (any number), wanted a number of images, as {target.suffix} fixes it")
    if half and not kind.half:
        raise ValueError(f"precision: got fp16, wanted fp32, the only one that is exact in {target.suffix}")
    return kind


@torch.no_grad()
def _run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def relative(value: Tensor, truth: Tensor) -> float:
    """max|value - truth| / max|truth|."""
    return float((value.double() - truth).abs().max() / truth.abs().max())
