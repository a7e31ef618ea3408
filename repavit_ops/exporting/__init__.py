"""Models for other runtimes: written with the settings that keep them exact, run there, held against float64.

The obvious export is not exact everywhere: at opset 20 some runtimes take GELU for its tanh form, for example. So the
settings are chosen here, and every file is run before it is handed out (docs/exporting.md has the figures).
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .fusing import reparameterize
from .models.patch_embed import image_of

OPSET = 18  # its GELU is spelt out: MNN computes the Gelu of opset 20 by tanh
SLACK = 10  # another runtime sums in another order; a GELU of the other form is 20 times eager's error and more


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
        model: any classifier or backbone of this library, or timm's; not fused (fuse needs this library's operators).
        target: file to write: .onnx (ONNX Runtime and whatever reads opset 18).
        half: float16 weights, inputs and outputs; otherwise float32.
        batch: images per call; 0 for any number.
        image_size: pixels; None for what the model was built for.

    Raises:
        ValueError: a suffix without a runtime, a negative batch, a model that is fused.
        RuntimeError: a part is in training mode; a join coefficient α is below 1.
        ImportError: the exporter or the runtime is not installed; says what to install.
    """
    target = Path(target)
    if target.suffix != ".onnx":
        raise ValueError(
            f"OUT: got {target.name}, wanted a name that ends in .onnx; docs/exporting.md has the way to other runtimes"
        )
    if batch < 0:
        raise ValueError(f"batch: got {batch}, wanted a number of images, or 0 for any")
    merged = reparameterize(model)
    (height, width), channels = image_of(merged)
    size = (image_size, image_size) if image_size else (height, width)
    x = torch.randn(batch or 2, channels, *size, generator=torch.Generator().manual_seed(0))
    truth = _run(copy.deepcopy(merged).double(), x.double())
    dtype = torch.float16 if half else torch.float32
    plain, x = merged.to(dtype), x.to(dtype)
    _write_onnx(plain, x, target, dynamic=batch == 0)
    name, ours = _run_onnx(target, x)
    return Exported(name, _relative(ours, truth), _relative(_run(plain, x), truth))


def _write_onnx(model: nn.Module, x: Tensor, target: Path, dynamic: bool) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export to ONNX: onnxscript is not installed: pip install onnx onnxscript") from error
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter about itself
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=["images"],
            output_names=["outputs"],
            verbose=False,
        )
    assert program is not None
    program.save(target, external_data=False)


def _run_onnx(path: Path, x: Tensor) -> tuple[str, Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"{path.name} was written, but not checked: onnxruntime is not installed: pip install onnxruntime"
        ) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": x.numpy()})[0]
    return f"ONNX Runtime {onnxruntime.__version__}, opset {OPSET}", torch.from_numpy(outputs)


@torch.no_grad()
def _run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max() / truth.abs().max())
