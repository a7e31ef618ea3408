"""``repavit-ops verify``: a report on screen, as JSON and as JUnit XML."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.etree import ElementTree

import typer
from rich.console import Console
from rich.markup import escape

from .common import DTYPES, FAILED, fresh_model, overrides_of, plain_errors, read_config

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..fusing import FusionReport
    from ..verification import VerificationReport


class Form(str, Enum):
    """What becomes of the candidate in front of a comparison."""

    as_is = "as-is"
    merged = "merged"
    fused = "fused"


def verify(
    reference: Annotated[str, typer.Argument(metavar="A", help="The model that is right; see below.")],
    candidate: Annotated[str, typer.Argument(metavar="B", help="The model to check.")],
    form: Annotated[Form, typer.Option(help="Compare B as it is, merged, or merged and fused.")] = Form.as_is,
    dtype: Annotated[str, typer.Option(help=f"Cast B: {', '.join(DTYPES)}; default its own.")] = "",
    quantize: Annotated[str, typer.Option(help="With --form fused: none, or int8 for products in int8.")] = "none",
    idle_ratio: Annotated[
        str | None, typer.Option(help="θ of training checkpoints in the authors' keys, as in convert.")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads, as in convert.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON of constructor arguments, as in convert.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Pixels of the inputs' side; default A's own size.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of random images.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the images and of weights that no file gives.")] = 0,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JUnit XML.")] = None,
) -> None:
    """Check that two models compute the same; exit status 1 if they do not.

    A and B are each a checkpoint file, a name of the registry (random weights from --seed), or NAME=FILE: the named
    model with the weights of a file in its own keys. The truth is A in float64; B may be off by twice what A itself is
    off in B's dtype, plus 1e-6. --form fused --dtype bfloat16 compares what would be deployed. Of --quantize int8 every
    block's and output's cosine with the truth must be at least 0.99 instead.
    """
    with plain_errors():
        import torch

        from ..models.patch_embed import image_of
        from ..verification import verify as compare

        if quantize != "none" and form is not Form.fused:
            raise ValueError(f"--quantize: got {quantize} with --form {form.value}, wanted --form fused")
        if dtype and dtype not in DTYPES:
            raise ValueError(f"--dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
        arguments, overrides = read_config(config), overrides_of(idle_ratio, num_heads)
        right, other = (_model(source, arguments, overrides, seed) for source in (reference, candidate))
        checked, fusion = _candidate(other, form, getattr(torch, dtype) if dtype else None, quantize)
        image, channels = image_of(right)
        size = (img_size, img_size) if img_size is not None else image
        inputs = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))
        report = compare(right, checked, inputs)
        if as_json is not None:
            text = json.dumps({"reference": reference, "candidate": candidate, **report.to_dict()}, indent=2)
            sys.stdout.write(text + "\n") if as_json == "-" else Path(as_json).write_text(text + "\n")
        if junit is not None:
            junit.write_text(junit_xml(report, f"{reference} = {candidate}"))
    console = Console(stderr=as_json == "-", soft_wrap=True, highlight=False)
    if fusion is not None:
        console.print(f"B: {len(fusion.fused)} fused, {len(fusion.skipped)} skipped; {escape(fusion.runs_on)}")
    console.print(escape(str(report)))
    if not report:
        raise typer.Exit(FAILED)


def _model(source: str, config: dict[str, Any] | None, overrides: dict[str, Any], seed: int) -> nn.Module:
    """The model that an argument of verify means: FILE, NAME or NAME=FILE; in evaluation mode."""
    import torch

    from ..checkpoints import load_checkpoint
    from ..checkpoints.files import read_checkpoint
    from ..models import create_model, list_models

    name, _, path = source.partition("=")
    if name not in list_models():
        if not Path(source).suffix:
            create_model(name)  # raises with the names that are close
        if "model" in read_checkpoint(source).config:  # it describes itself; the arguments are for the other one
            return load_checkpoint(source)
        return load_checkpoint(source, config, **overrides)
    torch.manual_seed(seed)
    model = fresh_model(name, {k: v for k, v in {**(config or {}), **overrides}.items() if v is not None})
    if path:
        try:
            model.load_state_dict(read_checkpoint(path).state)
        except RuntimeError as error:
            raise ValueError(f"{path}: is no checkpoint of {name}: {error}") from error
    return model


def _candidate(
    model: nn.Module, form: Form, dtype: torch.dtype | None, quantize: str
) -> tuple[nn.Module, FusionReport | None]:
    """The candidate in the form that is asked for, and what fused where."""
    from ..fusing import fuse, fusion_report, reparameterize
    from ..nn.given import cast_real

    if form is Form.fused:
        model = fuse(model, dtype=dtype, quantize=quantize)
        return model, fusion_report(model)
    if form is Form.merged:
        model = reparameterize(model)
    return (model if dtype is None else cast_real(model, dtype)), None


def junit_xml(report: VerificationReport, name: str) -> str:
    """A JUnit test suite: one case per block and one for the output.

    The output decides. Where it holds, a block beyond its own bound counts as skipped, not as a failure.
    """
    rows = [*report.blocks, *report.outputs]
    beyond = [row for row in rows if not row.passed]
    failures = 0 if report.passed else len(beyond)
    suite = ElementTree.Element(
        "testsuite",
        name=name,
        tests=str(len(rows)),
        failures=str(failures),
        errors="0",
        skipped=str(len(beyond) - failures),
    )
    for row in rows:
        case = ElementTree.SubElement(suite, "testcase", classname=f"verify.{report.dtype}", name=row.name)
        numbers = f"max abs {row.max_abs:.3e}, bound {row.bound:.3e}, cosine {row.cosine:.9f}"
        if not row.passed:
            ElementTree.SubElement(case, "skipped" if report.passed else "failure", message=numbers)
        ElementTree.SubElement(case, "system-out").text = numbers
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
