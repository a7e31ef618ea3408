"""The demo in small: it runs from end to end, writes what it promises, and fails where it must."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo needs scikit-learn: pip install 'repavit-ops[demo]'")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib: pip install 'repavit-ops[demo]'")

from rich.console import Console

from repavit_ops.demo import DemoFailure, Plan, Recipe, report, run, story, training
from repavit_ops.demo.digits import load_digits, shifted
from repavit_ops.demo.networks import sine_positions
from repavit_ops.demo.results import DigitsRow, LargeRow, Results
from repavit_ops.demo.throughput import Rate, measure
from repavit_ops.info import collect

SMALL = Plan(
    recipe=Recipe(epochs=2, batch=256),
    dim=16,
    layers=4,
    branches=2,
    least_accuracy=0.0,
    large=("deit_tiny",),
    large_size=32,
    batch=8,
    checked=16,
    batches=(1,),
    seconds=0.0,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models wait for each other's threads more than they compute."""
    with training.one_thread():
        yield


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "console.txt").open("w") as file:
        yield Console(file=file, width=80)


def test_the_demo_runs_and_writes_plot_and_json(tmp_path, console):
    results = run(tmp_path / "out", plan=SMALL, console=console)
    assert {(row.model, row.form) for row in results.digits} == {
        ("vanilla", "trained"),
        ("vanilla", "fused"),
        *((model, form) for model in ("RePaViT", "joined") for form in ("trained", "merged", "fused")),
    }
    assert all(row.changed == 0 and row.rate is not None and row.rate.median > 0 for row in results.digits)
    assert all(row.check is not None and row.check.passed for row in results.digits if row.form != "trained")
    (plot,), (data,) = (list((tmp_path / "out").glob(f"demo-*.{suffix}")) for suffix in ("png", "json"))
    assert plot.stat().st_size > 20_000
    written = json.loads(data.read_text())
    assert written["digits"][0]["accuracy"] == results.digits[0].accuracy
    assert written["training"]["joined"][-1]["number"] == 2
    assert written["training"]["joined"][-1]["alpha"] == 1.0
    console.file.flush()
    assert "RePaViT" in (tmp_path / "console.txt").read_text()


def test_tables_fit_80_characters(tmp_path, console):
    rate = Rate(12_345.6, 12_000.0, 12_500.0)
    forms = ("vanilla", "merged", "fused")
    results = Results(collect(), seed=0, held_out=360, batch=64)
    results.large = [LargeRow("deit_small", form, 128, 22_050_664, 4_255_000_000, rate, None) for form in forms]
    results.digits = [DigitsRow("RePaViT", "trained", 0.98765, 351_866, 5_900_000, 360, None, rate)]
    report.show_large(results, console)
    report.show_digits(results, console)
    console.file.flush()
    text = (tmp_path / "console.txt").read_text()
    assert "22.1→22.1" in text
    assert "…" not in text


def test_the_demo_fails_if_a_model_learnt_too_little(tmp_path, console):
    plan = dataclasses.replace(SMALL, large=(), least_accuracy=0.999)
    with pytest.raises(DemoFailure, match=r"RePaViT, trained: accuracy .* wanted at least 100%"):
        run(tmp_path, plan=plan, console=console)


def test_the_demo_fails_if_merging_changes_predictions(tmp_path, console, monkeypatch):
    def wrong(model):
        merged = right(model)
        with torch.no_grad():
            merged.head.bias.add_(torch.arange(10.0))
        return merged

    right = story.reparameterize
    monkeypatch.setattr(story, "reparameterize", wrong)
    with pytest.raises(DemoFailure, match=r"RePaViT, merged: \d+ predictions differ.*RePaViT, merged: error"):
        run(tmp_path, plan=dataclasses.replace(SMALL, large=()), console=console)


def test_digits_are_split_by_class_and_seed():
    a, b, other = load_digits(0), load_digits(0), load_digits(1)
    assert len(a.train_labels) + len(a.test_labels) == 1797
    assert torch.equal(a.test_images, b.test_images)
    assert not torch.equal(a.test_images, other.test_images)
    assert torch.bincount(a.test_labels).min() >= 34
    assert (a.train_images == a.augment.keywords["blank"]).any()
    assert a.train_images.min() == pytest.approx(a.augment.keywords["blank"])


def test_shifting_moves_images_by_at_most_one_pixel_and_keeps_others():
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1) + 1
    generator = torch.Generator().manual_seed(0)
    moved = shifted(images, generator, blank=0.0, probability=0.5)
    padded = torch.nn.functional.pad(images[:1], (1, 1, 1, 1))
    windows = [padded[0, 0, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    seen = {next(i for i, window in enumerate(windows) if torch.equal(image[0], window)) for image in moved}
    assert seen == set(range(9))
    assert torch.equal(shifted(images, generator, blank=0.0, probability=0.0), images)


def test_the_rate_ends_at_zero():
    recipe = Recipe()
    assert recipe.learning_rate(1.0) == 0.0
    assert max(recipe.learning_rate(p / 100) for p in range(101)) <= recipe.lr


def test_positions_tell_patches_apart():
    positions = sine_positions(4, 16)
    assert positions.shape == (16, 16)
    assert torch.pdist(positions).min() > 0.1


def test_rates_are_ordered_and_every_model_is_timed():
    rates = measure({"a": torch.nn.Identity(), "b": torch.nn.Linear(8, 8)}, torch.ones(4, 8), seconds=0.0)
    assert set(rates) == {"a", "b"}
    assert all(0 < rate.p20 <= rate.median <= rate.p80 for rate in rates.values())


def test_the_core_never_imports_the_demo():
    code = "import sys, repavit_ops; print([m for m in sys.modules if m.startswith(('repavit_ops.demo', 'sklearn'))])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
