"""Activations on disk while a model is changed block by block, so that memory does not grow with the data."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


class Scratch:
    """Tensors by name and batch in a folder of its own, removed on leaving.

    Args:
        parent: folder to put it in; None for the system's temporary folder.
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="repavit_ops_", dir=parent)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def put(self, name: str, batch: int, tensor: Tensor) -> None:
        torch.save(tensor.detach().cpu().contiguous().clone(), self._path(name, batch))

    def get(self, name: str, batch: int) -> Tensor:
        return torch.load(self._path(name, batch), weights_only=True)

    def _path(self, name: str, batch: int) -> Path:
        return Path(self._folder.name) / f"{name}.{batch}.pt"
