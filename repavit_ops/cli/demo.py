"""``repavit-ops demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .common import FAILED, plain_errors


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plot and the JSON.")] = Path("demo_out"),
    seed: Annotated[int, typer.Option(help="Seed of split, weights and batches.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs; default: what reaches 96 %.")] = None,
) -> None:
    """Train, merge, fuse and verify on real handwritten digits, then time the large models (2 to 4 minutes)."""
    with plain_errors():
        try:
            from ..demo import DemoFailure, Plan, Recipe, run
        except ModuleNotFoundError as error:
            raise ImportError(f"the demo needs {error.name}: pip install 'repavit-ops[demo]'") from error
    try:
        with plain_errors():
            run(out, seed=seed, plan=Plan() if epochs is None else Plan(recipe=Recipe(epochs=epochs)))
    except DemoFailure as failure:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]demo failed:[/] {escape(str(failure))}")
        raise typer.Exit(FAILED) from failure
