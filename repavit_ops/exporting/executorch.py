"""ExecuTorch programs (.pte), whose products XNNPACK computes."""

from __future__ import annotations

import math
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = (
    "export to .pte: executorch is not installed; keep the torch that is there: "
    "pip freeze | grep ^torch== > keep.txt && pip install -c keep.txt executorch"
)


def write(model: nn.Module, x: Tensor, target: Path, dynamic: bool) -> None:
    """Write ``model`` for inputs like ``x``."""
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise ImportError(INSTALL) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters about themselves
        exported = torch.export.export(model, (x,))
        # XNNPACK takes a tanh GELU for an exact one: here it is spelt out
        exported = exported.run_decompositions({torch.ops.aten.gelu.default: spelt_out})
        lowered: Any = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        target.write_bytes(lowered.to_executorch().buffer)


def spelt_out(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU by simpler operators."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def run(path: Path, x: Tensor) -> tuple[str, Tensor]:
    """The runtime's name and its output."""
    try:
        from executorch.runtime import Runtime
    except ImportError as error:
        raise ImportError(INSTALL) from error
    method: Any = Runtime.get().load_program(path).load_method("forward")
    return f"ExecuTorch {metadata.version('executorch')}, XNNPACK", method.execute([x])[0].clone()
