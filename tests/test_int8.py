"""Products in int8 (``quantize="int8"``): operators against exact whole-number arithmetic, and models that use them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from model_helpers import images, randomise, tiny_swin, tiny_vit
from op_helpers import cast, randn, weight
from test_partial_gelu_ffn import SHAPES, operands
from torch import Tensor

import repavit_ops
from repavit_ops import backends, ops, reference, reference_int8
from repavit_ops.fusing.report import _note
from repavit_ops.nn import GatedFFN, PartialGELUFFN, RepAttention, WindowRepAttention

NARROW = (torch.float32, torch.bfloat16, torch.float16)
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def assert_same_numbers(ours: Tensor, wanted: Tensor, share: float = 0.8) -> None:
    """Equal up to float32's rounding, but for rows in which a number lay between two whole ones."""
    assert ours.shape == wanted.shape
    assert ours.dtype == wanted.dtype
    if not wanted.numel():
        return
    scale = wanted.float().abs().max().clamp(min=1.0)
    error = (ours.float() - wanted.float()).abs() / scale
    bound = 2e-6 if ours.dtype == torch.float32 else ULP[ours.dtype]
    assert (error <= bound).double().mean() >= share, error.max()
    assert error.max() <= 0.05


def norm_error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_ffn_is_the_whole_number_formula(shape, dtype):
    tensors = cast(operands(*shape), dtype)
    assert_same_numbers(
        ops.partial_gelu_ffn(*tensors, quantize="int8"), reference.partial_gelu_ffn(*tensors, quantize="int8")
    )


@pytest.mark.parametrize("norm", [None, "layer", "rms"], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
@pytest.mark.parametrize("absent", [(), (2, 4, 5)], ids=["", "no_biases_no_merged"])
def test_ffn_with_every_option(norm, residual, approximate, absent):
    tensors = [None if i in absent else t for i, t in enumerate(cast(operands(29, 70, 45), torch.float32))]
    static = {"norm_eps": norm and 1e-6, "norm": norm or "layer", "residual": residual, "approximate": approximate}
    ours = ops.partial_gelu_ffn(*tensors, **static, quantize="int8")
    assert_same_numbers(ours, reference.partial_gelu_ffn(*tensors, **static, quantize="int8"), 0.9)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "gelu_quick"])
