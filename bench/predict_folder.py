"""Many images end to end:  python bench/predict_folder.py [--images 20000] [--model NAME] [--size 64]

Crops of scikit-learn's two photographs are written as JPEG files, then ``repavit-ops predict``'s run takes them: images
a second, and the resident memory of its processes at each tenth of the way, which should stay where it was.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

import repavit_ops
from repavit_ops.predicting import Predictor, predict
from repavit_ops.predicting.predictor import Columns


def write_images(folder: Path, count: int, size: int) -> None:
    """Crops of the two photographs, a thousand to a folder."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos, generator = load_sample_images().images, np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        top, left = generator.integers(0, 427 - size), generator.integers(0, 640 - size)
        file = io.BytesIO()
        Image.fromarray(photos[number % 2][top : top + size, left : left + size]).save(file, "JPEG")
        path.write_bytes(file.getvalue())


def resident() -> float:
    """MiB of this process and of its children."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (own, *children))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watched(Predictor):
    """A predictor that notes the memory of the run every so many images."""

    every, seen, next = 1, 0, 1
    memory: tuple[float, ...] = ()

    def predict(self, pixels: torch.Tensor) -> Columns:
        self.seen += len(pixels)
        if self.seen >= self.next:
            self.memory, self.next = (*self.memory, resident()), self.next + self.every
        return super().predict(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--model", default="vanilla_deit_tiny")
    parser.add_argument("--size", type=int, default=64, help="pixels of a file's side; the model takes as many")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos, out = Path(folder) / "photos", Path(folder) / "out"
        photos.mkdir()
        write_images(photos, arguments.images, arguments.size)
        predictor = Watched(repavit_ops.create_model(arguments.model, img_size=arguments.size).eval())
        predictor.every = max(arguments.images // 10, 1)
        summary = predict(predictor, photos, out, workers=arguments.workers)
        print(summary)
        print("resident MiB at each tenth:", " ".join(f"{each:.0f}" for each in predictor.memory))


if __name__ == "__main__":
    main()
