"""The progress bar of everything that takes minutes here."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress


def bar(shown: bool) -> Progress:
    """A bar on stderr that leaves nothing behind, or none."""
    return Progress(disable=not shown, transient=True, console=Console(stderr=True))
