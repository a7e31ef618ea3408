"""``repavit-ops idle``: its arguments, and its report on screen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .common import parse_idle_ratio, plain_errors

if TYPE_CHECKING:
    from .idle_run import Outcome


def idle(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="dinov2-small, a timm name, NAME=FILE, or a file.")],
    data: Annotated[Path, typer.Option(help="Folder of photos; a fifth of them only tests.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors, .pth or .pt.")],
    idle_ratio: Annotated[str, typer.Option(help="θ of every block, or one per block: 0.5,0.75,…")] = "0.5",
    allocate: Annotated[bool, typer.Option("--allocate", help="Spend θ's FLOPs by measured sensitivity.")] = False,
    crops: Annotated[int, typer.Option(min=1, help="Calibration crops of each photo.")] = 4,
    steps: Annotated[int, typer.Option(min=0, help="Gradient steps of each block; 0: closed form alone.")] = 200,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a crop in the fit; default all.")] = None,
    fresh: Annotated[int, typer.Option("--distill", min=0, help="Then distill on that many other crops of each.")] = 0,
    img_size: Annotated[int | None, typer.Option(help="Pixels of the side; default the model's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the photos' split, crops and tokens.")] = 0,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a plot (.png, .svg).")] = None,
) -> None:
    """Turn a pretrained ViT into a deployed channel-idle one without labels; report what it keeps and gains.

    This loses accuracy: the report's cosines and top-1 agreement, on photos that took no part, say how much.
    """
    with plain_errors():
        from . import idle_run

        ratios = parse_idle_ratio(idle_ratio)
        pretrained = idle_run.load(model, img_size)
        settings = {"crops": crops, "steps": steps, "tokens": tokens, "distill": fresh, "batch": batch, "seed": seed}
        outcome = idle_run.run(pretrained, data, out, ratios, allocate=allocate, **settings)  # type: ignore[arg-type]
        if picture is not None:
            idle_run.plot(outcome, picture, f"{model}, θ = {idle_ratio}")
        if as_json is not None:
            text = json.dumps({"model": model, "idle_ratio": ratios, **settings, **outcome.to_dict()}, indent=2) + "\n"
            sys.stdout.write(text) if as_json == "-" else Path(as_json).write_text(text)
    _tell(outcome, out, Console(stderr=as_json == "-", soft_wrap=True, highlight=False))


def _tell(outcome: Outcome, out: Path, console: Console) -> None:
    table = Table("block", "active", "of", "unexplained", "cosine", box=None, padding=(0, 2, 0, 0))
    for block in outcome.blocks:
        cosine = outcome.fidelity.blocks.get(block.name)
        numbers = ["left as it is", ""] if cosine is None else [f"{block.unexplained:.2%}", f"{cosine:.4f}"]
        table.add_row(escape(block.name), str(block.act_channels), str(block.hidden), *numbers)
    console.print(table)
    for label, kept in (("undistilled", outcome.undistilled), ("result", outcome.fidelity)):
        if kept is not None:
            token = "" if kept.class_token is None else f", class token {kept.class_token:.4f}"
            top1 = "" if kept.top1 is None else f", top-1 agreement {kept.top1:.1%}"
            console.print(f"{label:<12}cosine of patches {kept.patches:.4f}{token}{top1} on {kept.images} other photos")
    before, after, speed = outcome.before, outcome.after, outcome.speed
    console.print(f"parameters  {before.params:,} → {after.params:,}  ({after.params / before.params - 1:+.1%})")
    console.print(f"GMACs       {before.gmacs:.3f} → {after.gmacs:.3f}  ({after.macs / before.macs - 1:+.1%})")
    rates = f"{speed.original:.1f} → {speed.idled:.1f}  ({speed.gain:.2f}x)"
    console.print(f"images/s    {rates}, both fused, {speed.threads} threads, {speed.batch} at once")
    console.print(f"wrote       {escape(str(out))}")
