"""Fused layers of transformers' models whose forward takes or returns something of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .foreign_signatures import RfDetrLayer, SignatureBlock, TransformersLayer


class TupleLayer(TransformersLayer):
    """As :class:`TransformersLayer`, returning ``(hidden_states,)``: FLAVA's and ViLT's layers.

    Shapes:
        hidden_states   [B, T, C]
        attention_mask  broadcastable to [B, h, T, T], float, added before softmax
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor]:
        return (super().forward(hidden_states, attention_mask, output_attentions=output_attentions),)

    def enter(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor | None:
        return None  # its encoder collects what lies between the layers


class MllamaLayer(TransformersLayer):
    """As :class:`TransformersLayer`; without a mask, its attention is causal under SDPA (it has no ``is_causal``)."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        return super().forward(hidden_states, attention_mask, is_causal=attention_mask is None)

    def enter(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor | None:
        return None  # as TupleLayer


class LwDetrLayer(RfDetrLayer):
    """As :class:`RfDetrLayer`, which attends within ``window``s or else joins all ``num_windows`` of an image.

    Shapes:
        hidden_states, returns  [B·num_windows, T, C]
    """

    window: bool

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if self.window:
            return TransformersLayer.forward(self, hidden_states, attention_mask, **kwargs)
        joined = hidden_states.reshape(hidden_states.shape[0] // self.num_windows, -1, hidden_states.shape[-1])
        return TransformersLayer.forward(self, joined, attention_mask, **kwargs).view(hidden_states.shape)


class BridgeTowerBlock(SignatureBlock):
    """``forward(hidden_state, attention_mask=None)``, as BridgeTower's residual attention.

    Shapes:
        hidden_state, returns  [T, B, C]
        attention_mask         [B, T]: nonzero does not attend
    """

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = hidden_state.transpose(0, 1)
        if attention_mask is None:
            return self.mlp(self.attn(x)).transpose(0, 1)
        hidden = torch.zeros(attention_mask.shape, dtype=x.dtype, device=x.device)
        mask = hidden.masked_fill(attention_mask.to(torch.bool), float("-inf"))[:, None, None]
        return self.mlp(self.attn(x, mask)).transpose(0, 1)

    def enter(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor | None:
        return None  # its encoder returns what lies between the blocks
