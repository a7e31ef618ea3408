"""A pretrained ViT in, a reparameterized one out: channel idle, block by block, without labels."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.schedule import per_block
from ..nn.given import require_weights, unwrapped
from ..reparam import active_channels
from .allocation import FITTED, allocated, measure
from .bar import bar
from .blocks import in_call_order, open_blocks
from .metric import IMAGES, metric_roots
from .refining import Sample, refine
from .scratch import Scratch
from .solving import empty_split, goal_of, solve_ffn
from .streams import Streams


@dataclass(frozen=True)
class BlockResult:
    """What became of one block: its name, m of hidden channels, and how much of the target's energy is unexplained.

    Energy is in the block's metric: what an error costs at the end. ``loss`` is on the calibration images, ``held_out``
    on the fifth of them that chose ``ridge`` (NaN without any). ``refined`` is ``loss`` after the gradient steps (NaN
    without any). A block that was left as it was has m = hidden and NaN.
    """

    name: str
    hidden: int
    act_channels: int
    loss: float = float("nan")
    held_out: float = float("nan")
    ridge: float = float("nan")
    refined: float = float("nan")

    @property
    def unexplained(self) -> float:
        """The share that the block as it is leaves unexplained."""
        return self.loss if math.isnan(self.refined) else self.refined


@torch.no_grad()
def idle_pretrained(
    model: nn.Module,
    loader: Iterable[Any],
    idle_ratio: float | Sequence[float] = 0.5,
    *,
    allocate: bool = False,
    ridge: float | None = None,
    steps: int = 200,
    tokens_per_image: int | None = None,
    seed: int = 0,
    scratch: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Turn a pretrained ViT into a deployed channel-idle one, block by block in closed form, without labels.

    Every block's FFN becomes ``x + W3 gelu(W2 n + b2) + W1 n + b1`` with n the LayerNorm core of x (RePaViT, eq. 6,
    LayerNorm kept). W2, b2 are the rows of fc1 of m = ceil(ρC (1 - θ)) channels, chosen by backward elimination;
    [W3, W1, b1] solve one ridge least squares on the features [gelu(h_active), n(x), 1]; ``steps`` gradient steps on
    all weights of the block follow, W2 included. Blocks go one after another on what the changed blocks in front of
    them give; the target is halfway between what the original block makes of that and what the *original* model has
    behind the block, so that each also mends some of what was lost. Channels, ridge and steps count an error δ behind a
    block as ``δᵀ M δ``, M of what such errors change in the direction of the final features (96 images, one backward
    pass each).

    **It loses accuracy**: at θ = 0.75 the patch features of DINOv2 ViT-S/14 keep a cosine of 0.91 to 0.94 to the
    original, with ``allocate=True`` (examples/idle has what was measured). :func:`repavit_ops.distill_blocks` goes on
    from it.

    Memory holds the model, what a backward pass of 16 images keeps, one C² metric per block, one block's Gram matrix,
    (ρC + C + 1)² float64, and 65,536 tokens for the gradient steps (one per image where there are more images);
    images and tokens pass through ``scratch``. The same loader gives the same model.

    Args:
        model: pretrained, in evaluation mode; not changed. timm's ViT, DeiT, DINOv2, CLIP, SigLIP and Swin, and the
            vanilla models of this library: GELU, LayerNorm.
        loader: batches of calibration images as the model takes them: a tensor, or a tuple or list whose first element
            is one (labels are not used). Read once. Variety counts: hundreds of photos, some crops of each; every
            fifth image chooses the ridge.
        idle_ratio: θ in [0, 1], of all blocks or of each. 0 leaves a block exactly as it is.
        allocate: move the FLOPs that θ means for all blocks towards where they count most, by measured sensitivity: the
            final features' error when one block alone is idled. ``idle_ratio`` must then be one number.
        ridge: penalty of the least squares as a share of a feature's mean square; None chooses it per block.
        steps: gradient steps behind every block's closed form (Adam, 1,024 tokens each); 0 for the closed form alone.
        tokens_per_image: how many tokens of an image enter the statistics, drawn anew in every block; None takes all.
        seed: of that draw, and of what each gradient step sees.
        scratch: folder for temporary files, removed at the end: per image two token maps in the model's dtype and the
            image itself; None for the system's.
        progress: show a progress bar on stderr.

    Returns:
        A new model in evaluation mode, in plain PyTorch: :func:`repavit_ops.fuse` runs it on kernels. What was solved
        is in its attribute ``idle_report``, a list of :class:`BlockResult`.

    Raises:
        RuntimeError: the model is in training mode.
        ValueError: an idle ratio lies outside [0, 1] or there is one too few; steps is negative; an FFN cannot be idled
            (names block and reason); the loader gives no images, or values that are not finite; the final features
            do not depend on a block.
        TypeError: the loader gives something else than images.
    """
    model = unwrapped(model)
    require_weights(model, "idle")
    opened, sites = open_blocks(model)
    ratios = _checked_ratios(idle_ratio, len(sites))
    if steps < 0:
        raise ValueError(f"steps: got {steps}, wanted a number of gradient steps >= 0")
    if allocate and isinstance(idle_ratio, Sequence):
        raise ValueError("allocate, idle_ratio: got True and a ratio per block, wanted one ratio, the budget of all")
    with Scratch(scratch) as folder, bar(progress) as shown:
        streams = Streams(folder, loader, sites[0].ffn.w_in, tokens_per_image, seed)
        sites = in_call_order(opened, sites, streams.get("images", 0))
        roots = metric_roots(opened, sites, streams.first_images(IMAGES), shown)
        keep = [active_channels(site.hidden, ratio) for site, ratio in zip(sites, ratios, strict=True)]
        if allocate:
            task = shown.add_task("measuring", total=len(sites) * streams.batches_of(FITTED))
            keep = allocated(measure(opened, sites, streams, keep, roots, lambda: shown.advance(task)), keep)
        results = {s.name: BlockResult(s.name, s.hidden, m) for s, m in zip(sites, keep, strict=True)}
        opened, found = open_blocks(model, only={r.name for r in results.values() if r.act_channels < r.hidden})
        changing = sorted(found, key=lambda site: list(results).index(site.name))
        task = shown.add_task("idling", total=len(changing) * len(streams))
        for index, site in enumerate(changing):
            split, sample = empty_split(site.ffn, roots[site.name]), Sample(sum(streams.sizes))
            for tokens in streams.at(opened, changing, index):
                goal = goal_of(site.ffn, tokens)
                split.update(site.ffn, tokens._replace(after=goal))
                sample.add(tokens.inside, goal)
                shown.advance(task)
            m = results[site.name].act_channels
            fit = solve_ffn(site.ffn, split, m, ridge)
            refined = refine(fit.ffn, sample, roots[site.name], steps, seed)
            site.block.mlp = refined.ffn
            results[site.name] = BlockResult(site.name, site.hidden, m, fit.loss, fit.held_out, fit.ridge, refined.loss)
    opened.idle_report = list(results.values())  # type: ignore[assignment]
    return opened


def _checked_ratios(idle_ratio: float | Sequence[float], depth: int) -> list[float]:
    ratios = per_block("idle_ratio", idle_ratio, depth)
    for block, ratio in enumerate(ratios):
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            raise ValueError(f"idle_ratio: got {ratio!r} for block {block}, wanted a share of channels in [0, 1]")
    return [float(ratio) for ratio in ratios]
