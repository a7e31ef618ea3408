"""Fused blocks under the signatures of other libraries: what their forward takes and returns.

Each says with :meth:`enter` and :meth:`leave` when a call is one with the tokens alone, so that many blocks can be one
operator call (:mod:`repavit_ops.stack.looped_blocks`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import Block
from .foreign_block import MaskedAttention, OpenBranch, additive_mask
from .recorders import recording
from .rep_attention import RepAttention

Tables = tuple[Tensor, Tensor]  # cos and sin, each broadcastable to [B, h, tokens, width]


class Batches(NamedTuple):
    """The tokens of a call as batches that go through all blocks by themselves, each with the tables that turn it.

    ``joined`` makes of the results what callers get.
    """

    calls: list[tuple[Tensor, Tables | None]]
    joined: Callable[[list[Tensor]], Any]


class SignatureBlock(Block):
    """Base: a block whose callers pass more than x, or want more than x back."""

    def enter(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """The tokens of a call whose other arguments change nothing; None if they do."""
        raise TypeError(f"{type(self).__name__} must define enter()")

    def rotary(self, x: Tensor, *args: Any, **kwargs: Any) -> Tables | None:
        """Tables (cos, sin) that turn q and k in a call that :meth:`enter` let in; None for none."""
        return None

    def leave(self, y: Tensor, x: Tensor) -> Any:
        """What callers get for the result y, having passed x."""
        return y

    def batches(self, x: Tensor, *args: Any, **kwargs: Any) -> Batches | None:
        """The tokens of a call as they go through all blocks; None where other arguments keep them from it."""
        if (tokens := self.enter(x, *args, **kwargs)) is None:
            return None
        return Batches([(tokens, self.rotary(x, *args, **kwargs))], lambda results: self.leave(results[0], x))


class EagerAttention:
    """Whether a config of transformers asks for its "eager" attention, which alone returns maps."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self) -> bool:
        return bool(self.config._attn_implementation == "eager")


class Always:
    """Yes."""

    def __call__(self) -> bool:
        return True


