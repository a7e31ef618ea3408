"""Patch features of a pretrained DINOv2 ViT-S/14 before and after fusing, as a picture.

    pip install '.[pretrained]' scikit-image matplotlib
    python examples/dinov2_features.py docs/dinov2_features.png

Three photos; for each the first three principal components of its patch features as red, green and blue: from the
model as PyTorch runs it in float32, then fused, then fused in bfloat16. The components come from eager's features, so
that equal features have equal colours. The numbers are the least cosine between a patch's features and eager's.
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor

import repavit_ops
from repavit_ops.models import load_dinov2_small

PHOTOS = ("astronaut", "chelsea", "coffee")
SIDE = 448  # pixels; 32 x 32 patches
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def square(name: str) -> Tensor:
    """A photo [3, SIDE, SIDE] in 0..1, its middle cut out."""
    image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1) / 255
    side = min(image.shape[1:])
    top, left = ((extent - side) // 2 for extent in image.shape[1:])
    image = image[None, :, top : top + side, left : left + side]
    return F.interpolate(image, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]


def colours(features: Tensor, like: Tensor) -> Tensor:
    """Features [patches, C] on the first three principal components of ``like``: [side, side, 3] in 0..1."""
    centre = like.mean(dim=0)
    directions = torch.linalg.svd(like - centre, full_matrices=False).Vh[:3].T  # exact: the same at every call
    scale = ((like - centre) @ directions).abs().amax(dim=0)
    side = round(features.shape[0] ** 0.5)
    return ((features - centre) @ directions / scale * 0.5 + 0.5).clamp(0, 1).reshape(side, side, 3)


@torch.no_grad()
def main(path: str) -> None:
    photos = torch.stack([square(name) for name in PHOTOS])
    inputs = (photos - MEAN[:, None, None]) / STD[:, None, None]
    model = load_dinov2_small(img_size=SIDE)
    fused, low = repavit_ops.fuse(model), repavit_ops.fuse(model, dtype=torch.bfloat16)
    columns = {
        "eager, float32": model.forward_features(inputs)[:, 1:],
        "fused, float32": fused.forward_features(inputs)[:, 1:],
        "fused, bfloat16": low.forward_features(inputs.bfloat16())[:, 1:].float(),
    }
    eager = columns["eager, float32"]

    figure, axes = plt.subplots(len(PHOTOS), 4, figsize=(8, 2 * len(PHOTOS) + 0.4), layout="constrained")
    for row, photo in enumerate(photos):
        axes[row, 0].imshow(photo.permute(1, 2, 0).clamp(0, 1))
        for axis, (title, features) in zip(axes[row, 1:], columns.items(), strict=True):
            axis.imshow(colours(features[row], like=eager[row]))
            cosine = F.cosine_similarity(features[row].double(), eager[row].double(), dim=-1).min().item()
            print(f"{PHOTOS[row]:<10} {title:<16} least cosine {cosine:.7f}")
            if axis is not axes[row, 1]:
                axis.set_xlabel(f"least cosine {cosine:.7f}", fontsize=8)
            if row == 0:
                axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "dinov2_features.png")
