"""``repavit-ops convert``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .common import DTYPES, overrides_of, plain_errors, read_config

if TYPE_CHECKING:
    from torch import nn


class Layout(str, Enum):
    """Keys of a written checkpoint."""

    native = "native"
    authors = "authors"


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Checkpoint: .pth, .pt or .safetensors.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; its suffix chooses the format.")],
    idle_ratio: Annotated[
        str | None, typer.Option(help="θ that a training checkpoint was trained with; one, or one per block: 0.5,0.75.")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads, which a ViT's shapes do not tell.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file of the authors' constructor arguments.")] = None,
    layout: Annotated[Layout, typer.Option(help="Keys to write: ours, or the authors'.")] = Layout.native,
    packed: Annotated[
        bool, typer.Option("--packed", help="Fuse, and write what load_packed maps into every worker.")
    ] = False,
    dtype: Annotated[str, typer.Option(help=f"With --packed: {', '.join(DTYPES[:3])}; default the file's.")] = "",
    quantize: Annotated[str, typer.Option(help="With --packed: int8 for products in whole numbers.")] = "none",
) -> None:
    """Merge a training checkpoint into its deployed form, or rewrite a deployed one, in either layout.

    With --packed the model is fused besides, and its weights are written as the CPU kernels read them.
    """
    with plain_errors():
        if packed and layout is not Layout.native:
            raise ValueError("--layout: got authors beside --packed, which has a layout of its own; give one of them")
        if quantize != "none" and not packed:
            raise ValueError(
                f"--quantize: got {quantize!r}, which is a form of packed weights; give --packed beside it"
            )
        if dtype and (not packed or dtype not in DTYPES[:3]):
            raise ValueError(f"--dtype: got {dtype!r}, wanted one of {', '.join(DTYPES[:3])}, beside --packed")
        from ..checkpoints import load_checkpoint, save_checkpoint
        from ..fusing import reparameterize
        from ..models import complexity
        from ..models.patch_embed import image_of

        model = load_checkpoint(source, read_config(config), **overrides_of(idle_ratio, num_heads))
        image, channels = image_of(model)
        before = complexity(model, image, in_chans=channels)
        merged = reparameterize(model)
        after = complexity(merged, image, in_chans=channels)
        if packed:
            _write_packed(merged, source, target, dtype, quantize)
        else:
            save_checkpoint(merged, target, layout.value)
    console = Console(soft_wrap=True)
    counts = _training_forms(model)
    what = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing (already in deployed form)"
    console.print(f"merged      {what}")
    console.print(f"parameters  {before.params:,} → {after.params:,}  ({after.params / before.params - 1:+.1%})")
    console.print(f"GMACs       {before.gmacs:.3f} → {after.gmacs:.3f}  ({after.macs / before.macs - 1:+.1%})")
    console.print(f"wrote       {escape(str(target))}  ({'packed' if packed else f'{layout.value} layout'})")


def _write_packed(merged: nn.Module, source: Path, target: Path, dtype: str, quantize: str) -> None:
    """Fuse and write for mapping."""
    import torch

    from ..checkpoints.packed_models import save_packed
    from ..fusing import fuse

    kind = getattr(torch, dtype) if dtype else None
    save_packed(fuse(merged, inplace=True, keep_unpacked=False, dtype=kind, quantize=quantize), target, source=source)


def _training_forms(model: nn.Module) -> dict[str, int]:
    """How many modules of each training form a model holds."""
    from ..fusing import TRAINING_FORMS

    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, TRAINING_FORMS):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return counts
