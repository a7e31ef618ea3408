"""What the commands share: exit statuses, plain errors, arguments that several take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from torch import nn

FAILED, USAGE = 1, 2  # exit statuses; 0 is success
DTYPES = ("float32", "bfloat16", "float16", "float64")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what the library raises for bad input into one line on stderr and exit status 2."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error).strip())}")
        raise typer.Exit(USAGE) from error


def read_config(path: Path | None) -> dict[str, Any] | None:
    """Constructor arguments from a JSON file."""
    if path is None:
        return None
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--config: {path} is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config: {path} holds a {type(config).__name__}, wanted an object of constructor arguments")
    return config


def parse_idle_ratio(text: str) -> float | list[float]:
    """θ from "0.75", or of every block from "0.5,0.75,…"."""
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--idle-ratio: got {text!r}, wanted 0.75, or one per block: 0.5,0.75,…") from error
    return ratios[0] if len(ratios) == 1 else ratios


def overrides_of(idle_ratio: str | None, num_heads: int | None) -> dict[str, Any]:
    """What of a checkpoint's arguments was given on the command line."""
    given = {"idle_ratio": None if idle_ratio is None else parse_idle_ratio(idle_ratio), "num_heads": num_heads}
    return {name: value for name, value in given.items() if value is not None}


def fresh_model(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A model of the registry with fresh weights, in evaluation mode.

    Branches of a joined one are joined, as at the end of a training: below α = 1 it does not merge.
    """
    from ..models import create_model
    from ..nn import set_join

    model = create_model(name, **arguments).eval()
    if name.startswith("joined"):
        set_join(model, 1.0)
    return model


def model_of(source: str, overrides: Mapping[str, Any] | None = None, img_size: int | None = None) -> nn.Module:
    """The model that an argument means: a name of the registry, a timm name, or a checkpoint file."""
    from ..checkpoints import load_checkpoint
    from ..models import list_models

    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if source in list_models():
        return fresh_model(source, {**size, **(overrides or {})})
    if Path(source).suffix in (".pth", ".pt", ".safetensors", ".json"):
        return load_checkpoint(source, **(overrides or {}))
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"MODEL: got {source!r}, no model of this library; timm's need: pip install timm") from error
    if source not in timm.list_models():
        raise ValueError(f"MODEL: got {source!r}, no model of repavit-ops models, no timm name and no checkpoint file")
    return timm.create_model(source, pretrained=False, **size).eval()
