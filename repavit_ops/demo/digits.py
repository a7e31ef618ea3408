"""Real handwritten digits and how a small ViT learns them: data, augmentation, schedule, one training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import sklearn.datasets
import sklearn.model_selection
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import recalibrate_bn, set_join
from ..nn.join import JoinedBranches

HELD_OUT = 0.2  # share of the images that no training step sees


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits: 1,797 images of 8x8, standardised by the training images.

    Shapes: images [N, 1, 8, 8] float32; labels [N] int64. ``blank`` is the value of an empty pixel.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    blank: float


def load_digits(seed: int) -> Digits:
    """Read the images (they come with scikit-learn) and hold out a fifth, the classes in equal shares."""
    data = sklearn.datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = sklearn.model_selection.train_test_split(
        range(len(labels)), test_size=HELD_OUT, stratify=data.target, random_state=seed
    )
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Digits(images[train], labels[train], images[test], labels[test], float(-mean / std))


@dataclass(frozen=True)
class Recipe:
    """Training settings; AdamW under one cosine.

    Attributes:
        epochs: passes over the training images.
        batch: images per step. The last, smaller batch of an epoch is left out: BatchNorm needs full ones.
        lr: peak learning rate. warmup: share of the steps that rise to it.
        smoothing: of the labels. shift: probability that an image moves by up to one pixel each way.
        join_from, join_until: shares of the training between which α rises from 0 to 1; it stays at 1 after that.
    """

    epochs: int = 20
    batch: int = 64
    lr: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    smoothing: float = 0.1
    shift: float = 0.5
    join_from: float = 0.1
    join_until: float = 0.6

    def learning_rate(self, progress: float) -> float:
        """Learning rate at a share of the training."""
        return self.lr * min(1.0, progress / self.warmup) * 0.5 * (1 + math.cos(math.pi * progress))

    def join(self, progress: float) -> float:
        """α at a share of the training."""
        return min(1.0, max(0.0, (progress - self.join_from) / (self.join_until - self.join_from)))


@dataclass(frozen=True)
class Epoch:
    """State after one epoch: mean loss, accuracy on the held-out images, α (None without joined branches)."""

    number: int
    loss: float
    accuracy: float
    alpha: float | None


def train(
    model: nn.Module, digits: Digits, recipe: Recipe, seed: int, on_epoch: Callable[[Epoch], None]
) -> list[Epoch]:
    """Train in place; returns the course of it. The model ends in evaluation mode, BatchNorms recalibrated, α = 1."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    joined = any(isinstance(module, JoinedBranches) for module in model.modules())
    steps = len(digits.train_labels) // recipe.batch
    course = []
    for number in range(recipe.epochs):
        model.train()
        alpha = recipe.join(number / recipe.epochs) if joined else None
        if alpha is not None:
            set_join(model, alpha)
        total = 0.0
        for step, (images, labels) in enumerate(_batches(digits, recipe, generator)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate((number + (step + 1) / steps) / recipe.epochs)
            loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
        if number + 1 == recipe.epochs:
            if joined:
                set_join(model, 1.0)
            recalibrate_bn(model, digits.train_images.split(steps * recipe.batch)[:1])
        accuracy = accuracy_of(predict(model.eval(), digits.test_images), digits.test_labels)
        course.append(Epoch(number + 1, total / steps, accuracy, alpha))
        on_epoch(course[-1])
    return course


def _batches(digits: Digits, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(digits.train_labels), generator=generator)
    for index in order.split(recipe.batch):
        if len(index) == recipe.batch:
            images = shifted(digits.train_images[index], digits.blank, recipe.shift, generator)
            yield images, digits.train_labels[index]


def shifted(images: Tensor, blank: float, probability: float, generator: torch.Generator) -> Tensor:
    """Move each image, with a probability, by -1, 0 or 1 pixel in both directions; blank pixels come in."""
    count, _, height, width = images.shape
    moves = torch.rand(count, 1, generator=generator) < probability
    offsets = torch.where(moves, torch.randint(0, 3, (count, 2), generator=generator), 1)
    rows = (offsets[:, :1] + torch.arange(height))[:, :, None]
    columns = (offsets[:, 1:] + torch.arange(width))[:, None, :]
    padded = F.pad(images, (1, 1, 1, 1), value=blank)
    return padded[torch.arange(count)[:, None, None], 0, rows, columns].unsqueeze(1)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Most likely class of each image, [N] int64."""
    return model(images).argmax(dim=1)


def accuracy_of(predictions: Tensor, labels: Tensor) -> float:
    return (predictions == labels).double().mean().item()
