"""A short fine-tune of an idled model towards the one it was made from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import PartialGELUFFN
from ..nn.given import processes_of, require_weights, require_whole, unwrapped
from .bar import bar
from .rates import adam, set_rates
from .streams import images_of

CLIP = 1.0  # norm of all gradients


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    steps: int | None = None,
    minutes: float | None = None,
    lr: float = 2e-4,
    warmup: float = 0.1,
    block_weight: float = 0.0,
    logit_weight: float = 1.0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[float]:
    """Train a deployed student towards the frozen model it was made from; no labels.

    The loss is ``(1 - cos(s, t)) + logit_weight · KL(t ‖ s) + block_weight · mean_l |s_l - t_l|² / |t_l|²``: s, t the
    features in front of the head, by token; KL of the logits where there is a head; s_l, t_l what both models have
    behind the idled blocks. AdamW without weight decay, gradients clipped to 1, learning rate up linearly, then down as
    a cosine. Every parameter trains; the student stays in evaluation mode (no dropout) and in its deployed shape.

    :func:`distill_blocks` comes first and has mended more. Near the teacher the gradient of a few crops is mostly
    noise: 124 steps of 8 crops took DINOv2 ViT-S/14 at θ = 0.75 from a patch cosine of 0.918 to 0.924 on kinds of
    pictures that its fit had not seen, at 2e-4, and from 0.945 to 0.936 on kinds that it had, at 1e-3
    (examples/idle). Compare before and after on images that took no part.

    Args:
        student: of :func:`repavit_ops.idle_pretrained`, unfused; trained in place, in one process.
        teacher: the original, or another model with blocks of the same names; not changed. Both out of their wrappers
            (DistributedDataParallel, DataParallel, AveragedModel, torch.compile), if they have any.
        loader: batches as for :func:`repavit_ops.idle_pretrained`, gone through as often as needed; fresh random crops
            each time teach more than the same ones.
        steps: batches to train on. minutes: or how long to train; the learning rate then follows the clock, and the
            result depends on the machine's speed. One of the two.
        lr: the highest learning rate, as a share of each weight's root mean square. warmup: share of the training until
            then. More images a step bear a higher rate.
        checkpoint: file to write every 20 steps and at the end, and to go on from if it exists: weights, optimizer,
            progress (steps and time). The loader starts anew then.
        progress: show a progress bar on stderr.

    Returns:
        The loss of every step of this call.

    Raises:
        ValueError: neither or both of steps and minutes; the loader is empty; the student has no idled block, or the
            teacher lacks one; the checkpoint is of another training; weights are sharded or on the meta device; the
            student is DistributedDataParallel over several processes.
        RuntimeError: the loss is not finite.
    """
    if (steps is None) == (minutes is None):
        raise ValueError(f"steps, minutes: got {steps} and {minutes}, wanted exactly one of the two")
    if (processes := processes_of(student)) > 1:
        raise ValueError(
            f"student: got DistributedDataParallel over {processes} processes, wanted one process: the losses here are "
            "of inner parts, behind which it averages no gradients; distill student.module on one process, and give "
            "its state_dict to the others"
        )
    student, teacher = unwrapped(student), unwrapped(teacher)
    for label, model in (("student", student), ("teacher", teacher)):
        require_whole(model, "distill", label)
        require_weights(model, "distill", label)
    names = idled_blocks(student, teacher)
    if not names:
        raise ValueError("student: got a model without idled blocks, wanted the result of idle_pretrained")
    student.eval()
    trained = [p for p in student.parameters() if p.is_floating_point()]
    optimizer = adam(trained)
    clock = _Clock(steps, minutes)
    if checkpoint is not None and Path(checkpoint).exists():
        _resume(Path(checkpoint), student, optimizer, clock)
    losses: list[float] = []
    teaching = {p: p.requires_grad for p in teacher.parameters()}
    modes = {module: module.training for module in teacher.modules()}
    teacher.eval().requires_grad_(False)
    try:
        with bar(progress) as shown:
            task = shown.add_task("distilling", total=1.0)
            for images in _endless(loader, trained[0]):
                if clock.done() >= 1:
                    break
                set_rates(optimizer, lr, clock.done(), warmup)
                losses.append(_step(student, teacher, names, images, optimizer, block_weight, logit_weight))
                clock.tick()
                shown.update(task, completed=clock.done(), description=f"distilling, loss {losses[-1]:.4f}")
                if checkpoint is not None and (len(losses) % 20 == 0 or clock.done() >= 1):
                    _save(Path(checkpoint), student, optimizer, clock)
    finally:
        for p, wanted in teaching.items():
            p.requires_grad_(wanted)
        for module, mode in modes.items():
            module.training = mode
    return losses


class _Clock:
    """How much of the training is done, by steps or by time."""

    def __init__(self, steps: int | None, minutes: float | None) -> None:
        self.steps, self.seconds = steps, None if minutes is None else 60 * minutes
        self.taken, self.before, self.started = 0, 0.0, time.monotonic()

    def tick(self) -> None:
        self.taken += 1

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.started

    def done(self) -> float:
        share = self.taken / self.steps if self.steps else self.elapsed() / self.seconds if self.seconds else 1.0
        return min(share, 1.0)


def idled_blocks(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the student's blocks whose FFN has an idle path."""
    names = [
        name.rpartition(".")[0]
        for name, module in student.named_modules()
        if isinstance(module, PartialGELUFFN) and module.w_merged is not None
    ]
    theirs = dict(teacher.named_modules())
    if missing := [name for name in names if name not in theirs]:
        raise ValueError(f"teacher: lacks the student's blocks {', '.join(missing)}; wanted the model it was made from")
    return names


