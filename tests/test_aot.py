"""Every GEMM kernel compiles for every chip without one: memory, spills, matrix instructions (make aot: every tile)."""

from __future__ import annotations

import pytest
import torch
import triton
from aot_helpers import CHIPS, EVERYTHING, assert_products, compiled, every_chip, meta

from repavit_ops.kernels import tuner, tuning
from repavit_ops.kernels.aot import Resources, compiling_for, resources
from repavit_ops.kernels.attention import attention, window_attention
from repavit_ops.kernels.chips import KNOWN, Chip
from repavit_ops.kernels.gated_ffn import gated_ffn
from repavit_ops.kernels.linear import linear
from repavit_ops.kernels.partial_gelu_ffn import partial_gelu_ffn
from repavit_ops.kernels.query_key_rows import query_key_rows
from repavit_ops.kernels.rep_attention import rep_attention

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = 128 * 197
few_chips = pytest.mark.parametrize("chip", CHIPS if EVERYTHING else ("sm_90",))


@every_chip
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_linear(chip, dtype):
    def call():
        x, w, b = meta(ROWS, 768, dtype=dtype), meta(768, 768, dtype=dtype), meta(768, dtype=dtype)
        linear(x, w, b, activation="gelu", residual=x)

    kernels = compiled(chip, call)
    assert_products(kernels["linear_kernel"], chip, none=dtype == FP32)


@every_chip
def test_few_rows_normalise_in_the_prologue(chip):
    kernels = compiled(chip, lambda: linear(meta(197, 192), meta(576, 192), meta(576), norm_eps=1e-6))
    assert list(kernels) == ["linear_kernel"]
    assert_products(kernels["linear_kernel"], chip, small=True)


@every_chip
def test_many_rows_normalise_in_front(chip):
    kernels = compiled(chip, lambda: linear(meta(ROWS, 192), meta(576, 192), meta(576), norm_eps=1e-6))
    assert list(kernels) == ["layer_norm_core_kernel", "linear_kernel"]


def test_misaligned_rows_take_pointers():
    """Descriptors need strides of 16 bytes; 771 channels of bf16 have none."""
    kernels = compiled("sm_90", lambda: linear(meta(ROWS, 771), meta(768, 771)))
    assert "cp.async.bulk.tensor" not in kernels["linear_kernel"].code


def ffn(c, m, dtype=BF16, **static):
    tensors = meta(ROWS, c), meta(m, c), meta(m), meta(c, m), meta(c, c), meta(c)
    return partial_gelu_ffn(*(t.to(dtype) for t in tensors), **static)


@every_chip
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_ffn_is_two_launches(chip, dtype):
    kernels = compiled(chip, lambda: ffn(768, 768, dtype))
    assert list(kernels) == ["linear_kernel", "two_source_kernel"]
    assert_products(kernels["two_source_kernel"], chip, none=dtype == FP32)


@every_chip
def test_narrow_ffn_is_one_launch(chip):
    kernels = compiled(chip, lambda: ffn(192, 192, norm_eps=1e-6, residual=True))
    if chip in ("sm_80", "sm_120", "gfx942"):  # too few registers, too little shared memory
        assert "on_chip_kernel" not in kernels
        return
    assert list(kernels) == ["on_chip_kernel"]
    assert_products(kernels["on_chip_kernel"], chip)


@few_chips
def test_gated_ffn_is_two_launches(chip):
    """EVA02-B's; one sum beside the other, and no spills."""
    tensors = (
        meta(ROWS, 768),
        meta(2048, 768),
        meta(2048),
        meta(2048, 768),
        meta(2048),
        meta(768, 2048),
        None,
        meta(768),
    )
    kernels = compiled(chip, lambda: gated_ffn(*tensors, activation="silu", norm_eps=1e-6, residual=True))
    assert list(kernels) == ["layer_norm_core_kernel", "gated_kernel", "linear_kernel"]
    assert_products(kernels["gated_kernel"], chip)


def bytes_multiplied(taken: Resources, chip: str) -> bool:
    """Whether a kernel multiplies bytes by the chip's matrix instructions: sm_103's are those before tcgen05."""
    marks = {"sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma_i32"}
    found = marks.get(chip, "mma.sync") in taken.code
    return found and (chip == "gfx942" or any(kind in taken.code for kind in (".s8", "kind::i8")))


@every_chip
def test_int8_ffn_quantizes_and_multiplies_bytes(chip):
    kernels = compiled(chip, lambda: ffn(768, 768, norm_eps=1e-6, residual=True, quantize="int8"))
    assert list(kernels) == ["quantize_rows_kernel", "int8_linear_kernel"]
    assert bytes_multiplied(kernels["int8_linear_kernel"], chip)


@few_chips
def test_int8_gates_multiply_bytes(chip):
    tensors = meta(ROWS, 768), meta(2048, 768), None, meta(2048, 768), None, meta(768, 2048), None, None
    kernels = compiled(chip, lambda: gated_ffn(*tensors, activation="silu", norm_eps=1e-6, quantize="int8"))
    assert bytes_multiplied(kernels["int8_gated_kernel"], chip)


