"""``repavit-ops idle``: photos and a model in, a file, a report and a plot out; and the report's own numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from model_helpers import images, tiny_vit
from typer.testing import CliRunner

import repavit_ops
from repavit_ops.cli import app
from repavit_ops.idling import fidelity, speed
from repavit_ops.idling.folder import Crops, Preprocessing, photos_in

VANILLA = {"idle_ratio": None, "act_channels": None}
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture
def photos(tmp_path):
    """Ten pictures of noise, in a folder and one below it."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(10):
        pixels = rng.integers(0, 255, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if index % 2 else "") / f"{index}.png")
    (folder / "notes.txt").write_text("no photo")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["idle", *map(str, arguments)])


def test_it_writes_a_deployed_model_a_report_and_a_plot(photos, tmp_path):
    pytest.importorskip("matplotlib")
    repavit_ops.save_checkpoint(tiny_vit(**VANILLA), tmp_path / "vanilla.pth")
    out, report, plot = (tmp_path / name for name in ("idled.safetensors", "report.json", "plot.png"))
    result = run(
        tmp_path / "vanilla.pth", "--data", photos, "--idle-ratio", "0.5,0.75", "--out", out,
        "--crops", 1, "--steps", 5, "--distill", 2, "--json", report, "--plot", plot,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "cosine of patches" in result.output
    told = json.loads(report.read_text())
    assert [block["act_channels"] for block in told["blocks"]] == [96, 48]
    assert told["fidelity"]["images"] == 2  # every fifth photo
    assert told["undistilled"]["patches"] > 0.5
    assert told["fidelity"]["patches"] != told["undistilled"]["patches"]
    assert 0 <= told["fidelity"]["top1"] <= 1
    assert told["images_per_second"]["gain"] > 0
    assert told["macs"][1] < told["macs"][0]
    assert plot.stat().st_size > 1000
    model = repavit_ops.load_checkpoint(out)
    assert [block.mlp.act_channels for block in model.blocks] == [96, 48]


def test_a_timm_model_comes_from_its_weights(timm, photos, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    out = tmp_path / "idled.safetensors"
    result = run(
        f"vit_tiny_patch16_224={tmp_path / 'timm.pth'}", "--data", photos, "--out", out,
        "--img-size", 32, "--crops", 1, "--steps", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    again = repavit_ops.load_checkpoint(out)
    assert again.head.out_features == 3
    assert again(images(1, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no_such_model",), "wanted dinov2-small, a file ending in"),
        (("no_such_file.pth",), "no_such_file.pth"),
        (("{model}", "--idle-ratio", "half"), "--idle-ratio: got 'half'"),
        (("{model}", "--idle-ratio", "2"), "wanted a share of channels"),
        (("{model}", "--data", "{empty}"), "got 0 photos"),
        (("{model}", "--data", "{empty}/none"), "wanted a folder"),
    ],
)
def test_mistakes_are_one_line(timm, photos, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    repavit_ops.save_checkpoint(tiny_vit(**VANILLA), tmp_path / "vanilla.pth")
    known = {"model": tmp_path / "vanilla.pth", "empty": tmp_path / "empty"}
    result = run("--data", photos, "--out", tmp_path / "out.pth", *(part.format(**known) for part in arguments))
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert not (tmp_path / "out.pth").exists()


def test_photos_are_split_once_and_crops_drawn_anew(photos):
    calibrating, tested = photos_in(photos, seed=0)
    assert (len(calibrating), len(tested)) == (8, 2)
    assert not set(calibrating) & set(tested)
    assert photos_in(photos, seed=0) == (calibrating, tested)
    crops = Crops(calibrating, Preprocessing((32, 24)), 2, 5, seed=0)
    first, second = (torch.cat(list(crops)) for _ in range(2))
    assert first.shape == second.shape == (16, 3, 32, 24)
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.cat(list(Crops(calibrating, Preprocessing((32, 24)), 2, 5, seed=0))))


def test_fidelity_of_a_model_with_itself_is_one_and_falls_with_damage():
    model = tiny_vit(**VANILLA)
    idled = repavit_ops.idle_pretrained(model, [images(8)], 0.5, steps=0, progress=False)
    same = fidelity(idled, idled, [images(4), images(3, seed=2)])
    assert (same.images, same.top1) == (7, 1.0)
    assert [*same.blocks] == ["blocks.0", "blocks.1"]
    assert min(same.patches, same.class_token, *same.blocks.values()) > 1 - 1e-6
    with torch.no_grad():
        idled.blocks[1].mlp.w_out.mul_(-2)
    worse = fidelity(model, idled, [images(4)])
    assert worse.blocks["blocks.0"] > 0.9
    assert worse.blocks["blocks.1"] < 0.9
    assert speed(model, idled, images(2), rounds=1).gain > 0
