"""Which tiles an attention gets: chunks that cover it, programs that fill the GPU, tables before rules of thumb."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from repavit_ops.kernels import tuner, tuning
from repavit_ops.kernels.attention_tiles import VENDOR, Attention, AttentionTile, choose, chunks, pieces
from repavit_ops.kernels.chips import KNOWN

BF16 = torch.bfloat16
H200 = KNOWN["sm_90"]


def images(batch, tokens, heads, d, biased=False):
    return Attention(batch, tokens, heads, d, d, biased, windows=False)


def test_pieces_and_chunks_cover_with_little_waste():
    for width in range(1, 300):
        for parts in (pieces(width), chunks(width)):
            assert all(part >= 16 and part & (part - 1) == 0 for part in parts)
            assert list(parts) == sorted(parts, reverse=True)
        assert len(pieces(width)) <= 2
        assert width <= sum(pieces(width)) <= max(32, width * 1.5)
        assert width <= sum(chunks(width)) < width + max(16, width % 128 / 2)


@pytest.mark.parametrize(("tokens", "expected"), [(197, 16), (192, 0), (1, 16), (80, 16), (120, 0), (90, 32)])
def test_tail_is_a_smaller_tile_or_none(tokens, expected):
    assert AttentionTile(64, tail=True).queries_of_tail(tokens) == expected
    assert AttentionTile(64).queries_of_tail(tokens) == 0


def test_few_programs_take_fewer_queries_each():
    assert choose(H200, BF16, images(128, 197, 12, 64)).queries == 64
    assert choose(H200, BF16, images(1, 197, 3, 64)).queries == 16


def test_windows_are_grouped_where_there_are_many():
    def group(windows):
        return choose(H200, BF16, Attention(windows, 49, 3, 32, 32, True, True)).group

    assert group(4) == 1
    assert group(128 * 64) == 8


def test_long_rows_and_wide_heads_go_online():
    assert choose(H200, BF16, images(8, 197, 12, 64)).keys == 0
    assert choose(H200, BF16, images(8, 1025, 12, 64)).keys > 0
    assert choose(H200, BF16, images(8, 197, 12, 128)).keys > 0


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write entries (kind, m, n, k, config) as the H200's table."""

    def write(*entries):
        rows = [
            {"kind": kind, "dtype": "bfloat16", "m": m, "n": n, "k": k, "config": config}
            for kind, m, n, k, config in entries
        ]
        tuning.table_path(H200.name, tmp_path).write_text(json.dumps({"entries": rows}))
        tuning.forget_tables()

    monkeypatch.setenv("REPAVIT_TUNED", str(tmp_path))
    yield write
    monkeypatch.undo()
    tuning.forget_tables()


def test_the_table_comes_first(table):
    table(
        ("attention", 1536, 197, 64, {"queries": 128, "tail": True, "warps": 8}),
        ("attention", 3, 197, 64, {"vendor": True}),
        ("window_attention", 1536, 49, 32, {"queries": 64, "group": 3}),
    )
    assert choose(H200, BF16, images(128, 197, 12, 64)) == AttentionTile(128, tail=True, warps=8)
    assert choose(H200, BF16, images(1, 197, 6, 64)) is VENDOR  # the nearest number of heads
    assert choose(H200, BF16, Attention(512, 49, 3, 32, 32, True, True)).group == 3
    rule = choose(KNOWN["sm_80"], BF16, images(128, 197, 12, 64))
    for other in (images(128, 196, 12, 64), images(128, 197, 12, 32)):
        assert choose(H200, BF16, other).tail is False
    assert rule.tail is False


def test_tables_do_not_speak_of_other_attention(table):
    """Neither of head widths that differ, nor of biases of whole images."""
    table(("attention", 1536, 197, 64, {"vendor": True}))
    assert not choose(H200, BF16, images(128, 197, 12, 64, biased=True)).vendor
    assert not choose(H200, BF16, Attention(128, 197, 12, 64, 32, False, False)).vendor


@pytest.mark.parametrize("chip", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize(("kind", "tokens", "width"), [("attention", 197, 64), ("window_attention", 49, 32)])
def test_the_tuner_has_choices_that_differ(kind, tokens, width, chip):
    for dtype in (BF16, torch.float32):
        product = tuner.Product(kind, dtype, 6144, tokens, width)
        tiles = tuner.KINDS[kind].choices(chip, product)
        everything = tiles + [v for tile in tiles for v in tuner.KINDS[kind].variants(chip, product, tile)]
        assert len(tiles) >= 3
        assert all(tile.keys < tokens for tile in everything)
        assert all(tile.keys for tile in tiles) == (
            dtype == torch.float32 or (tokens == 197 and chip.arch in (80, 89, 120))
        )
        if kind == "window_attention" and dtype == BF16:
            assert max(tile.group for tile in everything) == 16
