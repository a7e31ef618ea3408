"""Absolute position embeddings at other image sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_position(
    pos_embed: Tensor, source: tuple[int, int], target: tuple[int, int], prefix_tokens: int = 1
) -> Tensor:
    """Position embedding of a source grid, resampled (bicubic, antialiased, as timm does) to a target grid.

    Shapes:
        pos_embed  [1, prefix_tokens + h·w, C]    source = (h, w)
        returns    [1, prefix_tokens + h'·w', C]  target = (h', w'); prefix tokens (the class token) unchanged

    Computed in float32 (float64 for float64) and returned in the dtype of ``pos_embed``.

    Raises:
        ValueError: the embedding does not hold prefix_tokens + h·w tokens.
    """
    if pos_embed.shape[1] != prefix_tokens + source[0] * source[1]:
        raise ValueError(
            f"pos_embed: got {pos_embed.shape[1]} tokens, wanted {prefix_tokens} + {source[0]}·{source[1]}"
        )
    if source == target:
        return pos_embed
    prefix, grid = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    channels = grid.shape[-1]
    maps = grid.reshape(1, *source, channels).permute(0, 3, 1, 2)
    maps = maps if maps.dtype.itemsize > 2 else maps.float()
    maps = F.interpolate(maps, size=target, mode="bicubic", antialias=True)
    grid = maps.permute(0, 2, 3, 1).reshape(1, target[0] * target[1], channels).to(pos_embed.dtype)
    return torch.cat((prefix, grid), dim=1)
