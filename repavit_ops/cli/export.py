"""``repavit-ops export``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import fresh_model, overrides_of, plain_errors, read_config

if TYPE_CHECKING:
    from torch import nn


class Precision(str, Enum):
    """Of weights and results of an exported model."""

    fp32 = "fp32"
    fp16 = "fp16"


def export(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint, or a name (fresh weights).")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .onnx, .pte or .tflite.")],
    precision: Annotated[Precision, typer.Option(help="fp16 halves the file (.onnx, .pte).")] = Precision.fp32,
    batch: Annotated[int, typer.Option(help="Images per call; 0: any number (.onnx).")] = 1,
    image_size: Annotated[int | None, typer.Option(help="Pixels; default: what the model was built for.")] = None,
    idle_ratio: Annotated[
        str | None, typer.Option(help="θ that a training checkpoint was trained with; one, or one per block: 0.5,0.75.")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads, which a ViT's shapes do not tell.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file of the authors' constructor arguments.")] = None,
) -> None:
    """Merge a model and write it for another runtime, exactly; run it there and print its error against float64."""
    with plain_errors():
        from ..exporting import export_model

        model = _model(source, read_config(config), overrides_of(idle_ratio, num_heads)).eval()
        outcome = export_model(model, target, half=precision is Precision.fp16, batch=batch, image_size=image_size)
    typer.echo(f"wrote       {target}  ({target.stat().st_size / 2**20:.1f} MiB, {precision.value})")
    typer.echo(f"runtime     {outcome.runtime}")
    typer.echo(
        f"error       {outcome.error:.1e} of the largest output, against float64 (PyTorch's {outcome.eager:.1e})"
    )
    if not outcome.passed:
        typer.echo("FAILED: the file computes something else; it was kept for a look", err=True)
        raise typer.Exit(1)


def _model(source: str, config: dict[str, Any] | None, overrides: dict[str, Any]) -> nn.Module:
    """A checkpoint's model, or a fresh one of a name."""
    from ..checkpoints import load_checkpoint
    from ..models import list_models

    if Path(source).exists():
        return load_checkpoint(source, config, **overrides)
    if source in list_models():
        return fresh_model(source, overrides)
    raise ValueError(f"MODEL: {source} is no file, and no name that repavit-ops models lists")
