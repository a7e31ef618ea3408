"""Files of idled timm models: their weights, how timm builds the original, and the blocks that were idled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..models.checkpoint_files import Checkpoint, write_checkpoint
from ..models.checkpoints import save_checkpoint
from ..nn import PartialGELUFFN
from .blocks import open_blocks

LAYOUT = "timm"
SETTINGS = ("dim", "act_channels", "norm_eps", "approximate")


def save_idled(model: nn.Module, path: str | os.PathLike[str], timm_name: str | None = None, **arguments: Any) -> None:
    """Write an idled model so that :func:`repavit_ops.load_checkpoint` restores it from the file alone.

    Args:
        model: of :func:`repavit_ops.idle_pretrained`, unfused.
        path: ending in .safetensors, .pth or .pt.
        timm_name: what ``timm.create_model`` made the original from, with ``arguments`` (JSON values: num_classes,
            img_size, …); None for a model of this library.

    Raises:
        ValueError: an unknown suffix; without a name, a model that is not of this library.
    """
    if timm_name is None:
        save_checkpoint(model, path)
        return
    idled = {
        name: {key: getattr(ffn, key) for key in SETTINGS}
        for name, ffn in model.named_modules()
        if isinstance(ffn, PartialGELUFFN) and ffn.w_merged is not None
    }
    config = {"layout": LAYOUT, "timm": {"name": timm_name, "arguments": arguments}, "idled": idled}
    write_checkpoint(path, model.state_dict(), config)


def load_idled(file: Checkpoint) -> nn.Module:
    """The model of a file of :func:`save_idled`, in evaluation mode.

    Raises:
        ImportError: timm is not installed. ValueError: the weights do not fit what timm builds; names the keys.
    """
    try:
        import timm
    except ImportError:
        raise ImportError(f'{file.origin}: its model is of timm: pip install "repavit-ops[timm]"') from None
    origin: Mapping[str, Any] = file.config["timm"]
    built = timm.create_model(origin["name"], pretrained=False, **origin["arguments"]).eval()
    idled: Mapping[str, Mapping[str, Any]] = file.config["idled"]
    model, _ = open_blocks(built, only={name.rpartition(".")[0] for name in idled})
    for name, settings in idled.items():
        model.set_submodule(name, PartialGELUFFN(**settings, residual=True, backend="reference"))
    try:
        model.load_state_dict(file.state)
    except RuntimeError as error:
        raise ValueError(
            f"{file.origin}: does not fit the {origin['name']} that timm {timm.__version__} builds: {error}"
        ) from error
    dtype = next((t.dtype for t in file.state.values() if t.is_floating_point()), None)
    return model.to(dtype).eval()
