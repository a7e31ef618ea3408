"""Measured rows as pictures: peers as bars, operators under their roofline, speed against parameters as Figure 2.

Every picture is written for light and for dark pages, as .svg and .png.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .measuring import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]  # as JSON lines have it

RED, OTHERS = "#d1495b", ("#4a7fc4", "#e39b3b", "#6a9f58", "#8d6cab", "#4ba3a3", "#9a8478")
THEMES = {"": ("#ffffff", "#222222"), "-dark": ("#16181d", "#e6e6e6")}  # background and ink, by suffix of the file
FORMATS = ("svg", "png")


def require_matplotlib() -> None:
    """Raise ImportError, with the command that helps, where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'repavit-ops[bench]'")


def write(name: str, folder: Path, size: tuple[float, float], draw: Callable[[Axes, str], None]) -> list[Path]:
    """Draw one picture in every theme and format; ``draw`` gets the axes and the ink.

    Raises:
        ImportError: matplotlib is not installed; names the command.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, (ground, ink) in THEMES.items():
        colours: dict[Any, str] = dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
        )
        grounds: dict[Any, str] = dict.fromkeys(
            ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), ground
        )
        with rc_context({**colours, **grounds, "svg.hashsalt": name, "svg.fonttype": "none"}):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure.add_subplot(), ink)
            for kind in FORMATS:
                written.append(folder / f"{name}{suffix}.{kind}")
                figure.savefig(written[-1], dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return written


def peers_as_bars(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Time of every provider over ours, one group of bars a case, with milliseconds at their ends."""
    names = _names(rows)
    height = 1.2 + sum(0.35 + 0.22 * len(row["seconds"]) for row in rows)

    def draw(axes: Axes, ink: str) -> None:
        places, labels, at = [], [], 0.0
        for row in rows:
            own, start = row["seconds"][OURS][1], at
            for name in (name for name in names if name in row["seconds"]):
                seconds = row["seconds"][name][1]
                axes.barh(at, seconds / own, 0.8, color=names[name], label=name)
                axes.text(seconds / own, at, f" {1e3 * seconds:.3g} ms", va="center", fontsize="x-small")
                at += 1
            places.append((start + at - 1) / 2)
            labels.append(f"{row['case']}\n{row['dtype']}")
            at += 1
        axes.axvline(1, color=ink, linewidth=0.8, linestyle=":")
        axes.set_yticks(places, labels, fontsize="small")
        axes.invert_yaxis()
        axes.set_xlabel(f"time of a call, {OURS} = 1")
        axes.margins(x=0.15, y=0.01)
        _legend(axes)

    return write("peers", folder, (8, height), draw)


def roofline(rows: Sequence[Row], folder: Path) -> list[Path]:
    """GFLOP/s of operators over the operations that they make of each byte, under what this machine can."""
    names = _names(rows)
    peak = max((row["peak_flops"] or 0.0 for row in rows), default=0.0)
    stream = max((row["peak_bytes_per_second"] or 0.0 for row in rows), default=0.0)

    def draw(axes: Axes, ink: str) -> None:
        ordered = sorted(rows, key=intensity)
        low, high = intensity(ordered[0]) / 2, intensity(ordered[-1]) * 2
        if peak and stream:
            corners = sorted({low, min(max(peak / stream, low), high), high})
            axes.plot(corners, [min(peak, stream * x) / 1e9 for x in corners], color=ink, linewidth=1.2)
            axes.set_title(f"{peak / 1e9:.0f} GFLOP/s in registers, {stream / 1e9:.0f} GB/s", fontsize="medium")
        label_at, step = low, (high / low) ** (1 / 32)  # names stand side by side, whatever lies beside what
        for row in ordered:
            x = intensity(row)
            rates = {name: row["flop"] / row["seconds"][name][1] / 1e9 for name in names if name in row["seconds"]}
            for name, rate in rates.items():
                axes.scatter(x, rate, color=names[name], s=42 if name == OURS else 20, label=name, zorder=3)
            label_at = max(label_at * step, x)
            place, words = (label_at, 1.5 * max(peak / 1e9, *rates.values())), row["case"].split(" batch")[0]
            line = {"arrowstyle": "-", "linewidth": 0.3, "color": ink}
            best = (x, max(rates.values()))
            axes.annotate(
                words, best, place, rotation=90, ha="center", va="bottom", fontsize="x-small", arrowprops=line
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(top=6 * axes.get_ylim()[1])
        axes.set_xlabel("operations per byte (weights, input and output once)")
        axes.set_ylabel("GFLOP/s")
        axes.grid(True, which="both", linewidth=0.3, alpha=0.4)
        _legend(axes)

    return write("roofline", folder, (8, 5), draw)


def intensity(row: Row) -> float:
    """Operations of an operator for each byte."""
    return float(row["flop"] / row["bytes"])


def speed_against_parameters(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Images per second over parameters: a backbone's forms joined by a line, reparameterized ones circled in red."""
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("params") and row["images_per_second"]:
            tables.setdefault((row["table"], row["backbone"]), []).append(row)
    backbones: dict[str, list[Row]] = {}
    for (_, backbone), group in tables.items():  # of several tables the one with most rows
        backbones[backbone] = max(backbones.get(backbone, []), group, key=len)

    def draw(axes: Axes, ink: str) -> None:
        for index, group in enumerate(backbones.values()):
            colour = OTHERS[index % len(OTHERS)]
            for kind, style in (("plain", ":"), ("fused", "-")):
                shown = [row for row in group if kind in row["images_per_second"] and row["form"] != "training"]
                points = [(row["params"] / 1e6, row["images_per_second"][kind]) for row in shown]
                axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.2) if points else None
                for row, (x, y) in zip(shown, points, strict=True):
                    merged = row["form"] in ("deployed", "joined")
                    axes.scatter(
                        x, y, s=36, color=colour, edgecolors=RED if merged else colour, linewidths=1.6, zorder=3
                    )
                if kind == "fused" and points:
                    axes.annotate(group[0]["label"], points[0], (4, 4), textcoords="offset points", fontsize="x-small")
        axes.plot([], [], ":", color=ink, label="plain PyTorch")
        axes.plot([], [], "-", color=ink, label="fused")
        axes.scatter([], [], color=ink, edgecolors=RED, linewidths=1.6, label="reparameterized")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("parameters, millions")
        axes.set_ylabel("images per second")
        axes.grid(True, which="both", linewidth=0.3, alpha=0.4)
        _legend(axes)

    return write("speed-against-parameters", folder, (8, 5.5), draw)


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """Colour of every provider, ours first and in red."""
    others = dict.fromkeys(name for row in rows for name in row["seconds"] if name != OURS)
    return {OURS: RED} | {name: OTHERS[index % len(OTHERS)] for index, name in enumerate(others)}


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), fontsize="small", framealpha=0.8)
