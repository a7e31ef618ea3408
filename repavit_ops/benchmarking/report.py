"""Measured cases for people: tables, what is missing and how to get it, a progress bar; and JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import measuring
from .harness import machine
from .measuring import OURS, Measured, dtype_name
from .method import MethodRow

CAPTION = "ms: median of a call; spread: its 20th to 80th percentile; of ours: times our median"


@contextmanager
def progress_bar(cases: int) -> Iterator[list[measuring.Progress]]:
    """One function for each case to tell its progress to; drawn on stderr, gone at the end."""
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=cases)

        def teller(index: int) -> measuring.Progress:
            return lambda text, share: bar.update(task, completed=index + share, description=text)

        yield [teller(index) for index in range(cases)]


def machine_line() -> str:
    """What everything below was measured on."""
    here = machine()
    return f"{here['cpu']}, {here['threads']} threads, kernels for {here['isa'] or 'none'}, torch {here['torch']}"


def times_table(measured: Sequence[Measured]) -> Table:
    """A line for every provider of every case: milliseconds of a call, its spread, rate, and time over ours."""
    operators = any(row.case.bytes for row in measured)
    table = Table(box=SIMPLE_HEAD, caption_justify="left", caption=CAPTION)
    table.add_column("case")
    for name in ("ms", "spread", "GFLOP/s" if operators else "images/s", "of ours"):
        table.add_column(name, justify="right")
    for row in measured:
        table.add_row(f"[bold]{row.case.name}, {dtype_name(row.case.dtype)}")
        for name, t in sorted(row.timings.items(), key=lambda item: item[0] != OURS):
            rate = row.case.flop / t.p50 / 1e9 if operators else row.images_per_second(name)
            of_ours = "" if name == OURS else f"{t.p50 / row.timings[OURS].p50:.2f}x"
            spread = f"{(t.p80 - t.p20) / t.p50:.0%}"
            table.add_row(f"  {name}", f"{1e3 * t.p50:.2f}", spread, f"{rate:.1f}", of_ours)
        if row.peak_flops:
            table.add_row("  [dim]products in registers", "", "", f"[dim]{row.peak_flops / 1e9:.1f}")
    return table


def method_table(table: str, rows: Sequence[MethodRow]) -> Table:
    """A table of a paper: what a model counts, in brackets what the paper prints where that differs, and speeds."""
    title = f"Table {table}" if table.isdigit() else "Depth of ViT-Tiny"
    accuracies = any(row.paper.form == "other" for row in rows)
    shown = Table(title=title, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True, min_width=20)
    columns = ("M params", "GMACs", "plain", "ratio", "fused", "ratio", "paper's")
    for name in (*columns, *(("top-1",) if accuracies else ())):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        paper, counted = row.paper, row.counted
        if paper.form == "vanilla":
            shown.add_section()
        shown.add_row(
            "  training form" if paper.form == "training" else paper.label,
            _counted(None if counted is None else counted.mparams, paper.mparams),
            _counted(None if counted is None else counted.gmacs, paper.gmacs),
            *(cell for kind in ("plain", "fused") for cell in _rate(row, kind)),
            _number(row.paper_ratio, 2),
            *((_number(paper.accuracy),) if accuracies else ()),
        )
    return shown


def _rate(row: MethodRow, kind: str) -> tuple[str, str]:
    return _number(row.rates.get(kind)), _number(row.ratios.get(kind), 2)


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _counted(value: float | None, printed: float | None) -> str:
    own, theirs = _number(value), _number(printed)
    return own if own == theirs or not theirs else f"{own}\n[{theirs}]".strip()


METHOD = (
    "plain, fused: images per second in PyTorch and on our kernels; ratio: to the first row of a backbone; "
    "paper's: its own ratio; in brackets: printed, where the model counts something else"
)


def left_out_lines(measured: Iterable[Measured]) -> list[str]:
    """What was not timed and why, each said once with the cases that it holds for."""
    reasons: dict[tuple[str, str], list[str]] = {}
    count = 0
    for row in measured:
        count += 1
        for name, reason in row.left_out.items():
            reasons.setdefault((name, reason), []).append(row.case.name)
    return [
        f"not timed: {name}" + ("" if len(cases) == count else f" of {', '.join(cases)}") + f": {reason}"
        for (name, reason), cases in reasons.items()
    ]