@pytest.mark.parametrize("inner_norm_eps", [None, 1e-2], ids=["", "inner_norm"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_gated_ffn_is_the_whole_number_formula(activation, inner_norm_eps, dtype):
    x, w_gate, b_gate, w_out, w_merged, bias = cast(operands(29, 70, 45), dtype)
    tensors = (x, w_gate, b_gate, weight(45, 70, 9).to(dtype), b_gate, w_out, w_merged, bias)
    static = {"activation": activation, "inner_norm_eps": inner_norm_eps, "norm_eps": 1e-6, "residual": True}
    ours = ops.gated_ffn(*tensors, **static, quantize="int8")
    assert_same_numbers(ours, reference.gated_ffn(*tensors, **static, quantize="int8"), 0.6)
    plain = reference.gated_ffn(*(t.double() for t in tensors), **static)
    assert norm_error(ours, plain) < 0.03


def attention_operands(batch: int, tokens: int, c: int, heads: int, d: int) -> tuple[Tensor, ...]:
    return (
        randn(batch, tokens, c),
        weight(3 * heads * d, c, 1),
        randn(3 * heads * d, seed=2, scale=0.5),
        weight(c, heads * d, 3),
        randn(c, seed=4, scale=0.5),
    )


@pytest.mark.parametrize("inner_norm_eps", [None, 1e-2], ids=["", "inner_norm"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 197, 192, 3, 64), (1, 50, 70, 2, 33), (4, 17, 48, 3, 16), (1, 1, 8, 1, 8)], ids=str
)
def test_attention_is_the_whole_number_formula(sizes, dtype, inner_norm_eps):
    _, tokens, _, heads, d = sizes
    static = {"num_heads": heads, "scale": d**-0.5, "d_qk": d, "norm_eps": 1e-6, "residual": True, "quantize": "int8"}
    static |= {"inner_norm_eps": inner_norm_eps}
    tensors = cast(attention_operands(*sizes), dtype)
    bias = randn(heads, tokens, tokens, seed=9).to(dtype)
    ours = ops.rep_attention(*tensors, attn_bias=bias, **static)
    # o is rounded once more on some machines before it is quantized, as q, k and v are; its norm makes that larger
    share = 0.9 if dtype == torch.float32 and inner_norm_eps is None else 0.6
    assert_same_numbers(ours, reference.rep_attention(*tensors, bias, **static), share)


@pytest.mark.parametrize("shift", [(0, 0), (2, 1)], ids=["", "shifted"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "pad_kv"])
def test_windows_are_the_whole_number_formula(shift, padded):
    heads, d, window = 2, 16, (4, 4)
    _, *weights = cast(attention_operands(1, 1, 32, heads, d), torch.float32)
    x, rel_bias = randn(2, 10, 13, 32).float(), randn(heads, 16, 16, seed=7).float()
    pad_kv = randn(2 * heads * d, seed=8).float() if padded else None
    static = {"num_heads": heads, "scale": d**-0.5, "window": window, "shift": shift, "norm_eps": 1e-6}
    ours = ops.window_rep_attention(x, *weights, rel_bias=rel_bias, pad_kv=pad_kv, **static, quantize="int8")
    wanted = reference.window_rep_attention(x, *weights, rel_bias, pad_kv, **static, quantize="int8")
    assert_same_numbers(ours, wanted, 0.9)


@pytest.mark.parametrize("c", [192, 384])
def test_is_one_percent_off_at_most(c):
    tensors = operands(197, c, c)
    truth = reference.partial_gelu_ffn(*tensors)
    ours = ops.partial_gelu_ffn(*cast(tensors, torch.float32), quantize="int8")
    assert norm_error(ours, truth) < 0.013


def test_a_token_does_not_depend_on_those_beside_it():
    tensors = cast(operands(400, 64, 48), torch.float32)
    x, weights = tensors[0], tensors[1:]
    x[7] *= 1e4
    together = ops.partial_gelu_ffn(x, *weights, quantize="int8")
    for first in (0, 7, 399):
        alone = ops.partial_gelu_ffn(x[first : first + 1], *weights, quantize="int8")
        assert torch.equal(together[first : first + 1], alone)


def test_strides_and_threads_change_nothing():
    tensors = cast(operands(230, 65, 33), torch.float32)
    x, weights = tensors[0], tensors[1:]
    wide = torch.full((230, 80), float("nan"))
    wide[:, :65] = x
    wanted = ops.partial_gelu_ffn(x, *weights, quantize="int8")
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.partial_gelu_ffn(wide[:, :65], *weights, quantize="int8"), wanted)
    finally:
        torch.set_num_threads(before)


def test_rows_that_are_zero_huge_or_not_finite():
    x, *weights = cast(operands(8, 40, 24), torch.float32)
    plain = ops.partial_gelu_ffn(x, *weights, quantize="int8")
    x[0], x[1, 3], x[2, 5], x[3] = 0.0, float("nan"), float("inf"), 1e-38
    x[4] = 3e38 * x[4].sign()
    y = ops.partial_gelu_ffn(x, *weights, quantize="int8")
    wanted = reference.partial_gelu_ffn(x, *weights, quantize="int8")
    assert y[1:3].isnan().all()
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert torch.equal(y[5:], plain[5:])
    assert_same_numbers(y[[0, 3]], wanted[[0, 3]])


def test_weights_that_are_zero_or_not_finite():
    x, w_in, b_in, w_out, w_merged, bias = cast(operands(5, 40, 24), torch.float32)
    w_merged[3], w_merged[4, 7] = 0.0, float("nan")
    y = ops.partial_gelu_ffn(x, w_in, b_in, w_out, w_merged, bias, quantize="int8")
    assert y[:, 4].isnan().all()
    assert y[:, [i for i in range(40) if i != 4]].isfinite().all()
    assert_same_numbers(
        y.nan_to_num(), reference.partial_gelu_ffn(x, w_in, b_in, w_out, w_merged, bias, quantize="int8").nan_to_num()
    )


def test_sums_beyond_one_chunk_of_inputs():
    tensors = cast(operands(9, 1100, 1040), torch.float32)
    assert_same_numbers(
        ops.partial_gelu_ffn(*tensors, quantize="int8"), reference.partial_gelu_ffn(*tensors, quantize="int8")
    )


