"""``repavit-ops tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .common import DTYPES, plain_errors

if TYPE_CHECKING:
    import torch


def tune(
    model: Annotated[list[str], typer.Argument(metavar="NAME...", help="Models of the registry to tune for.")],
    batch: Annotated[list[int], typer.Option(min=1, help="Images at once; may be given again.")] = [1, 8, 128],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="bfloat16, float16 or float32; may be given again.")] = ["bfloat16"],  # noqa: B006
    device: Annotated[str, typer.Option(help="The GPU.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Folder of tables; default $REPAVIT_TUNED or the package's.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the table has already, too.")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Processes that compile ahead.")] = 8,
) -> None:
    """Measure the tiles of the Triton kernels on this GPU, for every product of these models; write its table."""
    with plain_errors():
        import torch

        from .. import backends

        if (reason := backends.why_unavailable("triton")) is not None:
            raise RuntimeError(f"nothing to tune: {reason}")
        if wrong := [name for name in dtype if name not in DTYPES[:3]]:
            raise ValueError(f"--dtype: got {wrong[0]!r}, wanted one of {', '.join(DTYPES[:3])}")
        from ..kernels import tuner, tuning

        gpu = torch.device(device)
        folder = out or tuning.folders()[0]
        products = set[tuning.Product]()
        for name in model:
            for kind in dtype:
                products |= _products_of(name, batch, getattr(torch, kind), gpu)
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
