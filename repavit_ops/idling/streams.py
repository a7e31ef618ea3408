"""Two models walked block by block over the same images: the original, and the one that is being changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Site, call_of
from .scratch import Scratch

HOLD_OUT = 5  # every fifth image chooses the ridge


class Tokens(NamedTuple):
    """One batch at one block.

    Attributes:
        inside: what the changed model gives to the block's FFN, [B, t, C].
        after: what the original model has behind the block, [B, t, C].
        held_out: which images are held out, bool [B].
    """

    inside: Tensor
    after: Tensor
    held_out: Tensor


class Streams:
    """Images and the tokens of both models, on disk from block to block.

    Args:
        scratch: where they are kept. loader: the images, read once. like: their dtype and device inside the models.
        sampled: how many tokens of an image are handed out, drawn anew for every batch and block; None: all.
        seed: of that draw.

    Attributes:
        tokens_per_image: of the block that was walked over last. sampled: may be changed between two walks.

    Raises:
        TypeError, ValueError: as :func:`images_of`; the loader is empty; sampled is below 1.
    """

    def __init__(
        self, scratch: Scratch, loader: Iterable[Any], like: Tensor, sampled: int | None = None, seed: int = 0
    ) -> None:
        if sampled is not None and sampled < 1:
            raise ValueError(f"tokens_per_image: got {sampled}, wanted at least 1, or None for all")
        self.scratch, self.like, self.sizes = scratch, like, list[int]()
        self.sampled, self.seed, self.tokens_per_image = sampled, seed, 0
        for batch, item in enumerate(loader):
            images = images_of(item, f"loader: batch {batch}")
            scratch.put("images", batch, images)
            self.sizes.append(len(images))
        if not self.sizes:
            raise ValueError("loader: got no batches, wanted batches of calibration images [B, 3, H, W]")

    def __len__(self) -> int:
        return len(self.sizes)

    def get(self, name: str, batch: int) -> Tensor:
        return self.scratch.get(name, batch).to(self.like)

    def batches_of(self, images: int) -> int:
        """How many batches hold that many images; all where there are not as many."""
        total = 0
        for count, size in enumerate(self.sizes, start=1):
            total += size
            if total >= images:
                return count
        return len(self)

    def first_images(self, count: int) -> Tensor:
        """The first ``count`` images, or all of them."""
        return torch.cat([self.get("images", batch) for batch in range(self.batches_of(count))])[:count]

    def held_out(self, batch: int) -> Tensor:
        first = sum(self.sizes[:batch])
        return (torch.arange(first, first + self.sizes[batch]) % HOLD_OUT == HOLD_OUT - 1).to(self.like.device)

    def at(self, model: nn.Module, sites: list[Site], index: int) -> Iterator[Tokens]:
        """Every batch at ``sites[index]``, which must follow a walk over the site before it.

        That site's ``block.mlp`` is what the changed model has there by now; ``ffn`` is what the original has.

        Raises:
            ValueError: tokens are not finite; names block and batch.
        """
        site, before = sites[index], sites[index - 1] if index else None
        for batch in range(len(self)):
            images = self.get("images", batch)
            previous = None if before is None else self.get("after", batch)
            inside = inside_of(site, model, sites, index, images, previous)
            after = site.ffn(inside)
            if before is not None:
                inside = inside_of(site, model, sites, index, images, before.block.mlp(self.get("inside", batch)))
            if not (after.isfinite().all() and inside.isfinite().all()):
                raise ValueError(f"model: the tokens of {site.name} are not finite on batch {batch}; check the images")
            self.scratch.put("after", batch, after)
            self.scratch.put("inside", batch, inside)
            self.tokens_per_image = inside[0, ..., 0].numel()
            chosen = self._draw(index, batch)
            inside, after = (t.flatten(1, -2)[:, chosen] for t in (inside, after))
            yield Tokens(inside, after, self.held_out(batch))

    def _draw(self, index: int, batch: int) -> Tensor:
        """Which tokens of the images of one batch enter the statistics of one block."""
        every = torch.arange(self.tokens_per_image, device=self.like.device)
        if self.sampled is None or self.sampled >= len(every):
            return every
        generator = torch.Generator().manual_seed((self.seed * 1_000 + index) * 1_000_000 + batch)
        return every[torch.randperm(len(every), generator=generator)[: self.sampled]]


def inside_of(
    site: Site, model: nn.Module, sites: list[Site], index: int, images: Tensor, previous: Tensor | None
) -> Tensor:
    """What the FFN of ``sites[index]`` is given when the site before it returns ``previous``."""
    call = call_of(model, sites, index, images, previous)
    mlp, site.block.mlp = site.block.mlp, nn.Identity()
    try:
        return site.block(call.tokens, *call.args, **call.kwargs)
    finally:
        site.block.mlp = mlp


def images_of(item: Any, origin: str) -> Tensor:
    """The images of what a loader yields: a tensor, or the first of a tuple or list.

    Raises:
        TypeError: there is no tensor. ValueError: it is no batch of images, empty, no float, or not finite.
    """
    images = item[0] if isinstance(item, tuple | list) and item else item
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{origin}: got {type(item).__name__}, wanted images [B, 3, H, W], or a tuple or list that begins with them"
        )
    if images.dim() != 4 or not len(images):
        raise ValueError(f"{origin}: got a tensor of shape {list(images.shape)}, wanted images [B, 3, H, W]")
    if not images.is_floating_point():
        raise ValueError(f"{origin}: got images of {images.dtype}, wanted floats, normalised as the model wants them")
    if not images.isfinite().all():
        raise ValueError(f"{origin}: got images with NaN or infinity")
    return images
