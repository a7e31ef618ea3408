"""Fused layers of transformers whose rotary tables come in another place or form, or are the layer's own; Phi-4's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .foreign_signatures import (
    RotaryLayer,
    Tables,
    TransformersAttention,
    TransformersLayer,
    TransformersRotaryAttention,
    refuse_maps,
    tables_for,
)
from .rep_attention import RepAttention


class MLCDLayer(RotaryLayer):
    """``forward(hidden_states, position_embeddings, attention_mask=None, **kwargs)``: tables in front of the mask."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: Tables, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        kwargs["position_embeddings"] = position_embeddings
        if isinstance(self.attn, RepAttention):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.mlp(self.attn(hidden_states, attention_mask=attention_mask, **kwargs))

    def enter(
        self, x: Tensor, position_embeddings: Tables, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | None:
        return super().enter(x, attention_mask, **kwargs)

    def rotary(self, x: Tensor, position_embeddings: Tables, *_: Any, **__: Any) -> Tables:
        return position_embeddings


class MLCDAttention(TransformersRotaryAttention):
    """Attention alone, its arguments as :class:`MLCDLayer`'s."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: Tables, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return super().forward(hidden_states, attention_mask, position_embeddings=position_embeddings, **kwargs)


class Llama4Layer(TransformersLayer):
    """``forward(hidden_state, freqs_ci, attention_mask=None, output_attentions=None)`` → (hidden_state[, None]).

    As Llama 4's, its attention takes no mask, whatever is given. Its tables are complex numbers, one for a pair.

    Shapes:
        hidden_state  [B, T, C]
        freqs_ci      [T, 1, width / 2], cos + i sin
    """

    def forward(  # type: ignore[override]
        self,
        hidden_state: Tensor,
        freqs_ci: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, ...]:
        if isinstance(self.attn, RepAttention):
            refuse_maps(self, {"output_attentions": output_attentions})
            x = self.attn(hidden_state, None, tables_for(hidden_state, tables_of_complex(freqs_ci)))
        else:
            x = self.attn(hidden_state, freqs_ci=freqs_ci, attention_mask=attention_mask)
        return (self.mlp(x), None) if output_attentions else (self.mlp(x),)  # type: ignore[return-value]

    def enter(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor | None:
        return None  # its encoder collects what lies between the layers


class Llama4Attention(TransformersRotaryAttention):
    """``forward(hidden_states, freqs_ci, …)``: attention alone. Shapes as :class:`Llama4Layer`."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, freqs_ci: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return super().forward(hidden_states, position_embeddings=tables_of_complex(freqs_ci), **kwargs)


def tables_of_complex(turns: Tensor) -> Tables:
    """[T, 1, width / 2] complex → (cos, sin), [T, width] each, for interleaved pairs.

    ``model.to(dtype)`` leaves of complex numbers the real part. A model that was cast so multiplies by it alone.
    """
    real, imaginary = (turns.real, turns.imag) if turns.is_complex() else (turns, torch.zeros_like(turns))
    cos, sin = (part.squeeze(1).repeat_interleave(2, dim=-1) for part in (real, imaginary))
    return cos, sin


class VJEPA2Layer(TransformersLayer):
    """``forward(hidden_states, position_mask=None, **kwargs)`` → (hidden_states, None), as V-JEPA 2's layers.

    Shapes:
        hidden_states  [B, T, C]
        position_mask  [B, T]: the places of the tokens in the whole video; None: one after the other

    Attributes:
        attention_grid: patches across and down a frame, and channels of a head that turn by each axis.
    """

    attention_grid: tuple[int, int]

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if isinstance(self.attn, RepAttention):
            refuse_maps(self, kwargs)
            x = self.attn(hidden_states, None, self.rotary(hidden_states, position_mask))
        else:
            x = self.attn(hidden_states, position_mask=position_mask)
        return self.mlp(x), None

    def enter(self, x: Tensor, *_args: Any, **kwargs: Any) -> Tensor | None:
        return None if kwargs.get("output_attentions") else x

    def rotary(self, x: Tensor, position_mask: Tensor | None = None, **_: Any) -> Tables:
        return video_tables(x, position_mask, *self.attention_grid)

    def leave(self, y: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return y, None


class VJEPA2Attention(TransformersRotaryAttention):
    """``forward(hidden_states, position_mask=None)``: attention alone. Shapes as :class:`VJEPA2Layer`."""

    attention_grid: tuple[int, int]

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        tables = video_tables(hidden_states, position_mask, *self.attention_grid)
        return super().forward(hidden_states, position_embeddings=tables, **kwargs)


def video_tables(x: Tensor, places: Tensor | None, side: int, width: int) -> Tables:
    """V-JEPA 2's tables for tokens [B, T, C]: a third of 3 width channels each for frame, row and column.

    Within a third, channel c turns by frequency c modulo width / 2, though channels 2 i and 2 i + 1 are the pair. So
    the two of a pair turn by different angles, as the authors trained it; the operator reads a number for each channel.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if places is None:
        places = torch.arange(x.shape[1], device=x.device)
    else:
        places = places[:, None]  # [B, 1, T]: the same for all heads
    axes = torch.stack((places // side**2, places // side % side, places % side), dim=-1)
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=dtype, device=x.device) * 2 / width)
    angles = (axes[..., None] * frequencies.repeat(2)).flatten(-2)
    return angles.cos(), angles.sin()


class Sam3Attention(TransformersRotaryAttention):
    """``forward(hidden_states, position_embeddings, **kwargs)``: SAM 3's attention on maps or windows of them.

    Shapes:
        hidden_states        [B, H, W, C]
        position_embeddings  (cos, sin), broadcastable to [B, h, H·W, width]
        returns              ([B, H, W, C], None)
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: Tables, **kwargs: Any
    ) -> tuple[Tensor, None]:
        tokens, _ = super().forward(hidden_states.flatten(1, 2), position_embeddings=position_embeddings, **kwargs)
        return tokens.view(hidden_states.shape), None


class CausalUnlessMasked(TransformersLayer):
    """As :class:`TransformersLayer`; without a mask its attention is causal, as that of Phi-4's vision tower.

    Transformers gives that tower a mask only where some image is padded. SDPA then takes the attention's ``is_causal``,
    which is true there: a token of an unpadded batch sees those before it alone.
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if isinstance(self.attn, RepAttention) and kwargs.get("is_causal") is None:
            kwargs["is_causal"] = attention_mask is None
        return super().forward(hidden_states, attention_mask, **kwargs)

    def enter(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor | None:
        return None  # masked in every call


class AttentionCausalUnlessMasked(TransformersAttention):
    """Attention alone, masked as :class:`CausalUnlessMasked`."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if kwargs.get("is_causal") is None:
            kwargs["is_causal"] = attention_mask is None
        return super().forward(hidden_states, attention_mask, **kwargs)
