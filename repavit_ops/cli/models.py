"""``repavit-ops models``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .common import plain_errors


def models(
    words: Annotated[list[str] | None, typer.Argument(help="Only names that hold each of these: repa vit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models by name: parameters and GMACs of one image of 224 pixels, as they are trained."""
    import torch

    from ..models import complexity, create_model, list_models

    with plain_errors():
        names = [name for name in list_models() if all(word in name for word in words or ())]
        if not names:
            raise ValueError(f"no model's name holds {' and '.join(words or ())}; repavit-ops models lists all")
    rows = []
    for name in names:
        with torch.device("meta"):
            size = complexity(create_model(name))
        rows.append({"name": name, "params": size.params, "macs": size.macs})
        if not as_json:
            typer.echo(f"{name:<{max(map(len, names))}}  {size.mparams:7.2f} M parameters  {size.gmacs:7.2f} GMACs")
    if as_json:
        print(json.dumps(rows, indent=2))
