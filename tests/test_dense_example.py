"""examples/dense: detectors and segmentation around a small Swin answer as before when it is merged and fused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import randomise

import repavit_ops
from repavit_ops.models import SwinTransformer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "dense"
MODULES = ("comparing", "models", "picture", "plain_operators", "run")


@pytest.fixture
def example(torchvision_stub, monkeypatch):
    """Imports a module of the example."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: pip install torchvision")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield lambda name: pytest.importorskip(name)
    for name in MODULES:
        sys.modules.pop(name, None)


def small(models, name, **arguments):
    """One of the models around a small Swin in training form, whose statistics are random."""
    config = {"img_size": 64, "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}
    body = randomise(SwinTransformer(**config, idle_ratio=0.75, num_classes=0))
    if name == "upernet":
        pytest.importorskip("transformers")
    models.FPN_CHANNELS, models.HEAD_CHANNELS = 32, 32
    return models.build(name, body, classes=5, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "keys"),
    [
        ("retinanet", {"score_thresh": 0.0, "detections_per_img": 20}, {"boxes", "scores", "labels"}),
        (
            "mask_rcnn",
            {"box_detections_per_img": 20, "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30},
            {"boxes", "scores", "labels", "masks"},
        ),
    ],
)
def test_detectors_find_the_same_merged_and_fused(example, name, arguments, keys):
    run, comparing = example("run"), example("comparing")
    training = small(example("models"), name, **arguments)
    merged = repavit_ops.reparameterize(training)
    fused = repavit_ops.fuse(merged)
    image = torch.rand(3, 72, 104, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, after = run.answer(training.double(), image.double()), run.answer(fused, image)
    assert set(after) == keys
    found = comparing.agreement(before, after)
    assert found.boxes == found.found == 20
    assert run.checked(merged, fused, image)["found"] == 20


def test_logits_of_pixels_are_the_same_merged_and_fused(example):
    run = example("run")
    merged = repavit_ops.reparameterize(small(example("models"), "upernet"))
    fused, image = repavit_ops.fuse(merged), torch.rand(3, 72, 104, generator=torch.Generator().manual_seed(0))
    assert run.checked(merged, fused, image)["logits"] < 1e-5
    assert run.answer(fused, image).shape == (1, 5, 72, 104)


def test_what_is_not_equal_is_not_timed(example):
    run = example("run")
    merged = repavit_ops.reparameterize(small(example("models"), "retinanet", score_thresh=0.0))
    fused = repavit_ops.fuse(merged)
    with torch.no_grad():
        fused.backbone.maps.norms[1].bias.add_(1e-3)
    with pytest.raises(AssertionError, match="differ, and are not timed"):
        run.checked(merged, fused, torch.rand(3, 72, 104))


def test_boxes_are_paired_once_each_and_by_their_label(example):
    comparing = example("comparing")
    one = torch.tensor([[0.0, 0, 10, 10]])
    twice = {"boxes": one.repeat(2, 1), "scores": torch.tensor([0.5, 0.5]), "labels": torch.tensor([1, 1])}
    assert comparing.agreement(twice, {name: each[:1] for name, each in twice.items()}).found == 1
    assert comparing.agreement(twice, {**twice, "labels": torch.tensor([1, 2])}).found == 1
    assert comparing.agreement(twice, {**twice, "scores": torch.tensor([0.5, 0.4])}).found == 1
    assert comparing.agreement(twice, {**twice, "boxes": twice["boxes"] + 1}).found == 0


def test_nms_keeps_the_best_of_those_that_overlap(example):
    plain = example("plain_operators")
    generator = torch.Generator().manual_seed(0)
    corners, scores = torch.rand(60, 2, generator=generator) * 40, torch.rand(60, generator=generator)
    boxes = torch.cat((corners, corners + 5 + torch.rand(60, 2, generator=generator) * 20), 1)
    expected: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        over = sys.modules["torchvision.ops.boxes"].box_iou(boxes[index, None], boxes[expected])
        if not (over > 0.4).any():
            expected.append(index)
    assert plain.nms(boxes, scores, 0.4).tolist() == expected
    assert 5 < len(expected) < 60
    assert plain.nms(boxes[:0], scores[:0], 0.4).tolist() == []


def bilinear(map_, y, x):
    """One sample as Mask R-CNN's RoIAlign takes it."""
    height, width = map_.shape[-2:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return map_[:, 0, 0] * 0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), height - 2), min(int(x), width - 2)
    (a, b), (c, d) = ([map_[:, top + i, left + j] for j in (0, 1)] for i in (0, 1))
    return (a * (left + 1 - x) + b * (x - left)) * (top + 1 - y) + (c * (left + 1 - x) + d * (x - left)) * (y - top)


@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_is_the_mean_of_bilinear_samples(example, aligned):
    plain = example("plain_operators")
    maps = torch.rand(2, 3, 9, 13, generator=torch.Generator().manual_seed(0)).double()
    boxes = torch.tensor([[0, 1.5, 2, 20, 30], [1, 0, 0, 52, 36], [1, 40, 20, 90, 70], [0, 3, 3, 3.1, 3.2]]).double()
    scale, ratio, (down, across) = 0.25, 2, (3, 2)
    expected = torch.zeros(4, 3, down, across).double()
    for number, (image, *corners) in enumerate(boxes.tolist()):
        left, top, right, bottom = (side * scale - 0.5 * aligned for side in corners)
        height, width = (max(side, 0 if aligned else 1) for side in (bottom - top, right - left))
        for i in range(down * ratio):
            for j in range(across * ratio):
                y = top + (i + 0.5) * height / (down * ratio)
                x = left + (j + 0.5) * width / (across * ratio)
                sample = bilinear(maps[int(image)], y, x)
                expected[number, :, i // ratio, j // ratio] += sample / ratio**2
    assert torch.allclose(plain.roi_align(maps, boxes, (down, across), scale, ratio, aligned), expected, atol=1e-12)
    with pytest.raises(ValueError, match="sampling_ratio: got -1"):
        plain.roi_align(maps, boxes, (down, across), scale, -1)


def test_the_picture_shows_boxes_of_both(example, tmp_path):
    picture = example("picture")
    pytest.importorskip("sklearn")
    image = picture.photo((120, 200))
    assert image.shape == (3, 120, 200)
    found = {"boxes": torch.tensor([[50.0, 50, 150, 100]])}
    picture.draw(image, (found, found), tmp_path / "a.png", "two")
    drawn = torch.frombuffer(
        bytearray(pytest.importorskip("PIL.Image").open(tmp_path / "a.png").tobytes()), dtype=torch.uint8
    )
    colours = set(map(tuple, drawn.view(120, 200, 3)[50, 50:150].tolist()))
    assert (220, 30, 60) in colours
    assert (drawn.view(120, 200, 3)[54, 50:150] == 255).all(1).any()