def _endless(loader: Iterable[Any], like: Tensor) -> Iterator[Tensor]:
    while True:
        empty = True
        for batch, item in enumerate(loader):
            empty = False
            yield images_of(item, f"loader: batch {batch}").to(like)
        if empty:
            raise ValueError("loader: got no batches (an iterator that is used up?), wanted one to go through again")


def _step(
    student: nn.Module,
    teacher: nn.Module,
    names: list[str],
    images: Tensor,
    optimizer: torch.optim.Optimizer,
    block_weight: float,
    logit_weight: float,
) -> float:
    with torch.no_grad():
        truth_blocks, truth, truth_logits = outputs(teacher, names, images)
    with torch.enable_grad():
        blocks, ours, logits = outputs(student, names, images)
        relative = [F.mse_loss(a, b) / b.square().mean() for a, b in zip(blocks, truth_blocks, strict=True)]
        loss = block_weight * torch.stack(relative).mean() + (1 - F.cosine_similarity(ours, truth, dim=-1)).mean()
        if logits is not None and truth_logits is not None:
            log = F.log_softmax(logits, dim=-1)
            loss = loss + logit_weight * F.kl_div(
                log, truth_logits.log_softmax(-1), log_target=True, reduction="batchmean"
            )
        if not loss.isfinite():
            raise RuntimeError("the loss is not finite; use a lower lr, and check the images")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)
        optimizer.step()
    return loss.item()


def outputs(model: nn.Module, names: list[str], images: Tensor) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """What the named blocks give, the features in front of the head, and the logits (None where there is no head)."""
    known: Any = model
    tells_features = hasattr(model, "forward_features") and hasattr(model, "forward_head")
    with recording(model, names) as seen:
        features = known.forward_features(images) if tells_features else known(images)
        blocks = [seen[name] for name in names]
    if not tells_features:
        return blocks, features, features if features.dim() == 2 else None
    return blocks, features, known.forward_head(features) if getattr(model, "num_classes", 0) else None


@contextmanager
def recording(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of the named modules while it is active."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: seen.__setitem__(name, output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _save(path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, clock: _Clock) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "steps": clock.taken, "seconds": clock.elapsed()}, unfinished)
    os.replace(unfinished, path)


def _resume(path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, clock: _Clock) -> None:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} is of another training than this student's: {error}") from error
    clock.taken, clock.before = saved["steps"], saved["seconds"]
