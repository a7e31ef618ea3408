"""A photo with the best boxes of two detectors, one within the other."""

from __future__ import annotations

from pathlib import Path

import torch
from comparing import Detections
from torch import Tensor

SHOWN = 12
STYLES = (("merged, PyTorch", (255, 255, 255), 7), ("fused", (220, 30, 60), 2))  # label, colour, pixels of a line


def photo(size: tuple[int, int]) -> Tensor:
    """scikit-learn's photo of a temple, [3, H, W] in 0..1, its middle cut out in proportion and resized."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("china.jpg"))
    scale = max(size[0] / image.height, size[1] / image.width)
    sides = (size[1] / scale, size[0] / scale)
    left, top = (image.width - sides[0]) / 2, (image.height - sides[1]) / 2
    resized = image.resize((size[1], size[0]), box=(left, top, left + sides[0], top + sides[1]))
    return torch.tensor(list(resized.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1) / 255


def draw(image: Tensor, found: tuple[Detections, Detections], path: Path, title: str) -> None:
    """Write a picture of an image [3, H, W] with the best boxes of two detectors."""
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    drawing, font = ImageDraw.Draw(canvas), ImageFont.load_default(22)
    for (_, colour, width), detections in zip(STYLES, found, strict=True):
        for box in detections["boxes"][:SHOWN].tolist():
            drawing.rectangle(box, outline=colour, width=width)
    drawing.rectangle((0, 0, canvas.width, 36), fill=(0, 0, 0))
    drawing.text((8, 5), title, fill=(255, 255, 255), font=font)
    canvas.save(path)
