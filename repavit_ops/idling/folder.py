"""Crops of a folder of photos, for the command line: some to calibrate on, the others to report on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
TESTED = 5  # every fifth photo is only reported on
AREA, ASPECT = (0.15, 1.0), (3 / 4, 4 / 3)  # of a calibration crop, the area as a share of the photo's
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Preprocessing(NamedTuple):
    """Pixels (height, width) that a model takes, and mean and standard deviation of its channels in 0..1."""

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]

    def __call__(self, photo: Any, box: tuple[int, int, int, int], mirrored: bool = False) -> Tensor:
        """The box of a photo as a normalised image [3, H, W]."""
        import numpy as np

        crop = np.array(photo.resize((self.size[1], self.size[0]), 3, box=box), dtype=np.float32)  # 3: bicubic
        pixels = torch.from_numpy(crop[:, ::-1].copy() if mirrored else crop).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
        return (pixels - mean) / std


class Crops:
    """Batches of crops, drawn anew by every pass over them: a loader.

    Args:
        photos: files. preprocessing: of the model. per_photo: crops of each in one pass; 0 cuts out the middle once.
        batch: images at once. seed: of area, place and mirroring.
    """

    def __init__(self, photos: list[Path], preprocessing: Preprocessing, per_photo: int, batch: int, seed: int) -> None:
        self.photos, self.preprocessing, self.per_photo = photos, preprocessing, per_photo
        self.batch, self.random = batch, random.Random(seed)

    def __iter__(self) -> Iterator[Tensor]:
        waiting: list[Tensor] = []
        for _ in range(max(self.per_photo, 1)):
            for path in self.photos:
                waiting.append(self._crop(opened(path)))
                if len(waiting) == self.batch:
                    yield torch.stack(waiting)
                    waiting = []
        if waiting:
            yield torch.stack(waiting)

    def _crop(self, photo: Any) -> Tensor:
        width, height = photo.size
        if not self.per_photo:
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            return self.preprocessing(photo, (left, top, left + side, top + side))
        while True:
            area, aspect = self.random.uniform(*AREA) * width * height, self.random.uniform(*ASPECT)
            w, h = max(round((area * aspect) ** 0.5), 1), max(round((area / aspect) ** 0.5), 1)
            if w <= width and h <= height:
                x, y = self.random.randint(0, width - w), self.random.randint(0, height - h)
                return self.preprocessing(photo, (x, y, x + w, y + h), self.random.random() < 0.5)


def photos_in(folder: Path, seed: int) -> tuple[list[Path], list[Path]]:
    """The photos below a folder, shuffled by ``seed``: those that calibrate, and every fifth, which tests.

    Raises:
        FileNotFoundError: no such folder. ValueError: fewer than five photos.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--data: got {str(folder)!r}, wanted a folder of photos")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(found) < TESTED:
        raise ValueError(
            f"--data: got {len(found)} photos ({', '.join(SUFFIXES)}) in {folder}, wanted at least {TESTED}, "
            "better some hundred, of many kinds"
        )
    random.Random(seed).shuffle(found)
    tested = found[TESTED - 1 :: TESTED]
    return [path for path in found if path not in set(tested)], tested


def opened(path: Path) -> Any:
    """A photo in RGB, its shorter side at most 1024 pixels.

    Raises:
        ImportError: Pillow is not installed. ValueError: the file is no image.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("reading photos needs Pillow: pip install pillow") from None
    try:
        file = Image.open(path)
        file.draft("RGB", (2048, 2048))  # large JPEGs: decode small
        photo = file.convert("RGB")
    except OSError as error:
        raise ValueError(f"--data: {path} is no image that Pillow reads: {error}") from error
    scale = 1024 / min(photo.size)
    return photo.resize((round(photo.width * scale), round(photo.height * scale))) if scale < 1 else photo
