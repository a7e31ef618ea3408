"""examples/digits: its pictures are split without overlap, runs are kept and not repeated, tables add up."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the example needs scikit-learn")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits"


@pytest.fixture
def example(monkeypatch):
    """Imports a module of the example."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    names = ("configurations", "photographs", "run", "tables")
    yield lambda name: pytest.importorskip(name, reason=f"{name}.py needs scikit-image")
    for name in names:
        sys.modules.pop(name, None)


def test_held_out_photographs_share_no_pixel_with_training(example, monkeypatch):
    photographs = example("photographs")
    cell = photographs.CELL
    pixels = torch.arange(4.0 * cell * 5 * cell).view(4 * cell, 5 * cell)  # every pixel is told by its value
    monkeypatch.setattr(photographs, "photographs", lambda: [pixels.numpy(), -1 - pixels.numpy()])
    monkeypatch.setattr(photographs, "standardised", lambda patches: patches)
    data = photographs.load_photographs(0)
    seen = photographs.random_patches(data.train_images, torch.Generator().manual_seed(0))
    assert seen.shape[1:] == data.test_images.shape[1:] == (1, photographs.IMAGE, photographs.IMAGE)
    assert (len(data.train_images), len(data.test_images)) == (32, 4 * 8)
    assert not set(data.train_images.flatten().tolist()) & set(data.test_images.flatten().tolist())
    assert set(seen.flatten().tolist()) <= set(data.train_images.flatten().tolist())
    for images, labels in ((seen, data.train_labels), (data.test_images, data.test_labels)):
        assert ((images.amax((1, 2, 3)) < 0).long() == labels).all()


def test_photographs_are_those_that_the_packages_install(example):
    photographs = example("photographs")
    data = photographs.load_photographs(0)
    assert set(data.train_labels.tolist()) == set(data.test_labels.tolist()) == set(range(len(photographs.NAMES)))
    assert data.test_images.mean((1, 2, 3)).abs().max() < 1e-4


def test_a_run_is_written_once(example, monkeypatch, tmp_path, capsys):
    run, configurations = example("run"), example("configurations")
    task = dataclasses.replace(
        configurations.TASKS["digits"], recipe=dataclasses.replace(configurations.TASKS["digits"].recipe, epochs=1)
    )
    monkeypatch.setitem(run.TASKS, "digits", task)
    monkeypatch.setattr(run, "CONFIGURATIONS", {name: run.CONFIGURATIONS[name] for name in ("vanilla 3", "joined 3")})
    monkeypatch.setattr(sys, "argv", ["run.py", "--tasks", "digits", "--seeds", "1", "--out", str(tmp_path)])
    run.main()
    rows = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert [row["configuration"] for row in rows] == ["vanilla 3", "joined 3"]
    assert all(row["predictions_changed"] == 0 and row["accuracy"] == row["accuracy_merged"] for row in rows)
    assert rows[1]["params"][1] < rows[1]["params"][0]
    run.main()
    assert len((tmp_path / "digits.jsonl").read_text().splitlines()) == 2


def test_tables_give_mean_spread_and_paired_differences(example):
    tables = example("tables")
    rows = [
        {"configuration": name, "seed": seed, "accuracy_merged": value, "params": [2e6, 1e6], "macs": [3e6, 2e6]}
        for name, values in (("a", (0.5, 0.7)), ("b", (0.6, 0.8)))
        for seed, value in enumerate(values)
    ]
    assert tables.table(rows, ("a", "b"))[2:] == [
        "| a | 2 | 60.0 ± 14.1 |  | 2.000 → 1.000 | 2.00 |",
        "| b | 2 | 70.0 ± 14.1 | 10.0 ± 0.0 | 2.000 → 1.000 | 2.00 |",
    ]


def test_the_readme_holds_the_tables_of_the_results(example):
    tables = example("tables")
    assert all(len(rows) >= 3 * 14 for rows in tables.read(EXAMPLE / "results").values())  # 14 configurations
    assert tables.document(EXAMPLE / "results") in (EXAMPLE / "README.md").read_text()