@few_chips
@pytest.mark.parametrize("rows", [197, ROWS])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_int8_attention_multiplies_bytes(chip, rows, dtype):
    x, w_qkv, w_proj = (meta(*s, dtype=dtype) for s in ((rows // 197, 197, 384), (3 * 384, 384), (384, 384)))
    static = {"num_heads": 6, "scale": 0.125, "d_qk": 64, "norm_eps": 1e-6, "residual": True}
    kernels = compiled(chip, lambda: rep_attention(x, w_qkv, None, w_proj, None, **static, quantize="int8"))
    assert bytes_multiplied(kernels["int8_linear_kernel"], chip) or rows == 197


@few_chips
@pytest.mark.parametrize("rows", [197, ROWS])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_a_norm_in_front_of_the_projection(chip, rows, dtype):
    x, w_qkv, w_proj = (meta(*s, dtype=dtype) for s in ((rows // 197, 197, 192), (3 * 192, 192), (192, 192)))
    static = {"num_heads": 3, "scale": 0.125, "d_qk": 64, "residual": True, "inner_norm_eps": 1e-6}
    kernels = compiled(chip, lambda: rep_attention(x, w_qkv, None, w_proj, None, **static))
    in_front = [] if rows == 197 else ["layer_norm_core_kernel"]
    assert sorted(kernels) == sorted(["linear_kernel", "attention_kernel", *in_front])


@few_chips
def test_queries_and_keys_are_turned_in_one_launch(chip):
    tables = {"cos": meta(196, 64, dtype=FP32), "sin": meta(196, 64, dtype=FP32)}
    affines = {"q_norm": meta(2, 64), "k_norm": meta(2, 64)}
    static = {"num_heads": 12, "d_qk": 64, "eps": 1e-6, "norm": "layer", "layout": "half"}
    kernels = compiled(chip, lambda: query_key_rows(meta(128, 197, 3 * 768), **affines, **tables, **static))
    assert list(kernels) == ["query_key_kernel"]


def test_multiply_and_add_are_one_instruction_whatever_the_default(monkeypatch):
    """Triton 3.10 will not fuse them by itself; digits and speed of every kernel count on it."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    with compiling_for(KNOWN["sm_90"]) as launches:
        ffn(768, 768, norm_eps=1e-6)
        ffn(192, 192)
        attention(meta(2, 197, 192), None, 1, 64, 0.125)
    assert {kernel.name for kernel in launches} == {
        *("layer_norm_core_kernel", "linear_kernel", "two_source_kernel", "on_chip_kernel", "attention_kernel")
    }
    assert all(kernel.metadata.enable_fp_fusion for kernel in launches)


# --- tables -----------------------------------------------------------------------------------------------------------

TABLES = sorted(tuning.folders()[-1].glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_no_tile_of_a_table_spills(path, subtests):
    """On the GPU that the table is of, which chips.KNOWN must describe."""
    (chip,) = [chip for chip in KNOWN.values() if tuning.table_path(chip.name, path.parent) == path]
    for product, choice in tuner.choices_of(path):
        with subtests.test(product=product, choice=choice):
            assert tuner.stays_in_registers(chip, product, choice)


def test_a_tile_that_spills_is_seen():
    """256 x 128 sums on 128 threads take all 255 registers of each, and more."""
    product = tuner.Product("linear", BF16, ROWS, 768, 768)
    assert tuner.stays_in_registers(KNOWN["sm_80"], product, tuning.Config(64, 64, 64, 4, 3))
    assert not tuner.stays_in_registers(KNOWN["sm_80"], product, tuning.Config(256, 128, 64, 4, 3))


# --- make aot ---------------------------------------------------------------------------------------------------------

# Chips of which only this is shown: that what would be launched on one compiles and stays in its registers. Memory is
# the least that any of the kind has.
OTHERS = {
    **{f"sm_{arch}": Chip(f"sm_{arch}", "cuda", arch, memory, 20) for arch, memory in ((110, 232_448), (121, 101_376))},
    **{arch: Chip(arch, "hip", arch, 65_536, 60) for arch in ("gfx90a", "gfx1100", "gfx1201")},
    **{arch: Chip(arch, "hip", arch, 163_840, 60) for arch in ("gfx950", "gfx1250")},
}


@pytest.mark.skipif(not EVERYTHING, reason="chips that nobody here has: make aot")
@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9), reason="triton before 3.9 lacks some")
@pytest.mark.parametrize("name", OTHERS)
def test_plain_kernels_compile_for_other_chips(name):
    with compiling_for(OTHERS[name]) as launches:
        ffn(768, 768, norm_eps=1e-6, residual=True)
        ffn(192, 192)
        attention(meta(128, 197, 3 * 768), None, 12, 64, 0.125)
        window_attention(meta(8, 56, 56, 288), meta(3, 49, 49), None, 3, 32, 0.18, (7, 7), (3, 3), False)
    for kernel in launches:
        taken = resources(kernel)
        assert taken.spills == 0, f"{kernel.name}: {taken.spills} spilled, {taken.registers} registers"
        assert taken.shared <= OTHERS[name].shared_memory, kernel.name


def choices(chip, product):
    """The tuner's first choices on a chip, and what it varies of each."""
    kind = tuner.KINDS[product.kind]
    first = kind.choices(KNOWN[chip], product)
    return first + [variant for choice in first for variant in kind.variants(KNOWN[chip], product, choice)]


@pytest.mark.skipif(not EVERYTHING, reason="every tile of the tuner: make aot")
@every_chip
@pytest.mark.parametrize("kind", ["linear_gelu", "linear_norm", "two_source", "on_chip"])
@pytest.mark.parametrize("rows", [197, ROWS])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_every_choice_of_the_tuner(chip, kind, rows, dtype, subtests):
    product = tuner.Product(kind, dtype, rows, 192, 384 if kind == "two_source" else 192)
    operands = tuner.KINDS[kind].operands(product, torch.device("meta"))
    for choice in choices(chip, product):
        with subtests.test(choice=choice):
            compiled(chip, lambda choice=choice: tuner.KINDS[kind].run(product, operands, choice), spills=None)
