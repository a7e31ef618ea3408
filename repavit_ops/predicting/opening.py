"""What MODEL means: files of ours, names and folders of timm and transformers; fused when it comes out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import nn

from ..checkpoints import load_checkpoint
from ..checkpoints.files import SUFFIXES
from ..checkpoints.mapped_file import PACKED
from ..checkpoints.packed_models import load_packed
from ..checkpoints.shards import INDEX
from ..fusing import fuse
from ..nn.packed_weights import PackedWeights

CPU = torch.device("cpu")


class Opened(NamedTuple):
    """A fused model, and transformers' image processor where it has one."""

    model: nn.Module
    processor: Any = None


def opened(
    model: nn.Module | str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    quantize: str = "none",
    device: torch.device = CPU,
) -> Opened:
    """A model, fused.

    Args:
        model: a model in evaluation mode; a file of ``save_packed`` or ``save_checkpoint``, or one that
            ``load_checkpoint`` reads without arguments; a folder of transformers' ``save_pretrained``; a name of timm
            or of the Hugging Face hub, whose weights those libraries fetch.
        dtype: cast to it; default the model's own.
        quantize: as :func:`repavit_ops.fuse` takes it.
        device: where the model shall be.

    Raises:
        ImportError: the library that a name belongs to is not installed.
        ValueError: there is no such file, folder or name; a packed file is of another dtype or not quantized, or
            wanted on a GPU.
    """
    if isinstance(model, nn.Module):
        return Opened(fuse(model, dtype=dtype, quantize=quantize).to(device))
    path = Path(model)
    if path.is_file():
        return Opened(_of_file(path, dtype, quantize, device))
    if path.suffix in SUFFIXES or path.name.endswith(INDEX):
        raise ValueError(f"model: got {str(path)!r}, wanted an existing file")
    if (path / "config.json").is_file():
        return _of_transformers(str(path), dtype, quantize, device)
    if "/" not in str(model):
        return Opened(_fused(_of_timm(str(model)), dtype, quantize, device))
    if path.exists():
        raise ValueError(f"model: got the folder {str(path)!r} without a config.json of transformers")
    return _of_transformers(str(model), dtype, quantize, device)


def _fused(model: nn.Module, dtype: torch.dtype | None, quantize: str, device: torch.device) -> nn.Module:
    unpacked = device.type != CPU.type  # only the CPU's kernels have packed copies of the weights
    return fuse(model.to(device).eval(), dtype=dtype, inplace=True, keep_unpacked=unpacked, quantize=quantize)


def _of_file(path: Path, dtype: torch.dtype | None, quantize: str, device: torch.device) -> nn.Module:
    if path.suffix != ".safetensors" or not _is_packed(path):
        return _fused(load_checkpoint(path), dtype, quantize, device)
    if device.type != CPU.type:
        raise ValueError(
            f"device: got {device} for {path.name}, which is packed for the CPU's kernels; give its checkpoint"
        )
    model = load_packed(path)
    own = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    if dtype not in (None, own):
        raise ValueError(
            f"dtype: got {dtype} for {path.name}, which is packed in {own}; convert it again in that dtype"
        )
    if quantize not in ("none", *(part.quantize for part in model.modules() if isinstance(part, PackedWeights))):
        raise ValueError(
            f"quantize: got {quantize!r} for {path.name}, which was packed without; convert it again with it"
        )
    return model


def _is_packed(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return PACKED in (file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name}: got a damaged safetensors file ({error})") from error


def _of_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ImportError(
            f'model: {name} is no file, and a name of timm needs: pip install "repavit-ops[timm]"'
        ) from None
    if not timm.is_model(name):
        raise ValueError(f"model: got {name!r}, which is no file, no folder of transformers and no name of timm")
    model: nn.Module = timm.create_model(name, pretrained=True)
    return model


def processor_of(name: str | os.PathLike[str]) -> Any:
    """An image processor of transformers.

    Args:
        name: a folder that holds preprocessor_config.json, or a name of the Hugging Face hub.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the folder holds none.
    """
    if Path(name).exists() and not (Path(name) / "preprocessor_config.json").is_file():
        raise ValueError(f"processor: got {str(name)!r}, wanted a folder that holds preprocessor_config.json")
    return _transformers(str(name)).AutoImageProcessor.from_pretrained(name)


def _of_transformers(name: str, dtype: torch.dtype | None, quantize: str, device: torch.device) -> Opened:
    transformers = _transformers(name)
    config = transformers.AutoConfig.from_pretrained(name)
    classes = [getattr(transformers, found, None) for found in config.architectures or ()]
    cls = classes[0] if classes and classes[0] is not None else transformers.AutoModel
    model = cls.from_pretrained(name)
    return Opened(_fused(model, dtype, quantize, device), transformers.AutoImageProcessor.from_pretrained(name))


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError(f"{name} is of transformers, which is not installed: pip install transformers") from None
    return transformers
