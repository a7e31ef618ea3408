"""``repavit-ops predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import DTYPES, plain_errors

LISTED = 5  # unreadable images that are shown


def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A file, packed or not; a name of timm or transformers.")
    ],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, list, Parquet or tar file, or a pattern.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Parquet files go there; a killed run goes on there.")],
    top_k: Annotated[int, typer.Option(min=1, help="Best classes of each image.")] = 5,
    features: Annotated[
        bool, typer.Option("--features", help="Write features in front of the classifier too.")
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Features in float16, which few tools can filter or sum.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    processor: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="transformers' image processor, for a packed file of its models."),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Compute in {', '.join(DTYPES[:3])}; default the model's own.")] = "",
    quantize: Annotated[str, typer.Option(help="int8 for products in whole numbers.")] = "none",
    device: Annotated[str, typer.Option(help="Compute on cpu or cuda; with --ray each actor has a GPU then.")] = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and decode.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the model; default all CPUs of this process.")] = None,
    shard: Annotated[int, typer.Option(min=1, help="Image files to an output file.")] = 1024,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Compute on a Ray cluster; auto: the one that runs, or one here."),
    ] = None,
    actors: Annotated[int | None, typer.Option(min=1, help="Models on the cluster; default: all but a CPU.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Label a folder of images, or take their features, into Parquet files; run it again to go on after a kill."""
    with plain_errors():
        import torch

        from ..predicting import Predictor
        from ..predicting import predict as run

        if dtype and dtype not in DTYPES[:3]:
            raise ValueError(f"--dtype: got {dtype!r}, wanted one of {', '.join(DTYPES[:3])}")
        predictor = Predictor(
            model,
            processor=processor,
            top_k=top_k,
            features=features,
            half=half,
            dtype=getattr(torch, dtype) if dtype else None,
            quantize=quantize,
            device=device,
            threads=threads,
        )
        sizes: dict[str, Any] = {"batch": batch, "workers": workers, "shard": shard}
        summary = run(predictor, source, out, strict=strict, progress=not quiet, ray=ray, actors=actors, **sizes)
    typer.echo(str(summary))
    for path, error in summary.unreadable[:LISTED]:
        typer.echo(f"  {path}: {error}")
    if len(summary.unreadable) > LISTED:
        typer.echo(f"  all of them: {out / 'unreadable.jsonl'}")
