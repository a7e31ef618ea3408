"""Real handwritten digits: 1,797 images that come with scikit-learn."""

from __future__ import annotations

from functools import partial

import sklearn.datasets
import sklearn.model_selection
import torch
import torch.nn.functional as F
from torch import Tensor

from .training import ImageSet

IMAGE, PATCH = 8, 2  # pixels: 16 patches and the class token
HELD_OUT = 0.2  # share of the images that no training step sees
SHIFTED = 0.5  # probability that a training image moves


def load_digits(seed: int) -> ImageSet:
    """scikit-learn's digits, standardised by the training images; a fifth held out, the classes in equal shares.

    Shapes: images [N, 1, 8, 8] float32; labels [N] int64.
    """
    data = sklearn.datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = sklearn.model_selection.train_test_split(
        range(len(labels)), test_size=HELD_OUT, stratify=data.target, random_state=seed
    )
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    augment = partial(shifted, blank=float(-mean / std), probability=SHIFTED)
    return ImageSet(images[train], labels[train], images[test], labels[test], augment)


def shifted(images: Tensor, generator: torch.Generator, *, blank: float, probability: float) -> Tensor:
    """Move each image, with a probability, by -1, 0 or 1 pixel in both directions; blank pixels come in."""
    count, _, height, width = images.shape
    moves = torch.rand(count, 1, generator=generator) < probability
    offsets = torch.where(moves, torch.randint(0, 3, (count, 2), generator=generator), 1)
    rows = (offsets[:, :1] + torch.arange(height))[:, :, None]
    columns = (offsets[:, 1:] + torch.arange(width))[:, None, :]
    padded = F.pad(images, (1, 1, 1, 1), value=blank)
    return padded[torch.arange(count)[:, None, None], 0, rows, columns].unsqueeze(1)
