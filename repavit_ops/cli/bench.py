"""``repavit-ops bench``: speed on this machine, beside other runtimes and beside the papers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .common import DTYPES, FAILED, plain_errors

if TYPE_CHECKING:
    import torch

    from ..benchmarking.measuring import Case, Limits, Measured

bench = typer.Typer(name="bench", no_args_is_help=True, help="Time operators, models and the papers' tables here.")

Batch = Annotated[int, typer.Option(min=1, help="Images at once.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES[:3])}.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few cases, briefly: under two minutes of two cores.")]
Peers = Annotated[str | None, typer.Option(help="These alone: openvino,compile; or none. Default: all that are here.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of every runtime; default PyTorch's own number.")]
Seconds = Annotated[float | None, typer.Option(min=0.0, help="Of timing for each case; default 2, quick 0.5.")]
AsJson = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Append JSON lines; - for stdout.")]
Picture = Annotated[Path | None, typer.Option("--plot", metavar="FOLDER", help="Write plots, .svg and .png.")]


@bench.command("ops")
def bench_ops(
    batch: Batch = 1,
    dtype: Dtype = "float32",
    quick: Quick = False,
    peers: Peers = None,
    threads: Threads = None,
    seconds: Seconds = None,
    as_json: AsJson = None,
    picture: Picture = None,
) -> None:
    """Time the operators at the sizes of DeiT and Swin beside eager PyTorch and every other runtime that is here."""
    with _wrong_results(), plain_errors():
        from ..benchmarking.operators import OPERATORS, QUICK, operator_case

        kind, wanted = _dtype(dtype), _peers(peers)
        _check_plots(picture)
        names = QUICK if quick else OPERATORS
        cases = [lambda name=name: operator_case(name, batch, kind, wanted, quick) for name in names]
        measured = _measure(cases, threads, _limits(quick, seconds), as_json)
        _tell(measured, as_json)
        if picture is not None:
            from ..benchmarking import plots

            rows = [row.to_dict() for row in measured]
            _wrote(plots.peers_as_bars(rows, picture) + plots.roofline(rows, picture), as_json)


@bench.command("models")
def bench_models(
    model: Annotated[list[str] | None, typer.Option(help="Of the registry; may be given again.")] = None,
    batch: Batch = 1,
    dtype: Dtype = "float32",
    quick: Quick = False,
    peers: Peers = None,
    threads: Threads = None,
    seconds: Seconds = None,
    as_json: AsJson = None,
    picture: Picture = None,
) -> None:
    """Time whole models, merged and fused, beside eager PyTorch and every other runtime that is here."""
    with _wrong_results(), plain_errors():
        from ..benchmarking.models import MODELS, QUICK, model_case
        from ..models.registry import find_model

        kind, wanted = _dtype(dtype), _peers(peers)
        _check_plots(picture)
        names = model or (QUICK if quick else MODELS)
        for name in names:
            find_model(name)
        cases = [lambda name=name: model_case(name, batch, kind, wanted, quick) for name in names]
        measured = _measure(cases, threads, _limits(quick, seconds), as_json)
        _tell(measured, as_json)
        if picture is not None:
            from ..benchmarking import plots

            _wrote(plots.peers_as_bars([row.to_dict() for row in measured], picture), as_json)


@bench.command("method")
def bench_method(
    table: Annotated[str | None, typer.Option(help="Of 1, 2, 3, 4, 8, 9, depth; several: 1,4. Default all.")] = None,
    batch: Batch = 1,
    dtype: Dtype = "float32",
    quick: Quick = False,
    threads: Threads = None,
    seconds: Seconds = None,
    as_json: AsJson = None,
    picture: Picture = None,
) -> None:
    """Make the papers' tables here: parameters, GMACs and images per second of every form, beside what they print.

    Vanilla, training form, deployed, and fused; the ratios are to the first row of a backbone, plain PyTorch to plain
    and fused to fused.
    """
    with _wrong_results(), plain_errors():
        from ..benchmarking import method, papers, report

        kind = _dtype(dtype)
        _check_plots(picture)
        tables = table.split(",") if table else list(method.QUICK if quick else papers.TABLES)
        groups = method.groups_of(tables, quick)
        _threads(threads)
        rows: list[method.MethodRow] = []
        with report.progress_bar(len(groups)) as tellers:
            for group, progress in zip(groups, tellers, strict=True):
                found = method.measure_group(group, batch, kind, _limits(quick, seconds), progress)
                rows += found
                for row in found:
                    _write({"batch": batch, "dtype": dtype, **row.to_dict()}, as_json)
        console = Console(stderr=as_json == "-", highlight=False)
        console.print(escape(f"{report.machine_line()}; batch {batch}, {dtype}"))
        for name in tables:
            console.print(report.method_table(name, [row for row in rows if row.paper.table == name]))
            for note in papers.NOTES[name]:
                console.print(escape(f"- {note}"))
        console.print(escape(report.METHOD))
        if picture is not None:
            from ..benchmarking import plots

            _wrote(plots.speed_against_parameters([row.to_dict() for row in rows], picture), as_json)


@contextmanager
def _wrong_results() -> Iterator[None]:
    """A result of ours that is wrong is a line on stderr and exit status 1."""
    try:
        yield
    except AssertionError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]wrong:[/] {escape(str(error))}")
        raise typer.Exit(FAILED) from error


def _dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES[:3]:
        raise ValueError(f"--dtype: got {name!r}, wanted one of {', '.join(DTYPES[:3])}")
    kind: torch.dtype = getattr(torch, name)
    return kind


def _peers(text: str | None) -> list[str] | None:
    """Names of peers, none of which is unknown; None for all."""
    import torch

    from ..benchmarking.peers import find_peers

    names = None if text is None else [name for name in text.split(",") if name not in ("", "none")]
    find_peers(names, torch.float32)
    return names


def _check_plots(folder: Path | None) -> None:
    """Before hours are measured."""
    from ..benchmarking.plots import require_matplotlib

    if folder is not None:
        require_matplotlib()


def _limits(quick: bool, seconds: float | None) -> Limits:
    from ..benchmarking.measuring import Limits

    usual = Limits(0.5, 3) if quick else Limits()
    return usual if seconds is None else Limits(seconds, usual.rounds)


def _measure(
    cases: Sequence[Callable[[], Case]], threads: int | None, limits: Limits, as_json: str | None
) -> list[Measured]:
    """Every case, each written as soon as it is done."""
    from ..benchmarking import report
    from ..benchmarking.measuring import measure

    _threads(threads)
    measured = []
    with report.progress_bar(len(cases)) as tellers:
        for make, progress in zip(cases, tellers, strict=True):
            measured.append(measure(make(), limits, progress))
            _write(measured[-1].to_dict(), as_json)
    return measured


def _threads(count: int | None) -> None:
    import torch

    if count is not None:
        torch.set_num_threads(count)


def _write(row: dict[str, Any], as_json: str | None) -> None:
    from ..benchmarking.harness import append_result, json_line

    if as_json == "-":
        sys.stdout.write(json_line(row))
    elif as_json is not None:
        append_result(Path(as_json), row)


def _wrote(paths: list[Path], as_json: str | None) -> None:
    console = Console(stderr=as_json == "-", highlight=False, soft_wrap=True)
    for path in paths:
        console.print(f"wrote {escape(str(path))}")


def _tell(measured: list[Measured], as_json: str | None) -> None:
    from ..benchmarking import report

    console = Console(stderr=as_json == "-", highlight=False)
    console.print(escape(report.machine_line()))
    console.print(report.times_table(measured))
    for line in report.left_out_lines(measured):
        console.print(escape(line), soft_wrap=True)
