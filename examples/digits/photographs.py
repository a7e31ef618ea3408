"""A harder task of real images, without a download: from which photograph does a patch come?

The photographs are those that scikit-image and scikit-learn install: a cat, a rocket, coffee, coins, brick, gravel, a
retina, … Each becomes grey, is scaled to one height and cut into square cells. A fifth of a photograph's cells are held
out, so no pixel of a test patch is ever seen in training. Patches are standardised one by one: neither brightness nor
contrast tells which photograph it is, and a patch of plain sky tells nothing at all.
"""

from __future__ import annotations

import numpy as np
import skimage.color
import skimage.data
import skimage.transform
import skimage.util
import sklearn.datasets
import sklearn.model_selection
import torch
from torch import Tensor

from repavit_ops.demo.training import ImageSet

IMAGE, PATCH = 24, 6  # pixels of what the model sees: 16 patches and the class token
CELL, HEIGHT = 36, 360  # pixels of a cell, and of a photograph: 10 rows of cells
HELD_OUT = 0.2  # share of a photograph's cells
# fmt: off
SCIKIT_IMAGE = (
    "astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "page", "retina", "rocket",
)
# fmt: on
SCIKIT_LEARN = ("china.jpg", "flower.jpg")
NAMES = (*SCIKIT_IMAGE, *(name.removesuffix(".jpg") for name in SCIKIT_LEARN))


def photographs() -> list[np.ndarray]:
    """Every photograph, grey in [0, 1], HEIGHT pixels high; in the order of NAMES."""
    found = [getattr(skimage.data, name)() for name in SCIKIT_IMAGE]
    found += [sklearn.datasets.load_sample_image(name) for name in SCIKIT_LEARN]
    grey = [
        skimage.color.rgb2gray(photo[..., :3]) if photo.ndim == 3 else skimage.util.img_as_float(photo)
        for photo in found
    ]
    return [
        skimage.transform.resize(photo, (HEIGHT, round(photo.shape[1] * HEIGHT / photo.shape[0])), anti_aliasing=True)
        for photo in grey
    ]


def load_photographs(seed: int) -> ImageSet:
    """Cells to learn from, and four patches of each held-out cell, its corners.

    Shapes: train_images [N, 1, 36, 36], test_images [M, 1, 24, 24] float32; labels are indices of NAMES.
    """
    cells, labels = [], []
    for label, photo in enumerate(photographs()):
        rows = torch.tensor(photo, dtype=torch.float32).unfold(0, CELL, CELL).unfold(1, CELL, CELL)
        cells.append(rows.reshape(-1, 1, CELL, CELL))
        labels += [label] * len(cells[-1])
    images, targets = torch.cat(cells), torch.tensor(labels)
    train, test = sklearn.model_selection.train_test_split(
        range(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=seed
    )
    far = CELL - IMAGE
    corners = [images[test, :, y : y + IMAGE, x : x + IMAGE] for y in (0, far) for x in (0, far)]
    return ImageSet(
        images[train], targets[train], standardised(torch.cat(corners)), targets[test].repeat(4), random_patches
    )


def random_patches(cells: Tensor, generator: torch.Generator) -> Tensor:
    """One patch somewhere in each cell, mirrored or not."""
    count = len(cells)
    offsets = torch.randint(0, CELL - IMAGE + 1, (count, 2), generator=generator)
    steps = torch.arange(IMAGE)
    rows, columns = (offsets[:, :1] + steps)[:, :, None], (offsets[:, 1:] + steps)[:, None, :]
    patches = cells[torch.arange(count)[:, None, None], 0, rows, columns].unsqueeze(1)
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return standardised(torch.where(mirrored, patches.flip(-1), patches))


def standardised(patches: Tensor) -> Tensor:
    """Each patch at mean 0 and standard deviation 1; plain ones stay near 0."""
    mean, std = patches.mean((1, 2, 3), keepdim=True), patches.std((1, 2, 3), keepdim=True)
    return (patches - mean) / (std + 1e-2)
