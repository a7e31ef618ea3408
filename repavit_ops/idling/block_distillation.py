"""More gradient steps on every block of an idled model by itself, on images that its fit has not seen."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import PartialGELUFFN
from ..nn.given import require_weights, require_whole, unwrapped
from .bar import bar
from .blocks import in_call_order, open_blocks
from .distillation import idled_blocks
from .metric import IMAGES, metric_roots
from .refining import Sample, refine
from .scratch import Scratch
from .solving import goal_of
from .streams import Streams

TOKENS = 131_072  # of a block in memory at most, while there are fewer images than that


@torch.no_grad()
def distill_blocks(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    steps: int = 400,
    lr: float = 0.015,
    seed: int = 0,
    scratch: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Train every idled FFN by itself, block after block, towards the model it was made from; no labels.

    Each block is given what the trained blocks in front of it make of the images, and learns what
    :func:`repavit_ops.idle_pretrained` fitted it to, in the same metric, from the weights that it has: other crops of
    the same pictures mend what few crops did not tell. A step of Adam sees tokens of a thousand images, so that it is
    hardly noise, unlike one of :func:`repavit_ops.distill`.

    Args:
        student: of ``idle_pretrained``, unfused, everything but its idled FFNs as in the teacher; trained in place.
        teacher: the original; not changed.
        loader: batches as for ``idle_pretrained``, gone through once. Other images than the fit's.
        steps: gradient steps per block, 1,024 tokens each.
        lr: the highest learning rate, as a share of each weight's root mean square.
        seed: of the tokens that are drawn. scratch: as for ``idle_pretrained``.
        progress: show a progress bar on stderr.

    Returns:
        By the name of each idled block, in the order of the calls, the unexplained share of the goal's energy in the
        last tenth of the steps; NaN for a block without active channels, whose closed form is its optimum.

    Raises:
        ValueError: steps is below 1; the student has no idled block, or differs from the teacher elsewhere too (after
            :func:`repavit_ops.distill`, say); the loader gives no images, or values that are not finite.
        TypeError: the loader gives something else than images.
        RuntimeError: the teacher is in training mode.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, wanted a number of gradient steps >= 1")
    student, teacher = unwrapped(student), unwrapped(teacher)
    for label, model in (("student", student), ("teacher", teacher)):
        require_whole(model, "distill", label)
        require_weights(model, "distill", label)
    names = idled_blocks(student, teacher)
    if not names:
        raise ValueError("student: got a model without idled blocks, wanted the result of idle_pretrained")
    opened, sites = open_blocks(teacher, only=set(names))
    _check_rest(student, opened, names)
    losses: dict[str, float] = {}
    with Scratch(scratch) as folder, bar(progress) as shown:
        streams = Streams(folder, loader, sites[0].ffn.w_in, seed=seed)
        sites = in_call_order(opened, sites, streams.get("images", 0))
        roots = metric_roots(opened, sites, streams.first_images(IMAGES), shown)
        task = shown.add_task("distilling", total=len(sites) * len(streams))
        for index, site in enumerate(sites):
            sample = Sample(sum(streams.sizes), TOKENS)
            streams.sampled = sample.per_image
            for tokens in streams.at(opened, sites, index):
                sample.add(tokens.inside, goal_of(site.ffn, tokens))
                shown.advance(task)
            ffn = student.get_submodule(f"{site.name}.mlp")
            assert isinstance(ffn, PartialGELUFFN)
            refined = refine(ffn, sample, roots[site.name], steps, seed, lr)
            ffn.load_state_dict(refined.ffn.state_dict())
            site.block.mlp, losses[site.name] = ffn, refined.loss
    return losses


def _check_rest(student: nn.Module, opened: nn.Module, names: list[str]) -> None:
    """Raise unless student and opened teacher agree in all but the FFNs of the named blocks."""
    idled = tuple(f"{name}.mlp." for name in names)
    ours, theirs = (
        {key: value for key, value in model.state_dict().items() if not key.startswith(idled)}
        for model in (student, opened)
    )
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours or key not in theirs or not _equal(ours[key], theirs[key]):
            raise ValueError(
                f"student: differs from the teacher at {key}, wanted a model that differs in its idled FFNs alone; "
                "distill_blocks comes before distill"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Up to the rounding of a fold."""
    return a.shape == b.shape and torch.allclose(a.to(b).double(), b.double(), rtol=1e-4, atol=1e-6)
