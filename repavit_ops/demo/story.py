"""The demo from beginning to end: train, merge, fuse, prove, time, show."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from ..fusing import fuse, reparameterize
from ..info import collect
from ..models import complexity, create_model
from ..verification import verify
from . import report
from .digits import IMAGE, load_digits
from .networks import Network, networks
from .results import DigitsRow, LargeRow, Results
from .throughput import measure
from .training import Epoch, ImageSet, Recipe, accuracy_of, one_thread, predict, train


class DemoFailure(Exception):
    """The demo did not show what it is there to show; says what."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the demo. The defaults take two to four minutes on two cores.

    Attributes:
        recipe: of the training. dim, layers, branches, idle_ratio: of the small ViTs.
        least_accuracy: share of held-out digits that each of them must get right.
        batch: digits in each timed call. checked: held-out digits that ``verify`` compares block by block.
        large: names of models timed at ``large_size`` pixels with random weights, without ``repa_`` or ``vanilla_``.
        batches: their batch sizes. seconds: spent on each timing.
    """

    recipe: Recipe = field(default_factory=Recipe)
    dim: int = 48
    layers: int = 12
    branches: int = 4
    idle_ratio: float = 0.75
    least_accuracy: float = 0.96
    batch: int = 64
    checked: int = 128
    large: tuple[str, ...] = ("deit_tiny", "deit_small")
    large_size: int = 224
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 5.0


def run(out: Path, *, seed: int = 0, plan: Plan | None = None, console: Console | None = None) -> Results:
    """Run the demo and write ``demo-<date>.png`` and ``.json`` into ``out``.

    Raises:
        DemoFailure: a model learnt too little, a prediction changed by merging or fusing, or ``verify`` failed.
        OSError: ``out`` cannot be written.
    """
    plan, console = plan or Plan(), console or Console()
    out.mkdir(parents=True, exist_ok=True)
    console.rule("1  Train on real handwritten digits, merge, fuse")
    digits = load_digits(seed)
    results = Results(collect(), seed, len(digits.test_labels), plan.batch)
    console.print(
        f"{len(digits.train_labels):,} images of {IMAGE}x{IMAGE} to learn from, {len(digits.test_labels)} held out"
    )
    models = networks(plan.dim, plan.layers, plan.branches, plan.idle_ratio, seed)
    results.made_of = {network.name: network.made_of for network in models}
    results.courses = _train_all(models, digits, plan, seed, console)
    forms = {network.name: _forms(network.model) for network in models}
    results.digits = [row for name in forms for row in _digits_rows(name, forms[name], digits, plan)]
    results.samples = _samples(forms, digits)
    _time_digits(forms, digits, plan, results, console)
    report.show_digits(results, console)

    console.rule(f"2  Large models at {plan.large_size} pixels, random weights")
    for name in plan.large:
        results.large += _large_rows(name, plan, console)
    report.show_large(results, console)

    path = out / f"demo-{datetime.date.today().isoformat()}"
    report.write_json(results, path.with_suffix(".json"))
    report.plot(results, path.with_suffix(".png"))
    console.print(f"wrote {path.with_suffix('.png')} and {path.with_suffix('.json')}", soft_wrap=True, highlight=False)
    _require(results, plan)
    console.print("[bold green]predictions before = after, every model verified against float64")
    return results


# --- the digits -------------------------------------------------------------------------------------------------------


def _train_all(
    models: list[Network], digits: ImageSet, plan: Plan, seed: int, console: Console
) -> dict[str, list[Epoch]]:
    """Train one after the other under progress bars; name → course."""
    courses = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with one_thread(), Progress(*columns, console=console, refresh_per_second=4) as progress:
        tasks = [progress.add_task(f"{n.name:<8}", total=plan.recipe.epochs, start=False, state="") for n in models]
        for network, task in zip(models, tasks, strict=True):
            progress.start_task(task)

            def show(epoch: Epoch, task: TaskID = task) -> None:
                alpha = "" if epoch.alpha is None else f"  α {epoch.alpha:.2f}"
                state = f"loss {epoch.loss:.2f}  held-out {epoch.accuracy:6.1%}{alpha}"
                progress.update(task, advance=1, state=state)

            courses[network.name] = train(network.model, digits, plan.recipe, seed, show)
    return courses


def _forms(model: nn.Module) -> dict[str, nn.Module]:
    """Form → model: as trained, merged (where there is something to merge) and fused."""
    merged = reparameterize(model)
    forms = {"trained": model, "merged": merged, "fused": fuse(model)}
    if merged.state_dict().keys() == model.state_dict().keys():
        del forms["merged"]
    return forms


def _digits_rows(name: str, forms: dict[str, nn.Module], digits: ImageSet, plan: Plan) -> Iterator[DigitsRow]:
    before = predict(forms["trained"], digits.test_images)
    for form, model in forms.items():
        after = predict(model, digits.test_images)
        size = complexity(model, IMAGE, in_chans=1)
        check = None if form == "trained" else verify(forms["trained"], model, digits.test_images[: plan.checked])
        yield DigitsRow(
            model=name,
            form=form,
            accuracy=accuracy_of(after, digits.test_labels),
            params=size.params,
            macs=size.macs,
            changed=int((after != before).sum()),
            check=check,
        )


def _samples(
    forms: dict[str, dict[str, nn.Module]], digits: ImageSet, count: int = 10
) -> list[tuple[Tensor, int, int]]:
    """Some held-out images, and what RePaViT says of each as trained and as fused."""
    images = digits.test_images[:count]
    before, after = (predict(forms["RePaViT"][form], images) for form in ("trained", "fused"))
    return [(image[0], int(b), int(a)) for image, b, a in zip(images, before, after, strict=True)]


def _time_digits(
    forms: dict[str, dict[str, nn.Module]], digits: ImageSet, plan: Plan, results: Results, console: Console
) -> None:
    flat = {f"{name}/{form}": model for name, of in forms.items() for form, model in of.items()}
    with console.status("timing all forms in turns"):
        rates = measure(flat, digits.test_images[: plan.batch], plan.seconds)
    for row in results.digits:
        row.rate = rates[f"{row.model}/{row.form}"]


# --- the large models -------------------------------------------------------------------------------------------------


def _large_rows(name: str, plan: Plan, console: Console) -> Iterator[LargeRow]:
    """Vanilla, merged and fused of one size, checked against each other and then timed in turns."""
    torch.manual_seed(0)
    vanilla = create_model(f"vanilla_{name}", img_size=plan.large_size).eval()
    trained = create_model(f"repa_{name}", img_size=plan.large_size, idle_ratio=plan.idle_ratio).eval()
    forms = {"vanilla": vanilla, "merged": reparameterize(trained), "fused": fuse(trained)}
    with console.status(f"{name}: verifying"):
        image = torch.randn(1, 3, plan.large_size, plan.large_size)
        check = verify(trained, forms["fused"], image)
    sizes = {form: complexity(model, plan.large_size) for form, model in forms.items()}
    for batch in plan.batches:
        with console.status(f"{name}, batch {batch}: timing vanilla, merged and fused in turns"):
            rates = measure(forms, torch.randn(batch, 3, plan.large_size, plan.large_size), plan.seconds)
        for form, rate in rates.items():
            size = sizes[form]
            yield LargeRow(name, form, batch, size.params, size.macs, rate, check if form == "fused" else None)


def _require(results: Results, plan: Plan) -> None:
    problems = []
    for row in results.digits:
        where = f"{row.model}, {row.form}"
        if row.accuracy < plan.least_accuracy:
            problems.append(f"{where}: accuracy {row.accuracy:.1%}, wanted at least {plan.least_accuracy:.0%}")
        if row.changed:
            problems.append(f"{where}: {row.changed} predictions differ from the trained model's")
    checks = [(row.model, row.form, row.check) for rows in (results.digits, results.large) for row in rows]
    for model, form, check in checks:
        if check is not None and not check:
            found = check.output
            problems.append(f"{model}, {form}: error {found.max_abs:.1e}, allowed {found.bound:.1e}")
    if problems:
        raise DemoFailure("; ".join(problems))