class FirstOfTuple(OpenBranch):
    """An open half whose body returns a tuple: attention of transformers, with its weights."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x + self.after(self.body(self.norm(x), *args, **kwargs)[0])


# --- timm -------------------------------------------------------------------------------------------------------------


class RotaryBlock(SignatureBlock):
    """A block under the signature of timm's with rotary embedding.

    Shapes:
        x, returns  [B, T, C]
        rope        [.., tokens, 2 width]: sines, then cosines, broadcastable over images and heads; or None
        attn_mask   broadcastable to [B, h, T, T]: bool (True attends) or float, added before softmax
    """

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if isinstance(self.attn, RepAttention):
            return self.mlp(self.attn(x, additive_mask(x, attn_mask, is_causal), rotary_tables(rope)))
        return self.mlp(self.attn(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal))

    def enter(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | None:
        return x if attn_mask is None and not is_causal else None

    def rotary(self, x: Tensor, rope: Tensor | None = None, **_: Any) -> Tables | None:
        return rotary_tables(rope)


class RotaryAttention(nn.Module):
    """Attention alone under the signature of timm's with rotary embedding. Shapes as :class:`RotaryBlock`."""

    def __init__(self, attention: RepAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.attention(x, additive_mask(x, attn_mask, is_causal), rotary_tables(rope))


def rotary_tables(rope: Tensor | None) -> Tables | None:
    """timm's sines and cosines in one as (cos, sin)."""
    if rope is None:
        return None
    sin, cos = rope.chunk(2, dim=-1)
    return cos, sin


# --- transformers -----------------------------------------------------------------------------------------------------


class TransformersLayer(SignatureBlock):
    """``forward(hidden_states, attention_mask=None, **kwargs)``, as layers of transformers under SDPA.

    Shapes:
        hidden_states, returns  [B, T, C]
        attention_mask          broadcastable to [B, h, T, T]: bool (True attends) or float, added before softmax

    Attributes:
        gives_maps: whether the layer that was fused would return attention maps to whoever asks.

    Raises:
        RuntimeError: such maps are asked for; says what to do.
    """

    rotates = False

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if not isinstance(self.attn, RepAttention):
            return self.mlp(self.attn(hidden_states, attention_mask, **kwargs))
        refuse_maps(self, kwargs)
        return self.mlp(attend(self.attn, hidden_states, attention_mask, kwargs, rotates=self.rotates))

    def enter(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        named = ("attention_mask", "is_causal", "position_bias", "cu_seqlens")
        asked = (*args, *(kwargs.get(name) for name in named))
        maps = kwargs.get("output_attentions")
        return None if maps or any(value is not None and value is not False for value in asked) else x


class RotaryLayer(TransformersLayer):
    """As :class:`TransformersLayer`; its ``position_embeddings`` (cos, sin), [tokens, width] each, turn q and k."""

    rotates = True

    def rotary(self, x: Tensor, *args: Any, **kwargs: Any) -> Tables | None:
        return kwargs.get("position_embeddings")


class TransformersAttention(MaskedAttention):
    """``forward(hidden_states, attention_mask=None, **kwargs)``: attention alone, as a layer that stays calls it.

    Shapes:
        hidden_states   [B, T, C]
        attention_mask  broadcastable to [B, h, T, T]: bool (True attends) or float, added before softmax
        returns         ([B, T, C], None): what SDPA returns in place of attention maps

    Raises:
        RuntimeError: attention maps are asked for of a model that would return them; says what to do.
    """

    rotates = False

    def __init__(self, attention: RepAttention, gives_maps: EagerAttention | Always) -> None:
        super().__init__(attention)
        vars(self)["gives_maps"] = gives_maps

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        refuse_maps(self, kwargs)
        return attend(self.attention, hidden_states, attention_mask, kwargs, rotates=self.rotates), None


class TransformersRotaryAttention(TransformersAttention):
    """As :class:`TransformersAttention`, turned as :class:`RotaryLayer` is."""

    rotates = True


def refuse_maps(module: nn.Module, asked: dict[str, Any]) -> None:
    """Raise where a caller of a fused module wants attention maps that it would have returned before."""
    gives_maps: Any = module.gives_maps
    if gives_maps() and (asked.get("output_attentions") or recording("attentions")):
        raise RuntimeError(
            f"output_attentions: {type(module).__name__} is fused and has no attention maps; ask the model for them "
            "before fusing, or fuse it as loaded with attn_implementation='eager': its attention then stays"
        )


def attend(
    attention: nn.Module, x: Tensor, attn_mask: Tensor | None, asked: dict[str, Any], rotates: bool = False
) -> Tensor:
    """Attention under what transformers passes beside the tokens: a mask, ``is_causal``, a position bias, the places
    where each of several images in one sequence begins (``cu_seqlens`` [n + 1], the last of which is T), and, where it
    ``rotates``, tables to do so (``position_embeddings``)."""
    if (begins := asked.get("cu_seqlens")) is not None:
        image = torch.bucketize(torch.arange(x.shape[1], device=x.device), begins[1:].long(), right=True)
        attn_mask = image[:, None] == image
    mask = sdpa_mask(x, attn_mask, asked.get("is_causal"))
    if (bias := asked.get("position_bias")) is not None:
        mask = bias if mask is None else mask + bias
    if rotates:
        out: Tensor = attention(x, mask, tables_for(x, asked.get("position_embeddings")))
    else:
        out = attention(x) if mask is None else attention(x, mask)
    return out


def tables_for(x: Tensor, tables: Tables | None) -> Tables | None:
    """Tables that turn tokens like x: those of transformers are float32 beside float64 tokens too."""
    if tables is None or x.dtype is not torch.float64:
        return tables
    cos, sin = tables
    return cos.double(), sin.double()


class TransformersBeitLayer(TransformersLayer):
    """As :class:`TransformersLayer`, with relative position biases of its own, which depend on the image's size.

    Shapes:
        resolution  (height, width) of the image in pixels
    """

    relative_position_bias: nn.Module | None
    patch_size: int

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if self.relative_position_bias is not None:
            if resolution is None:
                raise ValueError("resolution: got None, wanted (height, width) of the image in pixels")
            window = (resolution[0] // self.patch_size, resolution[1] // self.patch_size)
            bias = self.relative_position_bias(window, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
            attention_mask = bias if attention_mask is None else bias + attention_mask
        return super().forward(hidden_states, attention_mask, **kwargs)

    def enter(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return None if self.relative_position_bias is not None else super().enter(x, *args[:1], **kwargs)


class RfDetrLayer(TransformersLayer):
    """As :class:`TransformersLayer` on images cut into windows; a layer of global attention joins those of an image.

    Shapes:
        hidden_states, returns  [B·num_windows², T, C]
    """

    num_windows: int
    global_attention: bool

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if not self.global_attention:
            return super().forward(hidden_states, attention_mask, **kwargs)
        images = hidden_states.shape[0] // self.num_windows**2
        joined = hidden_states.reshape(images, -1, hidden_states.shape[-1])
        return super().forward(joined, attention_mask, **kwargs).view(hidden_states.shape)

    def enter(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor | None:
        return None  # its layers take turns between windows and images


class VitPoseLayer(TransformersLayer):
    """As :class:`TransformersLayer`; ``dataset_index`` chooses among experts, of which a fused layer has one."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, dataset_index: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        return super().forward(hidden_states, None, **kwargs)

    def enter(self, x: Tensor, *_args: Any, **kwargs: Any) -> Tensor | None:
        return super().enter(x, **kwargs)


def sdpa_mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool | None) -> Tensor | None:
    """The arguments of PyTorch's SDPA as one float mask: True attends; a mask given is causal already."""
    if attn_mask is None:
        return causal_mask(x) if is_causal and x.shape[1] > 1 else None
    if attn_mask.dtype is x.dtype:
        return attn_mask
    for dim in range(attn_mask.dim()):
        if attn_mask.stride(dim) == 0:  # expanded, over heads say: one copy will do
            attn_mask = attn_mask.narrow(dim, 0, 1)
    if attn_mask.dtype is torch.bool:
        return torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(~attn_mask, float("-inf"))
    limits = torch.finfo(x.dtype)  # SDPA takes masks in float32 too; what is finite there must stay so
    if torch.finfo(attn_mask.dtype).max > limits.max:
        attn_mask = torch.where(attn_mask.isinf(), attn_mask, attn_mask.clamp(limits.min, limits.max))
    return attn_mask.to(x.dtype)


def causal_mask(x: Tensor) -> Tensor:
    """[T, T]: 0 up to a token's own place, -inf behind it."""
    return x.new_full((x.shape[1], x.shape[1]), float("-inf")).triu(1)


# --- nn.MultiheadAttention inside ------------------------------------------------------------------------------------


class OpenClipBlock(SignatureBlock):
    """``forward(q_x, k_x=None, v_x=None, attn_mask=None)``, as open_clip's ResidualAttentionBlock.

    Shapes:
        q_x, returns  [B, T, C], or [T, B, C] where its attention was not batch_first
        attn_mask     [T, T] or [B·h, T, T], added before softmax

    Raises:
        ValueError: k_x or v_x is given: the fused block attends to its own tokens only.
    """

    batch_first: bool
    num_heads: int

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        if k_x is not None or v_x is not None:
            raise ValueError("k_x, v_x: got other tokens to attend to; this block is fused for self-attention alone")
        x = q_x if self.batch_first else q_x.transpose(0, 1)
        if attn_mask is not None:
            attn_mask = per_head(attn_mask.to(x.dtype), self.num_heads)
        x = self.mlp(self.attn(x) if attn_mask is None else self.attn(x, attn_mask))
        return x if self.batch_first else x.transpose(0, 1)

    def get_weight_dtype(self) -> torch.dtype:
        """The dtype to which open_clip casts what it embeds."""
        return self.attn.get_parameter("w_qkv").dtype

    def enter(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if any(value is not None for value in (*args, *kwargs.values())):
            return None
        return x if self.batch_first else x.transpose(0, 1)

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.batch_first else y.transpose(0, 1)


class TorchEncoderLayer(SignatureBlock):
    """``forward(src, src_mask=None, src_key_padding_mask=None, is_causal=False)``, as nn.TransformerEncoderLayer.

    Shapes:
        src, returns          [B, T, C], or [T, B, C] without batch_first; or one sequence [T, C]
        src_mask              [T, T] or [B·h, T, T]: bool (True does not attend) or float, added before softmax
        src_key_padding_mask  [B, T], of one sequence [T]: bool (True is padding) or float
    """

    batch_first: bool
    num_heads: int

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        x = self._batched(src)
        mask = None if src_mask is None else per_head(_additive(src_mask, x), self.num_heads)
        if src_key_padding_mask is not None:
            padding = _additive(src_key_padding_mask, x).reshape(x.shape[0], 1, 1, x.shape[1])
            mask = padding if mask is None else mask + padding
        return self.leave(self.mlp(self.attn(x) if mask is None else self.attn(x, mask)), src)

    def enter(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        masks = (*args, kwargs.get("src_mask"), kwargs.get("src_key_padding_mask"))
        return None if any(mask is not None and mask is not False for mask in masks) else self._batched(x)

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return y[0]
        return y if self.batch_first else y.transpose(0, 1)

    def _batched(self, src: Tensor) -> Tensor:
        if src.dim() == 2:
            return src.unsqueeze(0)
        return src if self.batch_first else src.transpose(0, 1)


def per_head(mask: Tensor, num_heads: int) -> Tensor:
    """A mask [B·h, T, T] of nn.MultiheadAttention as [B, h, T, T]; one of [T, T] as it is."""
    return mask if mask.dim() == 2 else mask.unflatten(0, (-1, num_heads))


def _additive(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of nn.MultiheadAttention, True where not to look, as one to add."""
    if mask.dtype is not torch.bool:
        return mask.to(x.dtype)
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, float("-inf"))
