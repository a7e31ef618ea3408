"""``repavit-ops tune``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .common import DTYPES, model_of, plain_errors

if TYPE_CHECKING:
    import torch

    from ..benchmarking.cpu_tuner import Place
    from ..cpu_tuning import Measured

GPU = "cuda"


def tune(
    model: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Models of the registry; with --cpu timm's, and files, too.")
    ],
    cpu: Annotated[bool, typer.Option("--cpu", help="The CPU's kernels beside PyTorch's own form.")] = False,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images at once; may be given again. Default 1, 8, on a GPU 128 too."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="bfloat16, float16 or float32; may be given again. Default bfloat16, with --cpu float32 too."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="The GPU.")] = GPU,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of tables; default $REPAVIT_TUNED, or the package's, of CPUs the user's cache."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the table has already, too.")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Processes that compile ahead, for a GPU.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch, with --cpu; default its own number.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each operation, about, with --cpu.")] = 2.0,
) -> None:
    """Measure what is fastest on this GPU, or with --cpu on this CPU, for these models; write its table.

    On a GPU the tiles of the Triton kernels, for every product. With --cpu the C++ kernel beside PyTorch's own
    operators, for every operator, size and dtype: backend="auto" follows the table from then on.
    """
    with plain_errors():
        if wrong := [name for name in dtype or () if name not in DTYPES[:3]]:
            raise ValueError(f"--dtype: got {wrong[0]!r}, wanted one of {', '.join(DTYPES[:3])}")
        if cpu and device != GPU:
            raise ValueError(f"--device: got {device!r} beside --cpu; pass one of them")
        if not cpu and threads is not None:
            raise ValueError("--threads: is of the CPU, wanted with --cpu alone")
        if cpu:
            _tune_cpu(model, batch or [1, 8], dtype or ["float32", "bfloat16"], out, again, threads, seconds)
        else:
            _tune_gpu(model, batch or [1, 8, 128], dtype or ["bfloat16"], device, out, again, jobs)


def _tune_cpu(
    sources: list[str],
    batches: list[int],
    dtypes: list[str],
    folder: Path | None,
    again: bool,
    threads: int | None,
    seconds: float,
) -> None:
    import torch

    from .. import backends, cpu_tuning
    from ..benchmarking import cpu_tuner

    if (reason := backends.why_unavailable("cpp")) is not None:
        raise RuntimeError(f"nothing to tune: {reason}")
    if threads is not None:
        torch.set_num_threads(threads)
    file = cpu_tuning.path(folder)
    places = _places(sources, batches, dtypes)
    timer = cpu_tuner.microseconds(seconds)
    console = Console(soft_wrap=True, highlight=False)
    measured = []
    for one in cpu_tuner.tune(places, file, again=again, timer=timer):
        measured.append(one)
        if console.is_terminal:
            console.print(f"[dim]{one.operation.operator} {one.operation.dtype}, batch {one.batch}: {one.choice}[/]")
    if measured:
        Console().print(_table(measured))
        console.print(f"wrote {escape(str(file))}")
    else:
        console.print(f"{escape(str(file))} has all of it; --again measures anew")


def _places(sources: list[str], batches: list[int], dtypes: list[str]) -> Iterator[Place]:
    """Every operation of these models; one model at a time, so that no more than one is in memory."""
    import torch

    from ..benchmarking import cpu_tuner
    from ..fusing import fuse
    from ..models.patch_embed import image_of

    for source in sources:
        model = model_of(source)
        size, channels = image_of(model)
        for kind in dtypes:
            fused = fuse(model, backend="cpp", dtype=getattr(torch, kind))
            for batch in batches:
                images = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
                places = cpu_tuner.places_of(fused, images.to(getattr(torch, kind)))
                if not places:
                    raise ValueError(f"MODEL: nothing of {source!r} fuses, so that there is nothing to tune")
                yield from places


def _table(measured: list[Measured]) -> Table:
    """What was measured, for people."""
    table = Table(box=None, pad_edge=False)
    for title in ("operator", "shape", "dtype"):
        table.add_column(title, no_wrap=True)
    for title in ("ours µs", "PyTorch µs", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("choice")
    for one in measured:
        shape = "x".join(map(str, (one.batch, *one.size)))
        times = (f"{one.us:.1f}", f"{one.pytorch_us:.1f}", f"{one.pytorch_us / one.us:.2f}")
        choice = "PyTorch" if one.choice == "pytorch" else "ours"
        table.add_row(one.operation.operator, shape, one.operation.dtype, *times, choice)
    return table


def _tune_gpu(
    names: list[str], batches: list[int], dtypes: list[str], device: str, out: Path | None, again: bool, jobs: int
) -> None:
    import torch

    from .. import backends

    if (reason := backends.why_unavailable("triton")) is not None:
        raise RuntimeError(f"nothing to tune: {reason}; the CPU's kernels: --cpu")
    from ..kernels import tuner, tuning

    gpu = torch.device(device)
    folder = out or tuning.folders()[0]
    products = set[tuning.Product]()
    for name in names:
        for kind in dtypes:
            products |= _products_of(name, batches, getattr(torch, kind), gpu)
    console = Console(soft_wrap=True, highlight=False)
    with torch.cuda.device(gpu):
        for measured in tuner.tune(products, gpu, folder, again=again, processes=jobs):
            console.print(escape(str(measured)))
    console.print(f"wrote {escape(str(tuning.table_path(tuner.chip_of(gpu).name, folder)))}")


def _products_of(name: str, batches: list[int], dtype: torch.dtype, device: torch.device) -> set[Any]:
    """Every product that a registered model looks up when it runs fused."""
    import torch

    from ..fusing import fuse
    from ..kernels import tuning
    from ..models import create_model
    from ..models.patch_embed import image_of

    fused = fuse(create_model(name).eval(), dtype=dtype).to(device)
    image, channels = image_of(fused)
    with tuning.recording() as products, torch.inference_mode():
        for batch in batches:
            fused(torch.randn(batch, channels, *image, device=device).to(dtype))
    return products
