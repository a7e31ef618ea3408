"""Blocks that their owner's forward loops over, in one operator call.

Encoders of transformers, open_clip and PyTorch hold their layers in an ``nn.ModuleList`` and call one after the other.
While such an encoder's forward runs, and only then, iterating over the list yields a single callable that stands for
all layers. Everywhere else the list is what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.plain_call import why_not_plain
from ..nn.recorders import recording
from ..nn.stand_in import own_class
from .block_runs import BlockRuns, steps_of

_WHOLE: ContextVar[tuple[int, ...]] = ContextVar("blocks that are iterated over as one", default=())


class LoopedBlocks(BlockRuns, nn.ModuleList):
    """The ``nn.ModuleList`` of an encoder's layers, all of them fused.

    Keys, indexing, slices, iteration and every single block stay what they were. Calls with masks, hooks, gradients,
    autocast or ``torch.compile``, and other devices than the CPU take the blocks one by one (:meth:`why_apart`). The
    result is the same, bit for bit.
    """

    def __init__(self, blocks: Iterable[nn.Module] | None = None) -> None:
        super().__init__(blocks)
        self._routes = {}

    @classmethod
    def replacing(cls, blocks: nn.Module) -> LoopedBlocks:
        """A list of the very children of ``blocks``, under their names."""
        looped = cls()
        looped.__dict__.update(blocks.__dict__)
        return looped

    @staticmethod
    def can_replace(blocks: Any) -> bool:
        """Whether the children are at least two blocks of one signature, fused in both halves."""
        if type(blocks) is not nn.ModuleList or len(blocks) < 2:
            return False
        alike = {own_class(block) for block in blocks}
        return len(alike) == 1 and all(hasattr(b, "enter") and steps_of(b) is not None for b in blocks)

    def __iter__(self) -> Iterator[nn.Module]:
        if not torch.compiler.is_compiling() and id(self) in _WHOLE.get():
            every: Any = (self._all,)
            return iter(every)
        return super().__iter__()

    def _all(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What calling one block after the other gives."""
        blocks: Any = list(self._modules.values())
        batches = blocks[0].batches(x, *args, **kwargs)
        if batches is not None and not recording() and not any(self._why_one_by_one(*call) for call in batches.calls):
            routes = [route for tokens, _ in batches.calls if (route := self._route(tokens)) is not None]
            if len(routes) == len(batches.calls):
                return batches.joined([route.run(*call) for route, call in zip(routes, batches.calls, strict=True)])
        result = x
        for block in blocks:
            result = block(result[0] if isinstance(result, tuple) else result, *args, **kwargs)
        return result

    def _why_one_by_one(self, tokens: Tensor, rotary: tuple[Tensor, Tensor] | None) -> str | None:
        """What of a call needs every block called by itself, in one line."""
        if torch.is_grad_enabled() and rotary is not None and any(t.requires_grad for t in rotary):
            return "gradients of the rotary tables are wanted"
        return why_not_plain(self, tokens)


class LoopOwner(nn.Module):
    """What an encoder becomes besides its own class: its forward sees the blocks named ``loops_over`` as one."""

    loops_over: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        original: Any = cls.__mro__[2]

        @wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            blocks = self._modules.get(self.loops_over)
            if torch.compiler.is_compiling() or not isinstance(blocks, LoopedBlocks):
                return original.forward(self, *args, **kwargs)
            token = _WHOLE.set((*_WHOLE.get(), id(blocks)))
            try:
                return original.forward(self, *args, **kwargs)
            finally:
                _WHOLE.reset(token)

        cls.forward = forward
