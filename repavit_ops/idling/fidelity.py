"""What idling kept: cosines per block and at the end, agreement of the head, and the speed it buys."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fusing import fuse
from ..nn.given import require_weights, require_whole, unwrapped
from .distillation import idled_blocks, outputs
from .streams import images_of


@dataclass(frozen=True)
class Fidelity:
    """Result of :func:`fidelity`.

    Attributes:
        images: how many were compared.
        blocks: mean cosine of the tokens behind each idled block, by its name.
        patches: mean cosine of the final patch features (of all tokens where the model has no class token).
        class_token: mean cosine of the class token; None without one.
        top1: share of images whose largest logit is the original's; None without a head.
    """

    images: int
    blocks: dict[str, float]
    patches: float
    class_token: float | None
    top1: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@torch.no_grad()
def fidelity(original: nn.Module, idled: nn.Module, loader: Iterable[Any]) -> Fidelity:
    """How far an idled model is from the one it was made from, on images that did not calibrate it.

    Args:
        original, idled: in evaluation mode, ``idled`` unfused; out of their wrappers, if they have any.
        loader: as for :func:`repavit_ops.idle_pretrained`.

    Raises:
        ValueError: the loader is empty or gives no finite images; the original lacks a block of ``idled``; weights are
            sharded or on the meta device.
    """
    original, idled = unwrapped(original), unwrapped(idled)
    for label, model in (("original", original), ("idled", idled)):
        require_whole(model, "compare", label)
        require_weights(model, "compare", label)
    names = idled_blocks(idled, original)
    like = next(original.parameters())
    cosines: dict[str, list[Tensor]] = {name: [] for name in names}
    final: list[Tensor] = []
    agreement: list[Tensor] = []
    for batch, item in enumerate(loader):
        images = images_of(item, f"loader: batch {batch}").to(like)
        truth, features, logits = outputs(original, names, images)
        ours, our_features, our_logits = outputs(idled, names, images)
        for name, a, b in zip(names, ours, truth, strict=True):
            cosines[name].append(F.cosine_similarity(a, b, dim=-1).flatten(1).mean(1).cpu())
        final.append(F.cosine_similarity(our_features, features, dim=-1).flatten(1).cpu())
        if logits is not None and our_logits is not None:
            agreement.append((logits.argmax(-1) == our_logits.argmax(-1)).double().cpu())
    if not final:
        raise ValueError("loader: got no batches, wanted images that did not calibrate the model")
    tokens = torch.cat(final).double()
    prefix = _prefix_tokens(original, tokens.shape[1])
    return Fidelity(
        images=len(tokens),
        blocks={name: torch.cat(parts).mean().item() for name, parts in cosines.items()},
        patches=tokens[:, prefix:].mean().item(),
        class_token=tokens[:, 0].mean().item() if prefix else None,
        top1=torch.cat(agreement).mean().item() if agreement else None,
    )


def _prefix_tokens(model: nn.Module, tokens: int) -> int:
    """Class and register tokens in front of the patches."""
    if tokens == 1:
        return 0
    default = 1 if getattr(model, "cls_token", None) is not None else 0
    return int(getattr(model, "num_prefix_tokens", default))


@dataclass(frozen=True)
class Speed:
    """Images per second of both models fused, as median of interleaved runs."""

    original: float
    idled: float
    batch: int
    threads: int

    @property
    def gain(self) -> float:
        """How many times as fast the idled model is."""
        return self.idled / self.original

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.gain}


@torch.inference_mode()
def speed(original: nn.Module, idled: nn.Module, images: Tensor, rounds: int = 5) -> Speed:
    """Both models fused, on the same images, by turns.

    Args:
        original, idled: in evaluation mode. images: one batch [B, 3, H, W]. rounds: how often each is timed.
    """
    with torch.inference_mode(False), torch.no_grad():
        models = [fuse(model) for model in (original, idled)]
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for model, times in zip(models, seconds, strict=True):
            started = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first warms up
                times.append(time.perf_counter() - started)
    rates = [len(images) / statistics.median(times) for times in seconds]
    return Speed(rates[0], rates[1], len(images), torch.get_num_threads())
