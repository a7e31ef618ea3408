"""Fused blocks of vision towers that hold images of many sizes in one sequence, and attend within each.

Qwen-VL, GLM-V and their kin tell a block where each sequence begins: an image, a frame, a window. Sequences of one
length are a batch, so a call of the operator takes all of that length; no mask of all tokens by all tokens is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .foreign_signatures import Always, Batches, RotaryLayer, SignatureBlock, Tables, refuse_maps, tables_for
from .rep_attention import RepAttention


class Packing(NamedTuple):
    """Sequences of one length after the other: their lengths, and the tokens in that order (None: as they come)."""

    lengths: tuple[int, ...]
    order: Tensor | None

    def arranged(self, x: Tensor) -> list[Tensor]:
        """[T, C] → for each length [n, length, C]."""
        if self.order is not None:
            x = x[self.order]
        counts = {length: self.lengths.count(length) for length in dict.fromkeys(self.lengths)}
        parts = x.split([length * count for length, count in counts.items()])
        return [part.unflatten(0, (counts[length], length)) for part, length in zip(parts, counts, strict=True)]

    def restored(self, parts: Sequence[Tensor]) -> Tensor:
        """What :meth:`arranged` took apart."""
        x = torch.cat([part.flatten(0, 1) for part in parts]) if len(parts) > 1 else parts[0].flatten(0, 1)
        return x if self.order is None else x[self.order.argsort()]


def packing(x: Tensor, cu_seqlens: Tensor) -> Packing:
    """How the tokens [T, C] are sequences, by where each begins.

    Raises:
        ValueError: cu_seqlens does not go from 0 up to T.
    """
    begins = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(begins)]
    if not lengths or begins[0] != 0 or begins[-1] != x.shape[0] or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens: got {begins[:8]}{' ...' if len(begins) > 8 else ''} for {x.shape[0]} tokens, wanted where "
            f"each sequence begins, in order, from 0 on, and {x.shape[0]} at the end"
        )
    given = tuple(length for length in lengths if length)
    ranks = {length: i for i, length in enumerate(dict.fromkeys(given))}
    grouped = tuple(sorted(given, key=ranks.__getitem__))
    if grouped == given:
        return Packing(given, None)
    places = torch.arange(x.shape[0], device=x.device).split(given)
    return Packing(grouped, torch.cat(sorted(places, key=lambda place: ranks[place.shape[0]])))


def batches(x: Tensor, cu_seqlens: Tensor, tables: Tables | None) -> Batches:
    """The sequences of each length as a batch, with the tables that turn them ([n, 1, length, width])."""
    if tables is None:
        raise ValueError("position_embeddings: got None, wanted (cos, sin), as the tower makes them of its positions")
    packed = packing(x, cu_seqlens)
    cos, sin = ([part.unsqueeze(1) for part in packed.arranged(table)] for table in tables_for(x, tables) or ())
    return Batches(list(zip(packed.arranged(x), zip(cos, sin, strict=True), strict=True)), packed.restored)


def attend_within(attention: nn.Module, x: Tensor, cu_seqlens: Tensor, tables: Tables | None) -> Tensor:
    """Attention of the tokens [T, C] within each sequence: a call for each length."""
    calls, restored = batches(x, cu_seqlens, tables)
    attended: Tensor = restored([attention(tokens, None, turn) for tokens, turn in calls])
    return attended


class PackedSequenceBlock(SignatureBlock):
    """``forward(hidden_states, cu_seqlens, position_embeddings, **kwargs)``, as blocks of Qwen-VL's and GLM-V's towers.

    Shapes:
        hidden_states, returns  [T, C]
        cu_seqlens              [n + 1]: where each sequence begins, and T
        position_embeddings     (cos, sin), [T, width] each

    Raises:
        ValueError: cu_seqlens does not part the tokens, or there are no tables.
        RuntimeError: attention maps are asked for.
    """

    gives_maps = Always()

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Tables | None = None, **kwargs: Any
    ) -> Tensor:
        if isinstance(self.attn, RepAttention):
            refuse_maps(self, kwargs)
            return self.mlp(attend_within(self.attn, hidden_states, cu_seqlens, position_embeddings))
        given = {"cu_seqlens": cu_seqlens, "position_embeddings": position_embeddings, **kwargs}
        return self.mlp(self.attn(hidden_states, **given))

    def batches(
        self, x: Tensor, cu_seqlens: Tensor, position_embeddings: Tables | None = None, **kwargs: Any
    ) -> Batches | None:
        return None if kwargs.get("output_attentions") else batches(x, cu_seqlens, position_embeddings)


class PackedSequenceAttention(nn.Module):
    """Attention alone under the signature of :class:`PackedSequenceBlock`, whose errors it raises too."""

    gives_maps = Always()

    def __init__(self, attention: RepAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Tables | None = None, **kwargs: Any
    ) -> Any:
        refuse_maps(self, kwargs)
        return attend_within(self.attention, hidden_states, cu_seqlens, position_embeddings)


class PackedSequenceAttentionTuple(PackedSequenceAttention):
    """As :class:`PackedSequenceAttention`, which returns ([T, C], None)."""

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Tables | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return super().forward(hidden_states, cu_seqlens, position_embeddings, **kwargs), None


class BlockMaskedLayer(RotaryLayer):
    """As :class:`RotaryLayer`; where the mask parts one sequence into images, as Pixtral's does, they go one by one.

    Shapes:
        hidden_states        [B, T, C]
        attention_mask       broadcastable to [B, h, T, T]: bool (True attends) or float, added before softmax
        position_embeddings  (cos, sin), [T, width] each
    """

    def batches(self, x: Tensor, *args: Any, **kwargs: Any) -> Batches | None:
        given = dict(zip(("attention_mask",), args, strict=False)) | kwargs
        mask, tables = given.pop("attention_mask", None), given.get("position_embeddings")
        begins = None if mask is None or tables is None or x.shape[0] != 1 else begins_of(mask)
        if begins is None or self.enter(x, **given) is None:
            return super().batches(x, *args, **kwargs)
        calls, restored = batches(x[0], begins, tables)
        return Batches(calls, lambda results: restored(results)[None])


def begins_of(mask: Tensor) -> Tensor | None:
    """Where each block of a mask begins that lets tokens attend within blocks alone, and T; None of any other mask.

    Shapes:
        mask     [.., T, T]: bool (True attends), or float: 0 attends, the lowest number of its dtype or -inf does not
        returns  [n + 1]
    """
    if mask.shape.numel() != mask.shape[-1] ** 2:
        return None
    mask = mask.reshape(mask.shape[-2:])
    attends = mask if mask.dtype is torch.bool else mask == 0
    first = attends.to(torch.uint8).argmax(-1)
    if not torch.equal(attends, first[:, None] == first) or bool((first.diff() < 0).any()):
        return None
    if mask.dtype is not torch.bool and not torch.all(attends | (mask <= torch.finfo(mask.dtype).min)):
        return None
    begins = torch.unique_consecutive(first)
    return torch.cat((begins, begins.new_tensor([mask.shape[-1]])))
