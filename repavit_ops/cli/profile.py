"""``repavit-ops profile``: where the time goes, on screen, as JSON and as a plot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .common import DTYPES, model_of, overrides_of, plain_errors

if TYPE_CHECKING:
    from torch import nn


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model of the registry, a timm name, or a file.")],
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    idle_ratio: Annotated[str | None, typer.Option(help="θ, of a name or as in convert.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads of a file, as in convert.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Pixels of the side; default the model's own.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch; default its own number.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each form of the model, about.")] = 3.0,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a plot (.png, .svg).")] = None,
) -> None:
    """Show where a model's time goes on this CPU: embedding, attention and FFN by their products, the rest.

    Side by side: vanilla, deployed (merged, plain PyTorch) and fused; with GFLOP/s and their share of what this machine
    multiplies in registers, measured before. Weights of names are random: time does not depend on them.
    """
    with plain_errors():
        import torch

        from ..models.patch_embed import image_of
        from ..profiling import product_peak, profile_forms, report

        if dtype not in DTYPES:
            raise ValueError(f"--dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
        if threads is not None:
            torch.set_num_threads(threads)
        subject = model_of(model, overrides_of(idle_ratio, num_heads), img_size)
        own, channels = image_of(subject)
        size = own if img_size is None else (img_size, img_size)
        images = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
        kind = getattr(torch, dtype)
        peak = product_peak(kind)
        profiles = profile_forms(subject, images.to(kind), vanilla=_twin_of(model, img_size), seconds=seconds)
        title = f"{model}, batch {batch}, {dtype}, {torch.get_num_threads()} threads"
        if picture is not None:
            report.plot(profiles, picture, title)
        if as_json is not None:
            whole: dict[str, Any] = {"model": model, "batch": batch, "dtype": dtype, "size": list(size)}
            whole |= {"threads": torch.get_num_threads(), "peak_flops": peak}
            whole |= {"forms": {name: found.to_dict() for name, found in profiles.items()}}
            text = json.dumps(whole, indent=2) + "\n"
            sys.stdout.write(text) if as_json == "-" else Path(as_json).write_text(text)
    console = Console(stderr=as_json == "-", highlight=False)
    console.print(escape(title) + ("" if peak is None else f"; peak {peak / 1e9:.1f} GFLOP/s"))
    console.print(report.tables(profiles, peak))
    if any(found.estimated for found in profiles.values()):
        console.print("fused: a kernel's inside is divided by the time that its products take alone", soft_wrap=True)


def _twin_of(source: str, img_size: int | None) -> nn.Module | None:
    """The vanilla twin of a name of the registry; None where it has none."""
    from ..models import create_model, list_models

    twin = "vanilla_vit_tiny" if source.startswith("joined_vit_tiny") else source.replace("repa_", "vanilla_", 1)
    if source not in list_models() or twin == source:
        return None
    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    return create_model(twin, **size).eval()
