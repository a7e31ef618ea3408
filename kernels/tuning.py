"""Which tile for which product: a rule of thumb that needs no table."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

from .chips import Chip


@dataclass(frozen=True)
class Config:
    """How one product [M, K] · [N, K]ᵀ is computed.

    Args:
        bm, bn, bk: tile of the result, and the step along K; powers of two, at least 16.
        warps, stages: per program; stages of the pipeline that loads tiles.
        tma: copy tiles by tensor descriptors (sm_90 and later; needs 16-byte strides, else it is not done).
        split: epilogue in two halves.
        persistent: as many programs as fit at once, each taking one tile after the other.
        norm_prologue: a LayerNorm core is computed in this kernel's own prologue, not by a kernel in front.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    tma: bool = False
    split: bool = True
    persistent: bool = False
    norm_prologue: bool = False

    def shared_memory(self, itemsize: int) -> int:
        """Bytes that the pipeline's tiles take, about; epilogues reuse them."""
        return (self.bm + self.bn) * self.bk * itemsize * self.stages


# (bm, bn, bk, warps, stages), large tiles first.
_HALF = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (16, 64, 64, 4, 4),
)
_FLOAT = ((64, 64, 32, 4, 3), (32, 32, 32, 4, 3), (16, 32, 32, 2, 3))
FEW_ROWS = 512  # below, a launch costs more than moments computed anew in every column of tiles


@functools.lru_cache(maxsize=4096)
def choose(chip: Chip, dtype: torch.dtype, m: int, n: int, k: int, aligned: bool = True) -> Config:
    """The largest tile that still gives every processor one; the smallest, if none does.

    aligned: bases and row strides of all matrices are multiples of 16 bytes.
    """
    tiles: tuple[tuple[int, int, int, int, int], ...] = _FLOAT
    if dtype != torch.float32:
        # pointers to the widest tile would take all registers, and misaligned ones do earlier
        tiles = _HALF[3 if not aligned else 0 if chip.has_tma else 1 :]
    configs = [_adapt(Config(*tile), chip, dtype) for tile in tiles if tile[1] < 2 * max(n, 32)]
    fitting = [config for config in configs if config.shared_memory(dtype.itemsize) <= chip.shared_memory]
    filling = (c for c in fitting if triton.cdiv(m, c.bm) * triton.cdiv(n, c.bn) >= chip.processors)
    return replace(next(filling, fitting[-1]), norm_prologue=m <= FEW_ROWS)


def _adapt(config: Config, chip: Chip, dtype: torch.dtype) -> Config:
    """Descriptors where there are any; no more stages than the chip's memory holds."""
    stages = 2 if chip.backend == "hip" else config.stages
    while stages > 2 and replace(config, stages=stages).shared_memory(dtype.itemsize) > chip.shared_memory:
        stages -= 1
    return replace(config, stages=stages, tma=chip.has_tma and dtype != torch.float32)
