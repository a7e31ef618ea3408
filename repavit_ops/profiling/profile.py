"""Time of a model by its parts."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..nn.given import require_weights
from .inside import Products, Share, inside, shortest
from .parts import CORE, MERGED, PARTS, PROJ, QKV, REST, parts_of
from .recording import Call, record

ROUNDS = 5  # forwards at least, of each kind
PEAK_ITERATIONS = 1 << 16


@dataclass(frozen=True)
class Part:
    """One part of all blocks together: its seconds per forward, and its floating-point operations."""

    name: str
    seconds: float
    flops: int

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations per second."""
        return self.flops / self.seconds / 1e9 if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Profile:
    """Result of :func:`profile`.

    Attributes:
        seconds: of one forward as a user runs it, a median.
        parts: in the order of a forward, those that take any time; together they are ``seconds``.
        estimated: whether some of them are the inside of operator calls, which can only be estimated.
    """

    seconds: float
    parts: tuple[Part, ...]
    estimated: bool

    def __getitem__(self, name: str) -> Part:
        """A part by its name, empty where the model spends nothing in it."""
        return next((part for part in self.parts if part.name == name), Part(name, 0.0, 0))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"seconds": self.seconds, "estimated": self.estimated, "parts": [asdict(part) for part in self.parts]}


@torch.no_grad()
def profile(model: nn.Module, images: Tensor, seconds: float = 2.0) -> Profile:
    """Where the time of a forward goes: patch embedding, attention and FFN by their products, and the rest.

    The forward is timed as it is. Then every PyTorch function in it is timed, and sorted into parts by what stands
    around it, so any library's model will do; the parts are scaled to the time of the plain forward. What runs as one
    operator call of this library is divided by the time that its products take alone.

    Args:
        model: in evaluation mode, on a CPU.
        images: one batch, as the model takes it.
        seconds: time to spend, about; at least five forwards of each kind are made.

    Raises:
        RuntimeError: the model is in training mode.
        ValueError: the model or the images are not on a CPU: functions return there before a GPU has run them.
    """
    require_weights(model, "profile")
    if model.training:
        raise RuntimeError("model: in training mode; call model.eval() first")
    places = {t.device.type for t in (images, *model.parameters())}
    if places != {"cpu"}:
        found = ", ".join(sorted(places))
        raise ValueError(f"model, images: got them on {found}, wanted a CPU: use torch.profiler there")
    model(images)
    plain = _times(model, images, seconds / 2)
    records = _records(model, images, seconds / 2)
    calls = _medians([calls for calls, _ in records])
    between = statistics.median(took - sum(call.seconds for call in calls) for calls, took in records)
    shares = [*_shares(calls, images.dtype), (REST, max(0.0, between), 0)]
    total = statistics.median(plain)
    scale = total / sum(took for _, took, _ in shares)
    parts = []
    for name in PARTS:
        own = [(took, flops) for part, took, flops in shares if part == name]
        if own and sum(took for took, _ in own) > 0:
            parts.append(Part(name, scale * sum(took for took, _ in own), sum(flops for _, flops in own)))
    return Profile(total, tuple(parts), any(call.kind == "fused" for call in calls))


def product_peak(dtype: torch.dtype) -> float | None:
    """FLOP/s of products in registers on PyTorch's threads, measured; None where there is no kernel for the dtype."""
    if backends.why_unavailable("cpp") is not None or dtype == torch.float64:
        return None
    like = torch.empty(0, dtype=dtype)
    made = torch.ops.repavit_ops.product_peak(like, PEAK_ITERATIONS)
    return made / shortest(lambda: torch.ops.repavit_ops.product_peak(like, PEAK_ITERATIONS))


def _times(model: nn.Module, images: Tensor, seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < ROUNDS or time.perf_counter() < end:
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return times


def _records(model: nn.Module, images: Tensor, seconds: float) -> list[tuple[list[Call], float]]:
    record(model, images)  # hooks make a fused model find other ways; not counted
    records: list[tuple[list[Call], float]] = []
    end = time.perf_counter() + seconds
    while len(records) < ROUNDS or time.perf_counter() < end:
        records.append(record(model, images))
    return records


def _medians(rounds: list[list[Call]]) -> list[Call]:
    """The calls of one forward with their median times."""
    same = [calls for calls in rounds if len(calls) == len(rounds[-1])]  # a first call may do more
    return [
        replace(call, seconds=statistics.median(other[index].seconds for other in same))
        for index, call in enumerate(same[-1])
    ]


def _shares(calls: list[Call], dtype: torch.dtype) -> list[Share]:
    products, shares, seen = Products(dtype), list[Share](), False
    for call, part in zip(calls, parts_of(calls), strict=True):
        found = inside(call, products, not seen) if call.kind == "fused" else [(part, call.seconds, call.flops)]
        seen = seen or any(name in (QKV, CORE, PROJ, MERGED) for name, _, _ in found)
        shares += found
    return shares
