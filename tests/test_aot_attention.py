"""The attention kernel compiles for every chip without one: memory, spills, matrix instructions (make aot: all)."""

from __future__ import annotations

import pytest
import torch
from aot_helpers import EVERYTHING, assert_products, compiled, every_chip, meta

from repavit_ops.kernels import tuner
from repavit_ops.kernels.attention import attention, window_attention
from repavit_ops.kernels.chips import KNOWN

BF16, FP32 = torch.bfloat16, torch.float32
A_FEW_BYTES = {BF16: 0, FP32: 16}  # that one register too few costs in exact products, at some widths
every_dtype = pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])


def images(batch, tokens, heads, d, dtype=BF16, biased=False):
    bias = meta(heads, tokens, tokens, dtype=dtype) if biased else None
    attention(meta(batch, tokens, 3 * heads * d, dtype=dtype), bias, heads, d, d**-0.5)


def windows(batch, size, window, heads, dtype=BF16, padding=None):
    qkv, rel_bias = meta(batch, *size, 96 * heads, dtype=dtype), meta(heads, window**2, window**2, dtype=dtype)
    shift = (window // 2, window // 2)
    window_attention(qkv, rel_bias, padding, heads, 32, 32**-0.5, (window, window), shift, False)


@every_chip
@every_dtype
def test_images_of_197_tokens(chip, dtype):
    kernels = compiled(chip, lambda: images(128, 197, 12, 64, dtype))
    assert_products(kernels["attention_kernel"], chip, none=dtype == FP32)


def test_consumer_blackwell_takes_keys_by_steps():
    """It has wgmma's successor of neither kind: with all 197 scores of a tile in registers it would spill."""
    assert_products(compiled("sm_120", lambda: images(128, 197, 12, 64))["attention_kernel"], "sm_120")


@every_chip
def test_windows_of_49_tokens(chip):
    kernels = compiled(chip, lambda: windows(128, (56, 56), 7, 3))
    assert_products(kernels["attention_kernel"], chip)


CASES = {
    "one_image": lambda dtype: images(1, 197, 3, 64, dtype),
    "tokens_50": lambda dtype: images(128, 50, 12, 64, dtype),
    "tokens_257": lambda dtype: images(128, 257, 12, 64, dtype),
    "tokens_577": lambda dtype: images(128, 577, 12, 64, dtype),
    "heads_of_32": lambda dtype: images(128, 197, 12, 32, dtype),
    "heads_of_72": lambda dtype: images(128, 257, 16, 72, dtype),
    "heads_of_80": lambda dtype: images(128, 197, 16, 80, dtype),
    "heads_of_128": lambda dtype: images(128, 197, 16, 128, dtype),
    "heads_of_256": lambda dtype: images(128, 197, 4, 256, dtype),
    "biased": lambda dtype: images(128, 197, 12, 64, dtype, biased=True),
    "one_map": lambda dtype: windows(1, (56, 56), 7, 3, dtype),
    "padded_map": lambda dtype: windows(8, (25, 42), 7, 3, dtype, padding=meta(192, dtype=dtype)),
    "windows_of_144": lambda dtype: windows(128, (24, 24), 12, 3, dtype),
}


@pytest.mark.skipif(not EVERYTHING, reason="other shapes: make aot")
@every_chip
@every_dtype
@pytest.mark.parametrize("case", CASES)
def test_other_shapes(case, dtype, chip):
    compiled(chip, lambda: CASES[case](dtype), A_FEW_BYTES[dtype])


PRODUCTS = [("attention", 197, 64), ("attention", 197, 80), ("window_attention", 49, 32)]


@pytest.mark.skipif(not EVERYTHING, reason="every tile of the tuner: make aot")
@every_chip
@every_dtype
@pytest.mark.parametrize(
    ("kind", "n", "k"), [("attention", 197, 64), ("attention", 197, 80), ("window_attention", 49, 32)]
)
def test_every_choice_of_the_tuner(chip, dtype, kind, n, k, subtests):
    product = tuner.Product(kind, dtype, 6144, n, k)
    kind_ = tuner.KINDS[kind]
    operands = kind_.operands(product, torch.device("meta"))
    first = kind_.choices(KNOWN[chip], product)
    for choice in first + [variant for tile in first for variant in kind_.variants(KNOWN[chip], product, tile)]:
        with subtests.test(choice=choice):
            compiled(chip, lambda choice=choice: kind_.run(product, operands, choice), spills=None)
