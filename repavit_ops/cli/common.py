"""What the commands share: exit statuses, plain errors, arguments that several take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

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
