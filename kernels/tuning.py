"""Which tile for which product: the table of this GPU where it has one, else a rule of thumb.

Nothing here runs a kernel. Tables are written by the command ``repavit-ops tune`` (tuner.py), one JSON file per GPU in
``tuned/``; the environment variable REPAVIT_TUNED names a folder whose tables come first.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
        split: epilogue in two halves, in half the registers.
        persistent: programs per processor, each taking one tile after the other; 0 is a program for every tile.
        norm_prologue: a LayerNorm core is computed in this kernel's own prologue, not by a kernel in front.
        vendor: leave the product to cuBLAS or hipBLASLt; the rest is ignored.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    tma: bool = False
    split: bool = True
    persistent: int = 0
    norm_prologue: bool = False
    vendor: bool = False

    def shared_memory(self, itemsize: int) -> int:
        """Bytes that the tiles in the pipeline take, and the one that a descriptor stores from."""
        stored = self.bm * self.stored_columns if self.tma else 0
        return ((self.bm + self.bn) * self.bk * self.stages + stored) * itemsize

    @property
    def stored_columns(self) -> int:
        """Columns of the result that are written at once."""
        return self.bn // 2 if self.split else self.bn

    def grid(self, chip: Chip, m: int, n: int) -> tuple[int]:
        tiles = triton.cdiv(m, self.bm) * triton.cdiv(n, self.bn)
        return (min(tiles, self.persistent * chip.processors) if self.persistent else tiles,)


@dataclass(frozen=True)
class OnChip:
    """How the one-launch FFN is computed: rows and columns of a tile, columns of h at a time (on_chip_ffn.py)."""

    bm: int
    bh: int
    bc: int
    warps: int
    stages: int
    tma: bool = False

    def shared_memory(self, itemsize: int, c: int) -> int:
        """Bytes, about: the rows of x, and the weights' tiles in the pipeline."""
        wide = triton.cdiv(c, self.bc) * self.bc
        return (self.bm * wide + 2 * self.bh * wide * self.stages) * itemsize


VENDOR = Config(0, 0, 0, 0, 0, vendor=True)

# The rule of thumb. (bm, bn, bk, warps, stages), large tiles first.
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
ON_CHIP_CHANNELS = 192  # above, weights read again by every program cost more than h written and read once
ON_CHIP_ROWS = 4096  # below, two launches of many small tiles fill more processors


def choose(kind: str, chip: Chip, dtype: torch.dtype, m: int, n: int, k: int, aligned: bool = True) -> Config:
    """Tile of a product of this kind: "linear", with "_norm" and "_gelu" where it has them, or "two_source".

    aligned: bases and row strides of all matrices are multiples of 16 bytes; tables hold only such products.
    """
    entry = lookup(kind, chip, dtype, m, n, k) if aligned else None
    if entry is None:
        return _rule(chip, dtype, m, n, k, aligned)
    return VENDOR if entry.get("vendor") else Config(**entry)


def choose_on_chip(chip: Chip, dtype: torch.dtype, m: int, c: int, hidden: int) -> OnChip | None:
    """Tile of the one-launch FFN; None if it does not pay, or does not fit on this chip."""
    entry = lookup("on_chip", chip, dtype, m, c, hidden)
    if entry is not None:
        return OnChip(**entry) if entry else None
    pays = dtype != torch.float32 and chip.has_tma and c <= ON_CHIP_CHANNELS and m >= ON_CHIP_ROWS and hidden > 0
    config = OnChip(128, 64, 64, 8, 3, tma=True)
    return config if pays and config.shared_memory(dtype.itemsize, c) <= chip.shared_memory else None


@functools.lru_cache(maxsize=4096)
def _rule(chip: Chip, dtype: torch.dtype, m: int, n: int, k: int, aligned: bool) -> Config:
    """The largest tile that still gives every processor one; the smallest, if none does."""
    tiles: tuple[tuple[int, int, int, int, int], ...] = _FLOAT
    if dtype != torch.float32:
        # pointers to the widest tile would take all registers, and misaligned ones do earlier
        tiles = _HALF[3 if not aligned else 0 if chip.has_tma else 1 :]
    configs = [_adapt(Config(*tile), chip, dtype) for tile in tiles if tile[1] < 2 * max(n, 64)]
    fitting = [config for config in configs if config.shared_memory(dtype.itemsize) <= chip.shared_memory]
    filling = (c for c in fitting if triton.cdiv(m, c.bm) * triton.cdiv(n, c.bn) >= chip.processors)
    return replace(next(filling, fitting[-1]), norm_prologue=m <= FEW_ROWS)


def _adapt(config: Config, chip: Chip, dtype: torch.dtype) -> Config:
    """Descriptors where there are any; no more stages than the chip's memory holds."""
    config = replace(config, tma=chip.has_tma and dtype != torch.float32)
    stages = 2 if chip.backend == "hip" else config.stages
    while stages > 2 and replace(config, stages=stages).shared_memory(dtype.itemsize) > chip.shared_memory:
        stages -= 1
    return replace(config, stages=stages)


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """What a table is asked for: rows m, columns n, terms k of one product (or their like) in a dtype."""

    kind: str
    dtype: torch.dtype
    m: int
    n: int
    k: int


_asked: set[Product] | None = None


def lookup(kind: str, chip: Chip, dtype: torch.dtype, m: int, n: int, k: int) -> dict[str, Any] | None:
    """The table's entry for this kind, dtype, n and k at the nearest m (by ratio); None if there is none."""
    if _asked is not None:
        _asked.add(Product(kind, dtype, m, n, k))
    return _nearest(kind, chip.name, dtype, m, n, k)


@contextmanager
def recording() -> Iterator[set[Product]]:
    """Collect every product that is looked up inside: what a model's forward should be tuned for."""
    global _asked
    before, _asked = _asked, set()
    try:
        yield _asked
    finally:
        _asked = before


def table_path(name: str, folder: Path) -> Path:
    """File of a GPU's table."""
    return folder / (re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower() + ".json")


def folders() -> list[Path]:
    """Where tables are looked for, first come first."""
    own = os.environ.get("REPAVIT_TUNED")
    return ([Path(own)] if own else []) + [Path(__file__).with_name("tuned")]


def forget_tables() -> None:
    """Read the tables anew at the next lookup."""
    _table.cache_clear()
    _nearest.cache_clear()


@functools.lru_cache(maxsize=4096)
def _nearest(kind: str, name: str, dtype: torch.dtype, m: int, n: int, k: int) -> dict[str, Any] | None:
    entries = _table(name).get((kind, str(dtype).removeprefix("torch."), n, k))
    if not entries:
        return None
    return min(entries, key=lambda entry: abs(math.log(entry["m"] / max(m, 1))))["config"]


@functools.cache
def _table(name: str) -> dict[tuple[str, str, int, int], list[dict[str, Any]]]:
    table: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
    for folder in reversed(folders()):
        path = table_path(name, folder)
        if path.exists():
            own: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
            for entry in json.loads(path.read_text())["entries"]:
                own.setdefault((entry["kind"], entry["dtype"], entry["n"], entry["k"]), []).append(entry)
            table |= own
    return table
