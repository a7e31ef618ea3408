"""Which FFNs of a model can be idled: each block opened so that its FFN is one vanilla :class:`PartialGELUFFN`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fusing import fusion_report
from ..fusing.opening import open_ffns
from ..models.swin import SwinBlock
from ..nn import Block, GatedFFN, PartialGELUFFN

FFN_LIKE = re.compile(r"mlp|ffn|glu", re.IGNORECASE)  # class names of what takes an FFN's place


class Site(NamedTuple):
    """A block whose FFN can be idled: its name in the model, the block, and its vanilla FFN in plain PyTorch."""

    name: str
    block: Block | SwinBlock
    ffn: PartialGELUFFN

    @property
    def hidden(self) -> int:
        return self.ffn.act_channels


def open_blocks(model: nn.Module, only: Collection[str] | None = None) -> tuple[nn.Module, list[Site]]:
    """A copy of ``model`` by :func:`repavit_ops.fusing.opening.open_ffns`, and the blocks whose FFN it opened.

    Raises:
        RuntimeError: the model is in training mode.
        ValueError: the FFN of a block cannot be idled (each is named with the reason), or there is no block at all.
    """
    opened = open_ffns(model, only)
    blocks = [(name, module) for name, module in opened.named_modules() if isinstance(module, Block | SwinBlock)]
    sites = [Site(name, block, ffn) for name, block in blocks if (ffn := _vanilla(block.mlp)) is not None]
    if only is not None:
        return opened, [site for site in sites if site.name in only]
    skipped = [f"{e.name}: {e.note}" for e in fusion_report(opened).skipped if FFN_LIKE.search(e.kind)]
    skipped += [f"{name}.mlp: it is gated" for name, block in blocks if isinstance(block.mlp, GatedFFN)]
    if skipped:
        raise ValueError(f"model: got FFNs that cannot be idled: {'; '.join(skipped)}")
    if not sites:
        raise ValueError(
            f"model: got a {type(model).__name__} without a block x + FFN(norm(x)) that repavit_ops knows "
            "(fusion_report(model) lists what it sees); wanted a pretrained ViT or Swin"
        )
    return opened, sites


def _vanilla(ffn: nn.Module) -> PartialGELUFFN | None:
    """The FFN if it is ``x + FFN(norm(x))`` with every hidden channel active."""
    if not isinstance(ffn, PartialGELUFFN) or ffn.norm_eps is None or not ffn.residual or ffn.act_channels == 0:
        return None
    return ffn if ffn.w_merged is None else None


# --- one block at a time ----------------------------------------------------------------------------------------------


class BlockCall(NamedTuple):
    """What a block was called with beside its tokens."""

    tokens: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    """Carries the call of the wanted block out of the model's forward."""

    def __init__(self, call: BlockCall) -> None:
        super().__init__("a block was reached")
        self.call = call


class _Passed(nn.Module):
    """Stands for a block whose output is known, or (None) for one in front of it."""

    def __init__(self, output: Tensor | None) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return x if self.output is None else self.output


class _Goal(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(BlockCall(x, args, kwargs))


def call_of(model: nn.Module, sites: list[Site], index: int, images: Tensor, previous: Tensor | None) -> BlockCall:
    """How ``sites[index]`` is called when the site before it returns ``previous`` (None: for the first site).

    Blocks that lie behind are not computed, nor is anything after: each block of a model is run once per batch,
    whatever stands between them (Swin's merging of patches, rotary tables, masks).
    """
    stands: dict[str, nn.Module] = {site.name: _Passed(None) for site in sites[:index]}
    if index:
        assert previous is not None
        stands[sites[index - 1].name] = _Passed(previous)
    stands[sites[index].name] = _Goal()
    with _standing_in(model, stands):
        try:
            model(images)
        except _Reached as reached:
            return reached.call
    raise RuntimeError(f"model: {sites[index].name} is not called by {type(model).__name__}.forward")


@contextmanager
def _standing_in(model: nn.Module, stands: dict[str, nn.Module]) -> Iterator[None]:
    originals = {name: model.get_submodule(name) for name in stands}
    for name, stand in stands.items():
        _set(model, name, stand)
    try:
        yield
    finally:
        for name, original in originals.items():
            _set(model, name, original)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = module


@torch.no_grad()
def in_call_order(model: nn.Module, sites: list[Site], images: Tensor) -> list[Site]:
    """The sites in the order in which the model calls them.

    Raises:
        ValueError: the model's output is not finite, or a block is not called exactly once for one image.
    """
    calls: list[str] = []
    handles = [
        site.block.register_forward_pre_hook(lambda _m, _a, name=site.name: calls.append(name)) for site in sites
    ]
    try:
        output = model(images)
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(output, Tensor) and not output.isfinite().all():
        raise ValueError("model: its output on the first batch is not finite; check its weights and the images")
    if wrong := [site.name for site in sites if calls.count(site.name) != 1]:
        raise ValueError(
            f"model: {', '.join(wrong)} not called exactly once per forward; blocks that share weights cannot be idled"
        )
    return sorted(sites, key=lambda site: calls.index(site.name))
