"""The command ``repavit-ops``: info, convert, verify, tune, idle, demo.

Nothing heavy is imported above the commands, so that ``--help`` and completion stay quick. A mistake of the user's is
one line on stderr and exit status 2; a failed check is exit status 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.etree import ElementTree

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .idling.command import Outcome
    from .report import FusionReport
    from .verification import VerificationReport

app = typer.Typer(
    name="repavit-ops",
    help="Train, merge, fuse and verify reparameterized Vision Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED, USAGE = 1, 2  # exit statuses; 0 is success
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Layout(str, Enum):
    """Keys of a written checkpoint."""

    native = "native"
    authors = "authors"


class Form(str, Enum):
    """What becomes of the candidate in front of a comparison."""

    as_is = "as-is"
    merged = "merged"
    fused = "fused"


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what the library raises for bad input into one line on stderr and exit status 2."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(str(error).strip())}")
        raise typer.Exit(USAGE) from error


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


# --- info -------------------------------------------------------------------------------------------------------------


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, the CPU level, GPUs, and each backend or the reason that it is missing."""
    from . import info as installation

    collected = installation.collect()
    if as_json:
        print(json.dumps(collected, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, state in installation.rows(collected):
        table.add_row(f"[bold]{name}[/]", _escaped(state))
    Console(soft_wrap=True).print(table)


# --- convert ----------------------------------------------------------------------------------------------------------


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Checkpoint: .pth, .pt or .safetensors.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; its suffix chooses the format.")],
    idle_ratio: Annotated[
        str | None, typer.Option(help="θ that a training checkpoint was trained with; one, or one per block: 0.5,0.75.")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads, which a ViT's shapes do not tell.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file of the authors' constructor arguments.")] = None,
    layout: Annotated[Layout, typer.Option(help="Keys to write: ours, or the authors'.")] = Layout.native,
) -> None:
    """Merge a training checkpoint into its deployed form, or rewrite a deployed one, in either layout."""
    with plain_errors():
        from .fusing import reparameterize
        from .models import complexity
        from .models.checkpoints import load_checkpoint, save_checkpoint
        from .models.patch_embed import image_of

        model = load_checkpoint(source, _read_config(config), **_overrides(idle_ratio, num_heads))
        image, channels = image_of(model)
        before = complexity(model, image, in_chans=channels)
        merged = reparameterize(model)
        save_checkpoint(merged, target, layout.value)
        after = complexity(merged, image, in_chans=channels)
    console = Console(soft_wrap=True)
    counts = _training_forms(model)
    what = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing (already in deployed form)"
    console.print(f"merged      {what}")
    console.print(f"parameters  {before.params:,} → {after.params:,}  ({after.params / before.params - 1:+.1%})")
    console.print(f"GMACs       {before.gmacs:.3f} → {after.gmacs:.3f}  ({after.macs / before.macs - 1:+.1%})")
    console.print(f"wrote       {_escaped(str(target))}  ({layout.value} layout)")


def _read_config(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--config: {path} is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config: {path} holds a {type(config).__name__}, wanted an object of constructor arguments")
    return config


def _overrides(idle_ratio: str | None, num_heads: int | None) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if idle_ratio is not None:
        try:
            ratios = [float(part) for part in idle_ratio.split(",")]
        except ValueError as error:
            raise ValueError(f"--idle-ratio: got {idle_ratio!r}, wanted 0.75, or one per block: 0.5,0.75,…") from error
        overrides["idle_ratio"] = ratios[0] if len(ratios) == 1 else ratios
    if num_heads is not None:
        overrides["num_heads"] = num_heads
    return overrides


def _training_forms(model: nn.Module) -> dict[str, int]:
    """How many modules of each training form a model holds."""
    from .fusing import TRAINING_FORMS

    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, TRAINING_FORMS):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return counts


# --- verify -----------------------------------------------------------------------------------------------------------


@app.command()
def verify(
    reference: Annotated[str, typer.Argument(metavar="A", help="The model that is right; see below.")],
    candidate: Annotated[str, typer.Argument(metavar="B", help="The model to check.")],
    form: Annotated[Form, typer.Option(help="Compare B as it is, merged, or merged and fused.")] = Form.as_is,
    dtype: Annotated[str, typer.Option(help=f"Cast B: {', '.join(DTYPES)}; default its own.")] = "",
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
    off in B's dtype, plus 1e-6. --form fused --dtype bfloat16 compares what would be deployed.
    """
    with plain_errors():
        import torch

        from .models.patch_embed import image_of
        from .verification import verify as compare

        if dtype and dtype not in DTYPES:
            raise ValueError(f"--dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
        arguments, overrides = _read_config(config), _overrides(idle_ratio, num_heads)
        right, other = (_model(source, arguments, overrides, seed) for source in (reference, candidate))
        checked, fusion = _candidate(other, form, getattr(torch, dtype) if dtype else None)
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
        console.print(f"B: {len(fusion.fused)} fused, {len(fusion.skipped)} skipped; {_escaped(fusion.runs_on)}")
    console.print(_escaped(str(report)))
    if not report:
        raise typer.Exit(FAILED)


def _model(source: str, config: dict[str, Any] | None, overrides: dict[str, Any], seed: int) -> nn.Module:
    """The model that an argument of verify means: FILE, NAME or NAME=FILE; in evaluation mode."""
    import torch

    from .models import create_model, list_models
    from .models.checkpoint_files import read_checkpoint
    from .models.checkpoints import load_checkpoint

    name, _, path = source.partition("=")
    if name not in list_models():
        if not Path(source).suffix:
            create_model(name)  # raises with the names that are close
        if "model" in read_checkpoint(source).config:  # it describes itself; the arguments are for the other one
            return load_checkpoint(source)
        return load_checkpoint(source, config, **overrides)
    torch.manual_seed(seed)
    model = create_model(name, **{k: v for k, v in {**(config or {}), **overrides}.items() if v is not None})
    if path:
        try:
            model.load_state_dict(read_checkpoint(path).state)
        except RuntimeError as error:
            raise ValueError(f"{path}: is no checkpoint of {name}: {error}") from error
    return model.eval()


def _candidate(model: nn.Module, form: Form, dtype: torch.dtype | None) -> tuple[nn.Module, FusionReport | None]:
    """The candidate in the form that is asked for, and what fused where."""
    from .fusing import fuse, reparameterize
    from .report import fusion_report

    if form is Form.fused:
        model = fuse(model, dtype=dtype)
        return model, fusion_report(model)
    if form is Form.merged:
        model = reparameterize(model)
    return (model if dtype is None else model.to(dtype)), None


def junit_xml(report: VerificationReport, name: str) -> str:
    """A JUnit test suite: one case per block and one for the output.

    The output decides. Where it holds, a block beyond its own bound counts as skipped, not as a failure.
    """
    rows = [*report.blocks, report.output]
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


# --- tune -------------------------------------------------------------------------------------------------------------


@app.command()
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

        from . import backends

        if (reason := backends.why_unavailable("triton")) is not None:
            raise RuntimeError(f"nothing to tune: {reason}")
        if wrong := [name for name in dtype if name not in DTYPES[:3]]:
            raise ValueError(f"--dtype: got {wrong[0]!r}, wanted one of {', '.join(DTYPES[:3])}")
        from .kernels import tuner, tuning

        gpu = torch.device(device)
        folder = out or tuning.folders()[0]
        products = set[tuning.Product]()
        for name in model:
            for kind in dtype:
                products |= _products_of(name, batch, getattr(torch, kind), gpu)
        console = Console(soft_wrap=True, highlight=False)
        with torch.cuda.device(gpu):
            for measured in tuner.tune(products, gpu, folder, again=again, processes=jobs):
                console.print(_escaped(str(measured)))
        console.print(f"wrote {_escaped(str(tuning.table_path(tuner.chip_of(gpu).name, folder)))}")


def _products_of(name: str, batches: list[int], dtype: torch.dtype, device: torch.device) -> set[Any]:
    """Every product that a registered model looks up when it runs fused."""
    import torch

    from .fusing import fuse
    from .kernels import tuning
    from .models import create_model
    from .models.patch_embed import image_of

    fused = fuse(create_model(name).eval(), dtype=dtype).to(device)
    image, channels = image_of(fused)
    with tuning.recording() as products, torch.inference_mode():
        for batch in batches:
            fused(torch.randn(batch, channels, *image, device=device).to(dtype))
    return products


# --- idle -------------------------------------------------------------------------------------------------------------


@app.command()
def idle(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="dinov2-small, a timm name, NAME=FILE, or a file.")],
    data: Annotated[Path, typer.Option(help="Folder of photos; a fifth of them only tests.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors, .pth or .pt.")],
    idle_ratio: Annotated[str, typer.Option(help="θ of every block, or one per block: 0.5,0.75,…")] = "0.5",
    allocate: Annotated[bool, typer.Option("--allocate", help="Spend θ's FLOPs by measured sensitivity.")] = False,
    crops: Annotated[int, typer.Option(min=1, help="Calibration crops of each photo.")] = 4,
    steps: Annotated[int, typer.Option(min=0, help="Gradient steps of each block; 0: closed form alone.")] = 200,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a crop in the fit; default all.")] = None,
    fresh: Annotated[int, typer.Option("--distill", min=0, help="Then distill on that many other crops of each.")] = 0,
    img_size: Annotated[int | None, typer.Option(help="Pixels of the side; default the model's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the photos' split, crops and tokens.")] = 0,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a plot (.png, .svg).")] = None,
) -> None:
    """Turn a pretrained ViT into a deployed channel-idle one without labels; report what it keeps and gains.

    This loses accuracy: the report's cosines and top-1 agreement, on photos that took no part, say how much.
    """
    with plain_errors():
        from .idling import command

        ratios = _overrides(idle_ratio, None)["idle_ratio"]
        pretrained = command.load(model, img_size)
        settings = {"crops": crops, "steps": steps, "tokens": tokens, "distill": fresh, "batch": batch, "seed": seed}
        outcome = command.run(pretrained, data, out, ratios, allocate=allocate, **settings)  # type: ignore[arg-type]
        if picture is not None:
            command.plot(outcome, picture, f"{model}, θ = {idle_ratio}")
        if as_json is not None:
            text = json.dumps({"model": model, "idle_ratio": ratios, **settings, **outcome.to_dict()}, indent=2) + "\n"
            sys.stdout.write(text) if as_json == "-" else Path(as_json).write_text(text)
    _tell(outcome, out, Console(stderr=as_json == "-", soft_wrap=True, highlight=False))


def _tell(outcome: Outcome, out: Path, console: Console) -> None:
    table = Table("block", "active", "of", "unexplained", "cosine", box=None, padding=(0, 2, 0, 0))
    for block in outcome.blocks:
        cosine = outcome.fidelity.blocks.get(block.name)
        numbers = ["left as it is", ""] if cosine is None else [f"{block.unexplained:.2%}", f"{cosine:.4f}"]
        table.add_row(_escaped(block.name), str(block.act_channels), str(block.hidden), *numbers)
    console.print(table)
    for label, kept in (("undistilled", outcome.undistilled), ("result", outcome.fidelity)):
        if kept is not None:
            token = "" if kept.class_token is None else f", class token {kept.class_token:.4f}"
            top1 = "" if kept.top1 is None else f", top-1 agreement {kept.top1:.1%}"
            console.print(f"{label:<12}cosine of patches {kept.patches:.4f}{token}{top1} on {kept.images} other photos")
    before, after, speed = outcome.before, outcome.after, outcome.speed
    console.print(f"parameters  {before.params:,} → {after.params:,}  ({after.params / before.params - 1:+.1%})")
    console.print(f"GMACs       {before.gmacs:.3f} → {after.gmacs:.3f}  ({after.macs / before.macs - 1:+.1%})")
    rates = f"{speed.original:.1f} → {speed.idled:.1f}  ({speed.gain:.2f}x)"
    console.print(f"images/s    {rates}, both fused, {speed.threads} threads, {speed.batch} at once")
    console.print(f"wrote       {_escaped(str(out))}")


# --- demo -------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plot and the JSON.")] = Path("demo_out"),
    seed: Annotated[int, typer.Option(help="Seed of split, weights and batches.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs; default: what reaches 96 %.")] = None,
) -> None:
    """Train, merge, fuse and verify on real handwritten digits, then time the large models (2 to 4 minutes)."""
    with plain_errors():
        try:
            from .demo import DemoFailure, Plan, Recipe, run
        except ModuleNotFoundError as error:
            raise ImportError(f"the demo needs {error.name}: pip install 'repavit-ops[demo]'") from error
    try:
        with plain_errors():
            run(out, seed=seed, plan=Plan() if epochs is None else Plan(recipe=Recipe(epochs=epochs)))
    except DemoFailure as failure:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]demo failed:[/] {_escaped(str(failure))}")
        raise typer.Exit(FAILED) from failure
