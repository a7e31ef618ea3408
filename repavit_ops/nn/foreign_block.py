"""What the blocks of other libraries become when they are fused: closed halves behind the signature that callers know.

Such a block keeps norm, branch and scale as children of its own. :class:`OpenBranch` gathers one half of it, still in
plain PyTorch, so that each half can be fused, or stay, alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .block import Block
from .rep_attention import RepAttention
from .symbolic import is_proxy, result_of


class OpenBranch(nn.Module):
    """One half of a block: ``x + after(body(norm(x)))``; further arguments go to the body.

    Args:
        norm: the norm in front. body: attention or FFN. after: LayerScale and DropPath.
    """

    def __init__(self, norm: nn.Module, body: nn.Module, *after: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.body = body
        self.after = nn.Sequential(*after)
        self.train(body.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x + self.after(self.body(self.norm(x), *args, **kwargs))


class ChannelScale(nn.Module):
    """LayerScale of blocks that hold its vector ``gamma`` [C] themselves."""

    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ForwardingBlock(Block):
    """``mlp(attn(x, …))``: whatever comes beside x (rotary embeddings, position biases, masks) goes to attention."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.mlp(self.attn(x, *args, **kwargs))


class MaskedBlock(Block):
    """:class:`Block` under timm's signature.

    Shapes:
        x, returns  [B, T, C]
        attn_mask   broadcastable to [B, h, T, T]: bool (True attends) or float, added before softmax

    Raises:
        ValueError: both attn_mask and is_causal, or a mask that does not broadcast.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not is_proxy(x) and attn_mask is None and not is_causal:
            return self.mlp(self.attn(x))
        return self.mlp(self.attn(x, additive_mask(x, attn_mask, is_causal)))


class MaskedAttention(nn.Module):
    """Attention alone under timm's signature: no norm, no shortcut. Shapes and errors as :class:`MaskedBlock`."""

    def __init__(self, attention: RepAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.attention(x, additive_mask(x, attn_mask, is_causal))


class BiasedAttention(nn.Module):
    """Attention with relative position biases that were gathered when it was fused, and more that callers may add.

    Shapes:
        x, returns           [B, T, C]
        bias                 [1, h, T, T], or None
        shared_rel_pos_bias  broadcastable to [B, h, T, T], or None
    """

    def __init__(self, attention: RepAttention, bias: Tensor | None) -> None:
        super().__init__()
        self.attention = attention
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        given = [bias for bias in (self.bias, shared_rel_pos_bias) if bias is not None]
        return self.attention(x, sum(given[1:], given[0]) if given else None)

    def set_window_size(self, *_args: Any, **_kwargs: Any) -> None:
        """Raises RuntimeError: timm would resize the biases here, which are fused."""
        raise RuntimeError(
            "set_input_size: this attention is fused, its position biases are settled; "
            "call set_input_size on the unfused model, then fuse it"
        )


class FixedWindowBlock(Block):
    """:class:`Block` whose window, shift and position bias were settled when it was fused (Swin)."""

    def set_input_size(self, *_args: Any, **_kwargs: Any) -> None:
        """Raises RuntimeError: timm would resize window and position bias here, which are fused."""
        raise RuntimeError(
            "set_input_size: this Swin block is fused, its window and position bias are settled; "
            "call set_input_size on the unfused model, then fuse it"
        )


def additive_mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """timm's two ways to mask as one float mask, 0 where a token attends and -inf where it does not."""
    if is_proxy(x):
        return result_of(additive_mask, x, attn_mask, is_causal)
    if is_causal:
        if attn_mask is not None:
            raise ValueError("attn_mask, is_causal: got both, wanted one (attn_mask can hold the causal mask)")
        return x.new_full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
    if attn_mask is None or attn_mask.dtype is not torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(~attn_mask, float("-inf"))
