"""Photographs and crops of the protocol: which photos calibrate, which test, and every crop, by protocol.json.

    python examples/idle/photos.py fetch FOLDER     # once: the calibration extras, out of Debian's packages

Test photos are among the 22 that scikit-image, scikit-learn and matplotlib install. Calibration takes the other 12 and
873 free pictures of Debian's (wallpapers, OpenCV's samples and its manual, panoramas, textures and skies of games and a
planetarium; animals, things, monuments and people of a children's game and a photo album; landscapes and cities of a
space game), which need apt and dpkg-deb but no root.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import skimage.data
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor

PROTOCOL = json.loads(Path(__file__).with_name("protocol.json").read_text())
FOLDERS = {
    "skimage": Path(skimage.data.__file__).parent,
    "sklearn": Path(sklearn.datasets.__file__).parent / "images",
    "matplotlib": Path(matplotlib.get_data_path()) / "sample_data",
}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's


def fetch(folder: Path) -> None:
    """Download Debian's packages into ``folder`` and unpack them there."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PROTOCOL["debian"]["packages"]], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        package.unlink()
    for bundle in folder.glob("usr/share/gcompris-qt/rcc/*.rcc"):
        _unbundle(bundle)
    missing = [name for name in PROTOCOL["debian"]["photos"] if not (folder / name).is_file()]
    print(f"{len(PROTOCOL['debian']['photos']) - len(missing)} photos in {folder}; missing: {missing or 'none'}")


def _unbundle(bundle: Path) -> None:
    """Write the WebP pictures inside a Qt resource file beside it, each named by where in the file it begins."""
    data = bundle.read_bytes()
    for riff in re.finditer(rb"RIFF(....)WEBP", data, re.DOTALL):
        size = 8 + int.from_bytes(riff[1], "little")
        bundle.with_name(f"{bundle.stem}_{riff.start()}.webp").write_bytes(data[riff.start() :][:size])


def calibration_crops(split: int, extras: Path) -> Tensor:
    """Normalised crops [N, 3, 224, 224] of the calibration photos: round by round one of every photo.

    Photos are 885, a multiple of five: the fifth of the images that idle_pretrained holds out is whole photos.
    """
    return _drawn(split, extras, PROTOCOL["calibration"]["crops_per_photo"], str(PROTOCOL["seed"]))


def distillation_crops(split: int, extras: Path) -> Tensor:
    """Other crops of the same photos, alike."""
    return _drawn(split, extras, PROTOCOL["distillation"]["crops_per_photo"], f"distillation {PROTOCOL['seed']}")


def _drawn(split: int, extras: Path, count: int, seed: str) -> Tensor:
    paths = _calibration_photos(split, extras)
    random.Random(PROTOCOL["seed"]).shuffle(paths)
    photos = [_random_crops(_opened(path), count, f"{seed} {path.name}") for path in paths]
    return torch.cat([_normalised(list(crops)) for crops in zip(*photos, strict=True)])


def test_crops(split: int) -> Tensor:
    """Normalised crops [M, 3, 224, 224] of the split's test photos: the middle square and four corners of each."""
    test = PROTOCOL["splits"][split]["test"]
    return _normalised([crop for path in _installed() if path.name in test for crop in _fixed_crops(_opened(path))])


def _calibration_photos(split: int, extras: Path) -> list[Path]:
    paths = [path for path in _installed() if path.name not in PROTOCOL["splits"][split]["test"]]
    return paths + [extras / name for name in PROTOCOL["debian"]["photos"]]


def _installed() -> list[Path]:
    return [FOLDERS[package] / name for package, names in PROTOCOL["photos"].items() for name in names]


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such photo; python {__file__} fetch FOLDER, then --extras FOLDER")
    photo = Image.open(path)
    photo.draft("RGB", (1600, 1600))  # large JPEGs: decode small
    photo = photo.convert("RGB")
    scale = PROTOCOL["calibration"]["shorter_side"] / min(photo.size)
    if scale < 1:
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
    return photo


def _random_crops(photo: Image.Image, count: int, seed: str) -> list[np.ndarray]:
    """Crops of random area, aspect and place, mirrored or grey or not; the same in every split."""
    recipe: dict[str, Any] = PROTOCOL["calibration"]
    rng = random.Random(seed)
    crops: list[np.ndarray] = []
    while len(crops) < count:
        area = rng.uniform(*recipe["area"]) * photo.width * photo.height
        aspect = rng.uniform(*recipe["aspect"])
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if width <= photo.width and height <= photo.height:
            x, y = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
            crop = _resized(photo, (x, y, x + width, y + height))
            crop = crop[:, ::-1] if rng.random() < recipe["flip"] else crop
            crops.append(_grey(crop) if rng.random() < recipe["grey"] else crop)
    return crops


def _grey(crop: np.ndarray) -> np.ndarray:
    return np.repeat(crop.mean(axis=2, keepdims=True).astype(crop.dtype), 3, axis=2)


def _fixed_crops(photo: Image.Image) -> list[np.ndarray]:
    width, height = photo.size
    side = min(photo.size)
    small = round(side * PROTOCOL["test"]["corner_share"])
    left, top = (width - side) // 2, (height - side) // 2
    corners = [(x, y, x + small, y + small) for x in (0, width - small) for y in (0, height - small)]
    return [_resized(photo, box) for box in [(left, top, left + side, top + side), *corners]]


def _resized(photo: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    side = PROTOCOL["resolution"]
    return np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC, box=box))


def _normalised(crops: list[np.ndarray]) -> Tensor:
    images = torch.from_numpy(np.stack(crops)).float() / 255
    return ((images - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "fetch":
        sys.exit(__doc__)
    fetch(Path(sys.argv[2]))
