"""ONNX at an opset whose GELU is spelt out."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

OPSET = 18  # its GELU is spelt out: MNN computes the Gelu of opset 20 by tanh


def write(model: nn.Module, x: Tensor, target: Path, dynamic: bool) -> None:
    """Write ``model`` for inputs like ``x``, with ``dynamic`` for any number of images."""
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


def run(path: Path, x: Tensor) -> tuple[str, Tensor]:
    """The runtime's name and its output."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"{path.name} was written, but not checked: onnxruntime is not installed: pip install onnxruntime"
        ) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": x.numpy()})[0]
    return f"ONNX Runtime {onnxruntime.__version__}, opset {OPSET}", torch.from_numpy(outputs)