def test_depths_that_int32_does_not_hold_are_refused():
    deep = reference_int8.DEPTH + 1
    x, w_in, w_out = torch.zeros(1, 2), torch.zeros(deep, 2), torch.zeros(2, deep)
    with pytest.raises(ValueError, match=f"quantize: got weights of {deep} inputs, wanted at most {deep - 1}"):
        ops.partial_gelu_ffn(x, w_in, None, w_out, None, None, quantize="int8")
    if backends.has_cpu_kernel("partial_gelu_ffn_pack"):
        with pytest.raises(RuntimeError, match="wanted at most"):
            torch.ops.repavit_ops.partial_gelu_ffn_pack(w_in, w_out, None, quantize="int8")
        extreme = torch.full((1, deep - 1), 1.0)  # the sums that come nearest to 2**31
        y = ops.partial_gelu_ffn(
            x, w_in[:-1], torch.full((deep - 1,), 9.0), extreme.repeat(2, 1), None, None, quantize="int8"
        )
        assert (y / (9.0 * (deep - 1)) - 1).abs().max() < 1e-4


def test_refusals():
    tensors = cast(operands(3, 8, 8), torch.float32)
    with pytest.raises(ValueError, match="quantize: got 'int4', wanted 'none' or 'int8'"):
        ops.partial_gelu_ffn(*tensors, quantize="int4")
    with pytest.raises(ValueError, match=r"got float64; convert with \.float"):
        ops.partial_gelu_ffn(*operands(3, 8, 8), quantize="int8")
    with pytest.raises(ValueError, match="quantize: got 'int4'"):
        PartialGELUFFN(8, 8, quantize="int4")
    with pytest.raises(ValueError, match="quantize: got 'fp8'"):
        repavit_ops.fuse(torch.nn.Linear(2, 2).eval(), quantize="fp8")


def test_derivatives_are_refused_and_never_zero():
    x, *weights = cast(operands(3, 8, 8), torch.float32)
    y = ops.partial_gelu_ffn(x.requires_grad_(), *weights, quantize="int8")
    with pytest.raises(RuntimeError, match="products in int8 have no derivatives"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="products in int8 have no derivatives"):
        torch.func.grad(lambda v: ops.partial_gelu_ffn(v, *weights, quantize="int8").sum())(x.detach())


@pytest.mark.skipif(not backends.has_cpu_kernel("partial_gelu_ffn_pack"), reason="no C++ kernels")
class TestPackedWeights:
    def test_are_a_quarter_of_float32s(self):
        w = weight(384, 384, 0).float()
        pack = torch.ops.repavit_ops.partial_gelu_ffn_pack
        assert pack(w, w, w, quantize="int8").numel() < 0.27 * pack(w, w, w).numel()

    def test_unpack_to_what_the_products_use(self):
        w_in, w_out = weight(33, 40, 1).float(), weight(40, 33, 2).float()
        packed = torch.ops.repavit_ops.partial_gelu_ffn_pack(w_in, w_out, None, quantize="int8")
        back_in, back_out, _ = torch.ops.repavit_ops.partial_gelu_ffn_unpack(packed)
        for w, back in ((w_in, back_in), (w_out, back_out)):
            used = reference_int8.weights(w)
            assert torch.equal(back, used.q * used.scale)
        again = torch.ops.repavit_ops.partial_gelu_ffn_pack(back_in, back_out, None, quantize="int8")
        assert torch.equal(again[64:], packed[64:])  # behind the header, which tells of the weights

    def test_of_one_kind_are_no_others(self):
        x, w_in, b_in, w_out, w_merged, bias = cast(operands(3, 32, 32), torch.float32)
        pack = torch.ops.repavit_ops.partial_gelu_ffn_pack
        for packed, quantize in (
            (pack(w_in, w_out, w_merged), "int8"),
            (pack(w_in, w_out, w_merged, quantize="int8"), "none"),
        ):
            with pytest.raises(RuntimeError, match="which is not what quantize says"):
                torch.ops.repavit_ops.partial_gelu_ffn(x, w_in, b_in, w_out, w_merged, bias, packed, quantize=quantize)

    def test_follow_weights_that_change(self):
        ffn = PartialGELUFFN(32, 32, quantize="int8").eval().requires_grad_(False)
        x = randn(5, 32).float()
        ffn(x)
        ffn.w_out.data.mul_(2.0)  # raises no version counter
        assert torch.equal(ffn(x), copy.deepcopy(ffn)(x))

    def test_whole_blocks_in_one_call_are_the_same_bit_for_bit(self):
        attn = RepAttention(48, 3, norm_eps=1e-6, residual=True, quantize="int8").eval().requires_grad_(False)
        ffn = PartialGELUFFN(48, 40, norm_eps=1e-6, residual=True, quantize="int8").eval().requires_grad_(False)
        plain = PartialGELUFFN(48, 40, norm_eps=1e-6, residual=True).eval().requires_grad_(False)
        gated = GatedFFN(48, 40, norm_eps=1e-6, residual=True, quantize="int8").eval().requires_grad_(False)
        x = randn(3, 17, 48).float()
        stack = repavit_ops.stack.FusedStack.replacing(torch.nn.Sequential(attn, ffn, plain, gated, attn))
        assert torch.equal(stack(x), attn(gated(plain(ffn(attn(x))))))

    def test_windows_in_one_call_are_the_same_bit_for_bit(self):
        attn = (
            WindowRepAttention(32, 2, 4, 2, norm_eps=1e-6, residual=True, quantize="int8").eval().requires_grad_(False)
        )
        ffn = PartialGELUFFN(32, 40, norm_eps=1e-6, residual=True, quantize="int8").eval().requires_grad_(False)
        x = randn(3, 8, 10, 32).float()
        stack = repavit_ops.stack.FusedStack.replacing(torch.nn.Sequential(attn, ffn))
        assert torch.equal(stack(x), ffn(attn(x)))


