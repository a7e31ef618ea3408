"""How the demo shows what it found: tables in the terminal, JSON, one plot."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .results import DigitsRow, LargeRow, Results

FORM_COLOURS = {"vanilla": "#9aa5b1", "trained": "#9aa5b1", "merged": "#4f9dde", "fused": "#e4572e"}
MODEL_COLOURS = ("#5c6773", "#e4572e", "#2a9d8f", "#8a63d2")
INK = "#26323f"


def show_digits(results: Results, console: Console) -> None:
    """Print one line per model and form of the digits."""
    table = _table(f"{results.held_out} held-out digits", "model", "form")
    for title in ("correct", "same", "error", "params", "MMACs", "img/s", "speed"):
        table.add_column(title, justify="right", no_wrap=True)
    base = results.digits[0]
    for row in results.digits:
        first = row.form == "trained"
        same = f"{results.held_out - row.changed}"
        table.add_row(
            f"[bold]{row.model}" if first else "",
            row.form,
            f"{row.accuracy:.1%}",
            "" if first else same if not row.changed else f"[red]{same}",
            "" if row.check is None else f"{row.check.output.max_abs:.0e}",
            f"{row.params:,}",
            f"{row.macs / 1e6:.2f}",
            "" if row.rate is None else _number(row.rate.median),
            f"[bold]{_speedup(row, base):.2f}x",
            end_section=row.form == "fused",
        )
    console.print(table)
    for name, made_of in results.made_of.items():
        console.print(f"  {name:<8}  {made_of}", highlight=False)
    console.print(
        "  same: predictions equal to the trained form's; error: of the logits, against\n"
        "  the trained form in float64; speed: over the vanilla ViT as trained",
        style="dim",
        highlight=False,
    )


def show_large(results: Results, console: Console) -> None:
    """Print one line per large model and batch size: its forms side by side, in images per second."""
    table = _table("Images per second", "model")
    for title in ("batch", "vanilla", "merged", "fused", "speed", "MParams", "GMACs"):
        table.add_column(title, justify="right", no_wrap=True)
    for (name, batch), row in _large_groups(results).items():
        vanilla, merged, fused = (row[form] for form in ("vanilla", "merged", "fused"))
        table.add_row(
            f"[bold]{_title(name)}",
            str(batch),
            *(_number(r.rate.median) for r in (vanilla, merged, fused)),
            f"[bold]{fused.rate.median / vanilla.rate.median:.2f}x",
            f"{vanilla.params / 1e6:.1f}→{fused.params / 1e6:.1f}",
            f"{vanilla.macs / 1e9:.2f}→{fused.macs / 1e9:.2f}",
        )
    console.print(table)
    console.print(
        f"  merged: plain PyTorch; speed: fused over vanilla\n  {_machine(results)}", style="dim", highlight=False
    )


def _table(title: str, *columns: str) -> Table:
    """A table that fits 80 columns."""
    table = Table(
        title=title, title_style="bold", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
    )
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def write_json(results: Results, path: Path) -> None:
    """Write everything but the images."""
    path.write_text(json.dumps(results.to_dict(), indent=2, ensure_ascii=False) + "\n")


def plot(results: Results, path: Path) -> None:
    """Draw digits, training courses and both speed comparisons into one PNG."""
    figure = Figure(figsize=(13, 8.6), dpi=130, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1), height_ratios=(0.85, 1))
    _draw_samples(figure.add_subfigure(grid[0, 0]), results)
    _draw_courses(figure.add_subplot(grid[0, 1]), results)
    _draw_digits_rates(figure.add_subplot(grid[1, 0]), results)
    _draw_large_rates(figure.add_subplot(grid[1, 1]), results)
    figure.suptitle(f"repavit_ops: train, merge, fuse, verify\n{_machine(results)}", fontsize=12, color=INK)
    figure.savefig(path)


# --- panels -----------------------------------------------------------------------------------------------------------


def _draw_samples(figure: SubFigure, results: Results) -> None:
    changed = sum(row.changed for row in results.digits)
    verdict = "all predictions identical" if not changed else f"{changed} predictions differ"
    figure.suptitle(f"Held-out digits: as trained → merged and fused ({verdict})", fontsize=11, color=INK)
    for axis, (image, before, after) in zip(figure.subplots(2, 5).flat, results.samples, strict=False):
        axis.imshow(image.numpy(), cmap="Greys", interpolation="nearest")
        axis.set_xlabel(f"{before} → {after}", fontsize=11, color=INK if before == after else "red")
        axis.set_xticks([])
        axis.set_yticks([])


def _draw_courses(axis: Axes, results: Results) -> None:
    for (name, course), colour in zip(results.courses.items(), MODEL_COLOURS, strict=False):
        numbers = [epoch.number for epoch in course]
        label = f"{name} ({results.made_of[name]}): {course[-1].accuracy:.1%}"
        axis.plot(numbers, [100 * epoch.accuracy for epoch in course], color=colour, lw=2, label=label)
        if (alphas := [epoch.alpha for epoch in course if epoch.alpha is not None]) != []:
            axis.plot(numbers, [100 * a for a in alphas], color=colour, lw=1.2, ls=":", label="join coefficient α")
    axis.set_ylim(0, 103)
    axis.set_xlabel("epoch")
    axis.set_ylabel("held-out accuracy, %  (α, %)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(edgecolor="none", framealpha=0.9, fontsize=9, loc="lower right")
    _tidy(axis, "Training")


def _draw_digits_rates(axis: Axes, results: Results) -> None:
    base = results.digits[0]
    rows = list(reversed(results.digits))
    for place, row in enumerate(rows):
        value = _speedup(row, base)
        axis.barh(place, value, height=0.72, color=FORM_COLOURS[row.form])
        rate = 0.0 if row.rate is None else row.rate.median
        axis.text(value, place, f" {value:.2f}x   {_number(rate)}/s", va="center", fontsize=9, color=INK)
    axis.set_yticks(range(len(rows)), [f"{row.model}, {row.form}" for row in rows], fontsize=9.5)
    axis.set_xlim(0, 1.3 * max(_speedup(row, base) for row in rows))
    axis.axvline(1, color=INK, lw=0.8, ls=":")
    axis.set_xlabel("images per second, relative to the vanilla ViT")
    _tidy(axis, f"Digits, batches of {results.batch}")


def _draw_large_rates(axis: Axes, results: Results) -> None:
    groups = _large_groups(results)
    forms, width = ("vanilla", "merged", "fused"), 0.27
    top = 1.0
    for place, row in enumerate(groups.values()):
        base = row["vanilla"].rate.median
        for offset, form in enumerate(forms):
            rate = row[form].rate.median
            x = place + (offset - 1) * width
            axis.bar(x, rate / base, width * 0.92, color=FORM_COLOURS[form], label=form if not place else None)
            axis.text(x, rate / base, _number(rate), ha="center", va="bottom", fontsize=9, color=INK)
            top = max(top, rate / base)
    axis.set_xticks(range(len(groups)), [f"{_title(name)}\nbatch {batch}" for name, batch in groups])
    axis.set_ylim(0, 1.25 * top)
    axis.axhline(1, color=INK, lw=0.8, ls=":")
    axis.set_ylabel("relative to vanilla")
    if groups:
        axis.legend(frameon=False, fontsize=9, loc="upper left", ncols=3)
    _tidy(axis, "Large models at 224 pixels, images per second above the bars")


def _tidy(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=11, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelcolor=INK)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _speedup(row: DigitsRow, base: DigitsRow) -> float:
    return row.rate.median / base.rate.median if row.rate is not None and base.rate is not None else 0.0


def _large_groups(results: Results) -> dict[tuple[str, int], dict[str, LargeRow]]:
    """(model, batch) → form → row."""
    groups: dict[tuple[str, int], dict[str, LargeRow]] = {}
    for row in results.large:
        groups.setdefault((row.model, row.batch), {})[row.form] = row
    return groups


def _number(rate: float) -> str:
    """Three digits or more of a rate."""
    return f"{rate:,.0f}" if rate >= 99.5 else f"{rate:.1f}"


def _title(name: str) -> str:
    """deit_tiny → DeiT-Tiny."""
    return "-".join({"deit": "DeiT", "vit": "ViT"}.get(part, part.title()) for part in name.split("_"))


def _machine(results: Results) -> str:
    cpu, gpu = results.machine["cpu"], results.machine["gpu"]
    kernels = f"{cpu['isa']} kernels" if cpu["isa"] else "no C++ kernels"
    parts = [
        cpu["model"],
        kernels,
        f"{cpu['threads']} thread{'s' * (cpu['threads'] != 1)}",
        f"torch {results.machine['torch']}",
        "float32",
    ]
    return ", ".join(parts if not gpu else [*parts, f"(GPU present, not used: {gpu[0]['name']})"])
