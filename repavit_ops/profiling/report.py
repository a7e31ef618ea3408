"""Profiles for people: a table, stacked bars in text, a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .parts import PARTS
from .profile import Profile

# Patch embedding grey, attention in blues, FFN in oranges: parts of one half of a block look alike.
GREY, BLUES = "#8c8c8c", ("#a9c9ef", "#5b95dd", "#2f6fbf", "#7fb0e6", "#4a7fc4")
ORANGES, PALE = ("#f6d3a8", "#f0a04b", "#f7bd7d", "#d9791c", "#b85c0a"), "#bfbfbf"
COLOURS = dict(zip(PARTS, (GREY, *BLUES, *ORANGES, PALE), strict=True))
LETTERS = dict(zip(PARTS, "enqcpaNIAOM.", strict=True))  # where there are no colours
BAR = 60  # characters of the longest bar


def tables(profiles: Mapping[str, Profile], peak: float | None) -> Group:
    """What the command shows: a table of every part in every form, and bars."""
    return Group(_table(profiles, peak), Text(), *_bars(profiles))


def _table(profiles: Mapping[str, Profile], peak: float | None) -> Table:
    table = Table()
    table.add_column("part")
    for name in profiles:
        table.add_column(f"{name}: ms", justify="right")
        table.add_column("GFLOP/s" if peak is None else "GFLOP/s (of peak)", justify="right")
    for part in (part for part in PARTS if any(profile[part].seconds for profile in profiles.values())):
        cells = [Text(f"{LETTERS[part]} {part}", style=COLOURS[part])]
        for profile in profiles.values():
            cells += [Text(cell) for cell in _cells(profile[part].seconds, profile[part].flops, profile.seconds, peak)]
        table.add_row(*cells)
    table.add_section()
    totals = [_cells(p.seconds, sum(part.flops for part in p.parts), p.seconds, peak) for p in profiles.values()]
    table.add_row("all", *[cell for cells in totals for cell in cells])
    return table


def _cells(seconds: float, flops: int, whole: float, peak: float | None) -> list[str]:
    if seconds <= 0:
        return ["", ""]
    rate = flops / seconds
    of_peak = "" if peak is None else f" ({rate / peak:4.0%})"
    return [f"{seconds * 1e3:.2f} ({seconds / whole:4.0%})", f"{rate / 1e9:.1f}{of_peak}" if flops else ""]


def _bars(profiles: Mapping[str, Profile]) -> list[Text]:
    longest = max(profile.seconds for profile in profiles.values())
    width = max(len(name) for name in profiles)
    bars = []
    for name, profile in profiles.items():
        bar, drawn, until = Text(f"{name:<{width}} "), 0, 0.0
        for part in profile.parts:
            until += part.seconds
            count = round(BAR * until / longest) - drawn  # of what is drawn so far, so that no rounding adds up
            bar.append(LETTERS[part.name] * count, style=f"black on {COLOURS[part.name]}")
            drawn += count
        bars.append(bar.append(f" {profile.seconds * 1e3:.2f} ms"))
    return bars


def plot(profiles: Mapping[str, Profile], path: Path, title: str) -> None:
    """Stacked bars as a picture (.png, .svg, .pdf).

    Raises:
        ImportError: matplotlib is not installed; names the command.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(profiles)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(profiles)
    for part in PARTS:
        lengths = [profile[part].seconds * 1e3 for profile in profiles.values()]
        if any(lengths):
            axes.barh(list(profiles), lengths, left=left, color=COLOURS[part], label=part, edgecolor="white")
            left = [a + b for a, b in zip(left, lengths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms per forward")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path)