def timm_vit(timm) -> torch.nn.Module:
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    return randomise(timm.models.VisionTransformer(**config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["vit", "swin", "timm"])
def test_models_keep_their_outputs(name, dtype, request):
    if name == "timm":
        model = timm_vit(request.getfixturevalue("timm"))
    else:
        model = tiny_vit() if name == "vit" else tiny_swin()
    x = images(4, 64 if name == "swin" else 32)
    fused = repavit_ops.fuse(model, dtype=dtype, quantize="int8")
    kinds = {m.quantize for m in fused.modules() if isinstance(m, PartialGELUFFN | RepAttention)}
    assert kinds == {"int8"}
    report = repavit_ops.verify(model, fused, x)
    assert report, str(report)
    assert report.output.least_cosine == 0.99
    assert report.output.cosine > 0.999
    assert "int8, weights" in str(repavit_ops.fusion_report(fused))
    assert not any(p.requires_grad for m in fused.modules() if isinstance(m, PartialGELUFFN) for p in m.parameters())


def test_the_shortcut_stands_beside_the_merged_matrix():
    model = tiny_vit()
    merged = repavit_ops.reparameterize(model)
    for given in (model, merged, repavit_ops.fuse(model, dtype=torch.bfloat16)):
        fused = repavit_ops.fuse(given, quantize="int8")
        ffns = [m for m in fused.modules() if isinstance(m, PartialGELUFFN)]
        assert all(f.residual and f.w_merged.diagonal().float().abs().max() < 0.7 for f in ffns)


@torch.no_grad()
def test_freed_weights_saved_copied_and_loaded():
    model, x = tiny_vit(), images()
    fused = repavit_ops.fuse(model, quantize="int8")
    wanted = fused(x)
    small = repavit_ops.fuse(model, quantize="int8", keep_unpacked=False)
    assert torch.equal(small(x), wanted)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), wanted)
    assert torch.equal(copy.deepcopy(small)(x), wanted)
    fused.load_state_dict(small.state_dict())
    assert torch.equal(fused(x), wanted)


@torch.no_grad()
def test_quantizing_what_is_fused_already():
    model, x = tiny_vit(), images()
    wanted = repavit_ops.fuse(model, quantize="int8")(x)
    again = repavit_ops.fuse(repavit_ops.fuse(model, keep_unpacked=False), quantize="int8")
    assert torch.equal(again(x), wanted)
    with pytest.raises(ValueError, match="got a model in float64"):
        repavit_ops.fuse(copy.deepcopy(model).double(), quantize="int8")


def test_compiled_models_quantize_too():
    model, x = tiny_vit(), images()
    fused = repavit_ops.fuse(model, quantize="int8")
    with torch.no_grad():  # ends of the model run elsewhere, so a number may be rounded the other way
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)(x)
        assert torch.nn.functional.cosine_similarity(compiled.flatten(), fused(x).flatten(), dim=0) > 0.9999


def test_the_report_says_where_int8_has_no_kernel():
    assert "int8, weights" in _note(PartialGELUFFN(8, 8, quantize="int8"))
    assert "int8, by its formula" in _note(PartialGELUFFN(8, 8, quantize="int8", device="meta"))
