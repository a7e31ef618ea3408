"""LiteRT flatbuffers (.tflite)."""

from __future__ import annotations

import contextlib
import io
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = (
    "export to .tflite: litert-torch is not installed; keep the torch that is there: "
    "pip freeze | grep ^torch== > keep.txt && pip install -c keep.txt litert-torch"
)


def write(model: nn.Module, x: Tensor, target: Path, dynamic: bool) -> None:
    """Write ``model`` for inputs like ``x``."""
    try:
        import litert_torch
    except ImportError as error:
        raise ImportError(INSTALL) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters about themselves
        with contextlib.redirect_stdout(io.StringIO()):  # of every step that it begins and ends
            litert_torch.convert(model, (x,)).export(str(target))


def run(path: Path, x: Tensor) -> tuple[str, Tensor]:
    """The runtime's name and its output."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError(INSTALL) from error
    interpreter: Any = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.numpy())
    interpreter.invoke()
    output = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return f"LiteRT {metadata.version('ai-edge-litert')}", torch.from_numpy(output)
