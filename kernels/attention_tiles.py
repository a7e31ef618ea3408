"""How one attention is computed: its tiles, from this GPU's table where it has one, else from a rule of thumb."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

from . import tuning
from .chips import Chip

AT_ONCE = 272  # keys whose scores fit the registers beside all else, where operands of products come from memory
AT_ONCE_IN_REGISTERS = 128  # the same where they stand in registers too (chips.py: multiplies_from_memory)
KINDS = {False: "attention", True: "window_attention"}  # of tables, by Attention.windows


@dataclass(frozen=True)
class Attention:
    """What a choice of tiles depends on: how many sequences (images or windows), their tokens, heads, head widths."""

    sequences: int
    tokens: int
    heads: int
    d_qk: int
    d_v: int
    biased: bool
    windows: bool

    @property
    def columns(self) -> int:
        """Columns of a head in registers, the wider of q, k and v."""
        return max(sum(pieces(self.d_qk)), sum(pieces(self.d_v)))


@dataclass(frozen=True)
class AttentionTile:
    """How one attention is computed.

    Args:
        queries: of a tile; a power of two, at least 16.
        keys: of a step of the online softmax; 0: the scores of all keys at once.
        tail: the queries left over from the last full tile get a smaller tile of their own.
        warps, stages: per program; stages of the loop's software pipeline.
        group: sequences that a program takes one after the other.
        vendor: leave it to PyTorch's scaled_dot_product_attention; the rest is ignored.
    """

    queries: int
    keys: int = 0
    tail: bool = False
    warps: int = 4
    stages: int = 1
    group: int = 1
    vendor: bool = False

    def chunks_of_keys(self, tokens: int) -> tuple[int, ...]:
        """Keys of the steps: those of all steps where they are at once, else those of every step."""
        return (self.keys,) if self.keys else chunks(tokens)

    def queries_of_tail(self, tokens: int) -> int:
        """Queries of the smaller last tile; 0 if there is none."""
        rest = max(16, triton.next_power_of_2(tokens % self.queries))
        return rest if self.tail and tokens % self.queries and rest < self.queries else 0


VENDOR = AttentionTile(0, vendor=True)


@functools.cache
def pieces(width: int) -> tuple[int, ...]:
    """One or two powers of two from 16 up that add up to a head's width or more: 80 → (64, 16), 72 → (64, 16)."""
    whole = max(16, triton.next_power_of_2(width))
    half = whole // 2
    rest = max(16, triton.next_power_of_2(width - half)) if width > half >= 16 else half
    return (whole,) if half + rest >= whole else (half, rest)


@functools.cache
def chunks(tokens: int) -> tuple[int, ...]:
    """Powers of two from 16 to 128 that add up to this many keys or a few more: 197 → (128, 64, 16)."""
    whole, rest = divmod(tokens, 128)
    return (128,) * whole + (pieces(rest) if rest else ())


def choose(chip: Chip, dtype: torch.dtype, attention: Attention) -> AttentionTile:
    """The tiles of one attention. Tables hold heads of one width, and biases only of windows."""
    if attention.d_qk == attention.d_v and attention.biased == attention.windows:
        rows = attention.sequences * attention.heads
        kind = KINDS[attention.windows]
        entry = tuning.lookup(kind, chip, dtype, rows, attention.tokens, attention.d_qk)
        if entry is not None:
            return VENDOR if entry.get("vendor") else AttentionTile(**entry)
    return _rule(chip, dtype, attention)


@functools.lru_cache(maxsize=1024)
def _rule(chip: Chip, dtype: torch.dtype, attention: Attention) -> AttentionTile:
    """What fits the registers of every chip (tests/test_aot_attention.py); fewer queries where programs are few."""
    tile = _largest(chip, dtype, attention)
    programs = attention.sequences * attention.heads
    while tile.queries > 16 and programs * triton.cdiv(attention.tokens, tile.queries) < chip.processors:
        tile = replace(tile, queries=tile.queries // 2)
    return replace(tile, group=min(tile.group, max(1, programs // (8 * chip.processors))))


def _largest(chip: Chip, dtype: torch.dtype, attention: Attention) -> AttentionTile:
    tokens, columns = attention.tokens, attention.columns
    queries = min(64, max(16, triton.next_power_of_2(tokens)))
    if dtype == torch.float32:
        return AttentionTile(min(queries, 32), keys=16)
    if columns > 128:
        return AttentionTile(min(queries, 32), keys=32)
    roomy = chip.multiplies_from_memory
    if attention.windows and columns <= 32 and tokens <= 64:
        return AttentionTile(queries, stages=2 if roomy else 1, group=8)
    if attention.windows and columns <= 32:
        return AttentionTile(queries, keys=64, stages=2)
    if attention.biased:  # loaded element by element: many addresses
        return AttentionTile(queries, keys=32, warps=8)
    if fits_at_once(chip, dtype, tokens, columns):
        return AttentionTile(queries)
    narrow = not roomy and (columns > 64 or chip.backend == "hip")  # sums and operands would not fit the registers
    return AttentionTile(queries, keys=32 if narrow else 64, stages=2)


def fits_at_once(chip: Chip, dtype: torch.dtype, tokens: int, columns: int) -> bool:
    """Whether all scores of a tile of queries stand in registers without spills: heads of this many columns."""
    most = AT_ONCE if chip.multiplies_from_memory else AT_ONCE_IN_REGISTERS
    return dtype != torch.float32 and columns <= 64 and tokens <= most
