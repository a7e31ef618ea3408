"""Files of idled timm models: their weights, how timm builds the original, and the blocks that were idled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..fusing.opening import open_ffns
from ..nn import PartialGELUFFN
from .files import Checkpoint, write_checkpoint

LAYOUT = "timm"
READING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
SETTINGS = ("dim", "act_channels", "norm_eps", "norm", "approximate")


def save_idled(model: nn.Module, path: str | os.PathLike[str], timm_name: str, **arguments: Any) -> None:
    """Write an idled model of timm so that :func:`repavit_ops.load_checkpoint` restores it from the file alone.

    Args:
        model: of :func:`repavit_ops.idle_pretrained`, unfused. One of this library goes to
            :func:`repavit_ops.save_checkpoint`.
        path: ending in .safetensors, .pth or .pt.
        timm_name: what ``timm.create_model`` made the original from, with ``arguments`` (JSON values: num_classes,
            img_size, …).

    Raises:
        ValueError: an unknown suffix.
    """
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
        ImportError: timm is not installed.
        ValueError: the file names no architecture of timm, or arguments that would read other files; the weights do
            not fit what timm builds (names the keys).
    """
    try:
        import timm
    except ImportError:
        raise ImportError(f'{file.origin}: its model is of timm: pip install "repavit-ops[timm]"') from None
    origin: Mapping[str, Any] = file.config["timm"]
    if not timm.is_model(origin["name"]):  # a path or a hub's address would be read, and believed
        raise ValueError(f"{file.origin}: got {origin['name']!r}, wanted the name of one of timm's architectures")
    if reading := sorted(READING & origin["arguments"].keys()):
        raise ValueError(f"{file.origin}: got the argument {reading[0]} for timm, wanted none that reads other files")
    built = timm.create_model(origin["name"], pretrained=False, **origin["arguments"]).eval()
    idled: Mapping[str, Mapping[str, Any]] = file.config["idled"]
    model = open_ffns(built, only={name.rpartition(".")[0] for name in idled})
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
