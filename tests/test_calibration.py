"""``fuse(quantize="int8", calibration=...)``: what batches of inputs decide about sub-blocks and their biases."""

from __future__ import annotations

import copy

import pytest
import torch
from model_helpers import images, tiny_swin, tiny_vit
from torch import Tensor, nn

import repavit_ops
from repavit_ops import backends
from repavit_ops.nn import PartialGELUFFN, RepAttention
from repavit_ops.nn.packed_weights import PackedWeights


def sub_blocks(model: nn.Module) -> dict[str, PackedWeights]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PartialGELUFFN | RepAttention)}


def forms(model: nn.Module) -> set[str]:
    return {m.quantize for m in sub_blocks(model).values()}


def spoilt(model: nn.Module) -> nn.Module:
    """With one FFN whose weights have a few numbers far beyond the others, which int8 gives all its steps to."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight *= 10.0
        model.blocks[1].mlp.fc2.weight[:, 0] *= 3000.0
        model.blocks[1].mlp.fc1.weight[0] = 0.0
        model.blocks[1].mlp.fc1.bias[0] = 0.001
    return model


def weighted(quantized: Tensor, exact: Tensor) -> tuple[Tensor, float]:
    """(correction, error) of outputs [..., C], as the module says it computes them."""
    y = exact.double().flatten(0, -2)
    off = quantized.double().flatten(0, -2) - y
    w = 1 / y.square().sum(-1, keepdim=True)
    c = (w * off).sum(0) / w.sum()
    return c, (w * (off - c).square()).sum().div(len(y)).sqrt().item()


@torch.no_grad()
def test_biases_lose_the_mean_of_what_int8_is_off():
    x = images(8)
    ffn = PartialGELUFFN(48, 64, norm_eps=1e-6, residual=True).eval().requires_grad_(False)
    tokens = torch.randn(3, 50, 48, generator=torch.Generator().manual_seed(1))
    quantized = repavit_ops.fuse(ffn, quantize="int8")
    c, error = weighted(quantized(tokens), ffn(tokens))
    calibrated = repavit_ops.fuse(ffn, quantize="int8", calibration=[tokens[:1], tokens[1:]])
    assert torch.allclose(calibrated.bias, (ffn.bias - c).float(), atol=1e-7)
    assert calibrated.quantization_error == pytest.approx(error, rel=1e-6)
    assert weighted(calibrated(tokens), ffn(tokens))[0].abs().max() < 1e-2 * c.abs().max()
    model = tiny_vit()
    exact = repavit_ops.fuse(model)(x)
    off = [(repavit_ops.fuse(model, quantize="int8", calibration=batches)(x) - exact).norm() for batches in (None, [x])]
    assert off[1] < off[0]


@torch.no_grad()
def test_the_sub_block_that_int8_hurts_stays_in_floats():
    model, x = spoilt(tiny_vit(idle_ratio=None)), images(8)
    hurt = repavit_ops.fuse(model, quantize="int8")
    fused = repavit_ops.fuse(model, quantize="int8", calibration=[x])
    in_floats = [name for name, m in sub_blocks(fused).items() if m.quantize == "none"]
    assert in_floats == ["blocks.1.mlp"]
    truth = copy.deepcopy(model).double()(x.double())
    cosines = [nn.functional.cosine_similarity(f(x).double().flatten(), truth.flatten(), 0) for f in (hurt, fused)]
    assert cosines[0] < 0.99 < cosines[1]
    text = str(repavit_ops.fusion_report(fused))
    assert "in floats: int8 would be" in text
    assert text.count("int8, weights") == len(sub_blocks(fused)) - 1
    assert "outputs" in text


@torch.no_grad()
def test_least_cosine_sets_how_many():
    model, x = tiny_vit(), images(4)
    none, few, every = (
        repavit_ops.fuse(model, quantize="int8", calibration=[x], least_cosine=least) for least in (1.0, 0.99999, 0.0)
    )
    assert forms(none) == {"none"}
    assert forms(few) == {"none", "int8"}
    assert forms(every) == {"int8"}
    assert torch.equal(none(x), repavit_ops.fuse(model)(x))
    errors = {name: m.quantization_error for name, m in sub_blocks(few).items()}
    kept = [errors[n] for n, m in sub_blocks(few).items() if m.quantize == "none"]
    assert min(kept) >= max(errors[n] for n, m in sub_blocks(few).items() if m.quantize == "int8")
    assert sum(e**2 for e in errors.values() if e not in kept) <= 2e-5


@torch.no_grad()
def test_what_no_batch_reaches_stays_in_floats():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = tiny_vit(), tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    fused = repavit_ops.fuse(Two().eval(), quantize="int8", calibration=[images()])
    assert forms(fused.used) == {"int8"}
    assert forms(fused.other) == {"none"}
    assert "in floats: no batch of the calibration came here" in str(repavit_ops.fusion_report(fused))


class Named(nn.Module):
    """Takes its input by name, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()

    def forward(self, *, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        return self.vit(pixel_values) * scale


@torch.no_grad()
def test_batches_in_every_form():
    model, x = tiny_vit(), images(4)
    wanted = repavit_ops.fuse(model, quantize="int8", calibration=[x])
    labelled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(4)), batch_size=4)
    for batches in (x, (x,), [(x, torch.arange(4))], labelled, iter([x]), [x.double()]):
        fused = repavit_ops.fuse(model, quantize="int8", calibration=batches)
        assert torch.equal(fused(x), wanted(x))
    named = Named().eval()
    named.vit = model
    fused = repavit_ops.fuse(named, quantize="int8", calibration=[{"pixel_values": x, "scale": 2.0}])
    assert torch.equal(fused(pixel_values=x), wanted(x))
    windows = repavit_ops.fuse(tiny_swin(), quantize="int8", calibration=[images(2, 64)])
    assert forms(windows) == {"int8"}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_same_with_and_without_the_plain_weights(dtype):
    model, x = tiny_vit(), images(4)
    options = {"quantize": "int8", "calibration": [x], "dtype": dtype, "least_cosine": 0.9999}
    kept, dropped = (repavit_ops.fuse(model, **options, keep_unpacked=keep) for keep in (True, False))
    assert torch.equal(kept(x.to(dtype)), dropped(x.to(dtype)))
    if backends.has_cpu_kernel("partial_gelu_ffn_pack"):
        assert all(
            type(m.w_out).__name__ == "DroppedWeight" for m in sub_blocks(dropped).values() if hasattr(m, "w_out")
        )
    assert not any(m._forward_hooks for m in kept.modules())
    verified = repavit_ops.verify(model, kept, x)
    assert verified, str(verified)


