"""How a small ViT learns a small set of images: AdamW under one cosine, α by its schedule, one loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import JoinSchedule, recalibrate_bn
from ..nn.join import JoinedBranches


@dataclass(frozen=True)
class ImageSet:
    """Images to learn from and images that no training step sees.

    Shapes:
        train_images [N, 1, H, W] float32, as ``augment`` takes them; test_images [M, 1, h, w], as the model does
        train_labels [N], test_labels [M] int64
        augment      images, generator → images that one training step sees
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    augment: Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """Training settings; AdamW under one cosine.

    Attributes:
        epochs: passes over the training images.
        batch: images per step. The last, smaller batch of an epoch is left out: BatchNorm needs full ones.
        lr: peak learning rate. warmup: share of the steps that rise to it.
        smoothing: of the labels.
        join_warmup, join_hold: of :class:`repavit_ops.nn.JoinSchedule`.
    """

    epochs: int = 20
    batch: int = 64
    lr: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    smoothing: float = 0.1
    join_warmup: float = 0.1
    join_hold: float = 0.4

    def learning_rate(self, progress: float) -> float:
        """Learning rate at a share of the training."""
        return self.lr * min(1.0, progress / self.warmup) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Epoch:
    """State after one epoch: mean loss, accuracy on the held-out images, α (None without joined branches)."""

    number: int
    loss: float
    accuracy: float
    alpha: float | None


def train(
    model: nn.Module, data: ImageSet, recipe: Recipe, seed: int, on_epoch: Callable[[Epoch], None] = lambda _: None
) -> list[Epoch]:
    """Train in place; returns the course of it. The model ends in evaluation mode, BatchNorms recalibrated, α = 1."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    steps = len(data.train_labels) // recipe.batch
    schedule = _join_schedule(model, recipe, steps)
    course = []
    for number in range(recipe.epochs):
        model.train()
        total = 0.0
        for step, (images, labels) in enumerate(_batches(data, recipe, generator)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate((number + (step + 1) / steps) / recipe.epochs)
            loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            total += loss.item()
        if number + 1 == recipe.epochs:
            recalibrate_bn(model, (images for images, _ in _batches(data, recipe, generator)))
        accuracy = accuracy_of(predict(model.eval(), data.test_images), data.test_labels)
        course.append(Epoch(number + 1, total / steps, accuracy, None if schedule is None else schedule.alpha))
        on_epoch(course[-1])
    return course


def _join_schedule(model: nn.Module, recipe: Recipe, steps: int) -> JoinSchedule | None:
    """α over ``steps`` steps an epoch; None without joined branches."""
    if not any(isinstance(module, JoinedBranches) for module in model.modules()):
        return None
    return JoinSchedule(model, recipe.epochs * steps, warmup=recipe.join_warmup, hold=recipe.join_hold)


def _batches(data: ImageSet, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data.train_labels), generator=generator)
    for index in order.split(recipe.batch):
        if len(index) == recipe.batch:
            yield data.augment(data.train_images[index], generator), data.train_labels[index]


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Most likely class of each image, [N] int64."""
    return model(images).argmax(dim=1)


def accuracy_of(predictions: Tensor, labels: Tensor) -> float:
    return (predictions == labels).double().mean().item()


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from more threads, and lose much where other programs want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
