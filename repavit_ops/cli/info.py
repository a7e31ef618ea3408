"""``repavit-ops info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .common import plain_errors


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, the CPU level, GPUs, and each backend or the reason that it is missing."""
    from .. import info as installation

    with plain_errors():
        collected = installation.collect()
    if as_json:
        print(json.dumps(collected, indent=2))
        return
    table = Table("what", Column("state", overflow="fold"), show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, state in installation.rows(collected):
        table.add_row(f"[bold]{name}[/]", escape(state))
    Console(soft_wrap=True).print(table)