@torch.no_grad()
def test_packed_files_keep_what_was_decided(tmp_path):
    if not backends.has_cpu_kernel("partial_gelu_ffn_pack"):
        pytest.skip("no C++ kernels")
    model, x = spoilt(tiny_vit(idle_ratio=None)), images(4)
    fused = repavit_ops.fuse(model, quantize="int8", calibration=[x], keep_unpacked=False)
    repavit_ops.save_packed(fused, tmp_path / "packed.safetensors")
    loaded = repavit_ops.load_packed(tmp_path / "packed.safetensors")
    assert torch.equal(loaded(x), fused(x))
    for (_, ours), (_, theirs) in zip(sub_blocks(loaded).items(), sub_blocks(fused).items(), strict=True):
        assert (ours.quantize, ours.quantization_error) == (theirs.quantize, theirs.quantization_error)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"calibration": []}, "calibration: is for quantize='int8'"),
        ({"quantize": "int8", "calibration": []}, "calibration: got no batch"),
        ({"quantize": "int8", "calibration": ["cat.png"]}, "calibration: got a batch of str"),
        ({"quantize": "int8", "calibration": [()]}, "calibration: got a batch of tuple"),
        ({"quantize": "int8", "calibration": 3}, "calibration: got int, wanted batches"),
        ({"quantize": "int8", "least_cosine": 1.5}, r"least_cosine: got 1.5, wanted a number from 0 to 1"),
        ({"quantize": "int8", "least_cosine": float("nan")}, "least_cosine: got nan"),
    ],
    ids=str,
)
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        repavit_ops.fuse(tiny_vit(), **options)


def test_batches_that_are_not_finite_are_refused():
    x = images(2)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"got batches of which blocks\.0\.\w+ makes NaN"):
        repavit_ops.fuse(tiny_vit(), quantize="int8", calibration=[x])
