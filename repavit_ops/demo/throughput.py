"""Images per second of several models on the same images, measured in turns so that a busy machine treats all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rate(NamedTuple):
    """Images per second: the median over rounds, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@torch.inference_mode()
def measure(models: Mapping[str, nn.Module], images: Tensor, seconds: float, least_rounds: int = 5) -> dict[str, Rate]:
    """Time every model once per round (A B C A B C …), for about ``seconds`` and at least ``least_rounds`` rounds.

    Args:
        models: name → model in evaluation mode, on the device of ``images``.
        images: one batch.
        seconds: time to spend, after one untimed round.
        least_rounds: rounds that are made however long they take.
    """
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    for model in models.values():
        model(images)
    times: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_rounds or time.perf_counter() < end:
        for name, model in models.items():
            start = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: _rate(values, len(images)) for name, values in times.items()}


def _rate(times: list[float], images: int) -> Rate:
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    return Rate(images / statistics.median(times), images / cuts[-1], images / cuts[0])
