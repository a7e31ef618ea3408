"""RePaViT's Table 6, built and timed:  python examples/dense/run.py [--model NAME …] [--backbone NAME …] [--json FILE]

Each model is built around a vanilla and a RePa Swin; the latter is merged, then fused. First the numbers: the maps that
the heads are given against those of the merged model in float64, by the tolerance rule, and the boxes, masks or logits
that come out. Then the latency of an image of the paper's size, vanilla, merged and fused in turn, of the whole model
and of its backbone alone, beside the paper's ratio. ``--picture FILE`` draws the best boxes of the merged and of the
fused model into a photo. Needs torchvision, transformers (for UperNet), scikit-learn and Pillow; for the times a quiet
machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from comparing import agreement, error_over_eager
from models import CLASSES, SIZES, backbone, build, maps_of
from picture import draw, photo
from torch import Tensor, nn

import repavit_ops
from repavit_ops.benchmarking.harness import interleave, machine

PAPER = {  # Table 6: milliseconds of an image, vanilla and RePa
    ("retinanet", "swin_small"): (61.7, 53.8),
    ("mask_rcnn", "swin_small"): (62.5, 53.8),
    ("upernet", "swin_small"): (36.3, 32.1),
    ("retinanet", "swin_base"): (82.0, 66.7),
    ("mask_rcnn", "swin_base"): (82.6, 69.4),
    ("upernet", "swin_base"): (45.6, 38.6),
}
FORMS = ("vanilla", "merged", "fused")
LEAST = 0.9  # of the boxes are the same; others are of equal scores, see comparing.py


def forms(name: str, body: str, **arguments: Any) -> dict[str, nn.Module]:
    """A model around a vanilla Swin, and around a RePa Swin merged, and fused."""
    torch.manual_seed(0)
    vanilla = build(name, backbone(f"vanilla_{body}"), **arguments)
    merged = repavit_ops.reparameterize(build(name, backbone(f"repa_{body}"), **arguments), inplace=True)
    return {"vanilla": vanilla, "merged": merged, "fused": repavit_ops.fuse(merged)}


def answer(model: nn.Module, image: Tensor) -> Any:
    """Logits of pixels, or what a detector finds in an image."""
    return model(image[None]) if hasattr(model, "head") and not hasattr(model, "backbone") else model([image])[0]


@torch.inference_mode()
def checked(merged: nn.Module, fused: nn.Module, image: Tensor) -> dict[str, Any]:
    """How equal the fused model is to the merged one.

    Raises:
        AssertionError: it is not.
    """
    eager, ours = maps_of(merged, image[None]), maps_of(fused, image[None])
    expected, found = answer(merged, image), answer(fused, image)
    truth = maps_of(merged.double(), image[None].double())
    merged.float()
    result: dict[str, Any] = {"maps": error_over_eager(ours, eager, truth)}
    if isinstance(expected, Tensor):
        result["logits"] = (found - expected).abs().max().item() / expected.abs().max().item()
        same = result["logits"] < 1e-4
    else:
        result |= agreement(expected, found)._asdict()
        same = result["found"] >= LEAST * result["boxes"] > 0
    if result["maps"] > 2 or not same:
        raise AssertionError(f"merged and fused differ, and are not timed: {result}")
    return result


@torch.inference_mode()
def latencies(models: dict[str, nn.Module], image: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of an image: of each form whole, and of its backbone alone."""
    calls = {form: lambda model=model: answer(model, image) for form, model in models.items()}
    calls |= {f"{form} maps": lambda model=model: maps_of(model, image[None]) for form, model in models.items()}
    return {form: 1000 * timing.p50 for form, timing in interleave(calls, seconds=0.0, rounds=rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(CLASSES), default=list(CLASSES))
    parser.add_argument("--backbone", nargs="+", default=["swin_small", "swin_base"], help="without vanilla_ or repa_")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default the paper's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line for each model")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="of the first detector")
    arguments = parser.parse_args()
    print(
        "| model | backbone | size | vanilla, ms | merged | fused | merged / vanilla | the paper's | fused / vanilla |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for body in arguments.backbone:
        for name in arguments.model:
            size = tuple(arguments.size or SIZES[name])
            image, models = photo(size), forms(name, body)
            equal = checked(models["merged"], models["fused"], image)
            if arguments.picture is not None and name != "upernet":
                with torch.inference_mode():
                    found = answer(models["merged"], image), answer(models["fused"], image)
                title = f"untrained {name} on repa_{body}: merged (white), fused (red)"
                draw(image, found, arguments.picture, title)
                arguments.picture = None
            times = latencies(models, image, arguments.rounds) if arguments.rounds else {}
            if times:
                paper = PAPER.get((name, body))
                theirs = "" if paper is None else f"{paper[1] / paper[0]:.2f}"
                cells = [f"{times[form]:.0f}" for form in FORMS]
                cells += [f"{times['merged'] / times['vanilla']:.2f}", theirs]
                cells.append(f"{times['fused'] / times['vanilla']:.2f}")
                print(f"| {name} | {body} | {size[0]} x {size[1]} | {' | '.join(cells)} |", flush=True)
            print(f"<!-- {equal} -->", flush=True)
            if arguments.json is not None:
                row = {"case": f"{name} {body}", "dtype": "float32", "size": size, "equal": equal, "ms": times}
                with arguments.json.open("a") as file:
                    file.write(json.dumps({**row, "threads": torch.get_num_threads(), "machine": machine()}) + "\n")


if __name__ == "__main__":
    main()
