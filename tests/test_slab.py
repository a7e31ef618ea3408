"""SLAB, the peer of Table 3: its norms merge exactly, its parts are what they say, its sizes are the printed ones."""

from __future__ import annotations

import re

import pytest
import torch
from model_helpers import randomise, relative, tiny_swin
from torch.utils.flop_counter import FlopCounterMode

from repavit_ops.benchmarking import method, papers, slab, slab_models

ROWS = {row.family: row for row in papers.TABLES["3"] if row.family in slab_models.MODELS}


def small_deit():
    return slab_models.SlabVisionTransformer(48, 2, 3, img_size=32, patch_size=8, num_classes=10)


def small_swin(linear="LS"):
    """Maps of 8 x 8 and 4 x 4 tokens; windows of 2 x 2, the second of two blocks shifted."""
    return slab_models.SlabSwinTransformer(24, (2, 2), (2, 4), linear, window=2, img_size=32, num_classes=10)


def deep_swin():
    """As deep as Swin-Base, where what nothing holds would grow."""
    return slab_models.SlabSwinTransformer(32, (2, 2, 18, 2), (1, 2, 4, 8), num_classes=10)


@pytest.fixture(params=[small_deit, small_swin], ids=["deit", "swin"])
def trained(request, float64_default):
    """A small one whose norms went from LayerNorm to RepBN over some steps."""
    model = randomise(request.param()).train()
    x = torch.randn(4, 3, 32, 32)
    for step in range(4):
        slab.set_progress(model, step / 3)
        model(x)
    return model.eval(), x


def test_it_merges_exactly_once_no_layernorm_is_left(trained):
    model, x = trained
    before = model(x)
    small = slab.merged(model)
    assert not any(isinstance(module, slab.ProgressiveNorm) for module in small.modules())
    torch.testing.assert_close(small(x), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(x), before)  # a copy was merged


def test_the_deployed_form_has_what_a_merged_model_has(trained):
    model, _ = trained
    merged = {name: tensor.shape for name, tensor in slab.merged(model).state_dict().items()}
    kind, swin = type(model), isinstance(model, slab_models.SlabSwinTransformer)
    sizes = (24, (2, 2), (2, 4), "LS", 2) if swin else (48, 2, 3)
    deployed = kind(*sizes, img_size=32, **({} if swin else {"patch_size": 8}), num_classes=10, form="deployed")
    assert {name: tensor.shape for name, tensor in deployed.state_dict().items()} == merged


def test_it_refuses_to_merge_before(trained):
    model, _ = trained
    slab.set_progress(model, 0.75)
    with pytest.raises(ValueError, match=r"got λ = 0.25, wanted 0: call set_progress\(model, 1.0\) first"):
        slab.merged(model)
    with pytest.raises(RuntimeError, match="training mode"):
        slab.merged(model.train())
    with pytest.raises(ValueError, match=r"done: got 1.5, wanted a share of the training in \[0, 1\]"):
        slab.set_progress(model, 1.5)


def test_the_norm_goes_from_layernorm_to_repbn():
    norm, x = randomise(slab.ProgressiveNorm(6)), torch.randn(2, 5, 6)
    ends = norm.layer_norm(x), norm.rep_bn(x)
    for done in (0.0, 0.25, 1.0):
        slab.set_progress(norm, done)
        torch.testing.assert_close(norm(x), (1 - done) * ends[0] + done * ends[1])
    assert "share" in norm.state_dict()


def test_linear_attention_is_the_quadratic_one_in_another_order(float64_default):
    attention, x = randomise(slab.SimplifiedLinearAttention(12, 2, 3)), torch.randn(2, 9, 12)
    q, k, v = attention.qkv(x).view(2, 9, 3, 12).unbind(2)
    q, k = q.relu().view(2, 9, 2, 6), (k + attention.position).relu().view(2, 9, 2, 6)
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores / (scores.sum(-1, keepdim=True) + slab.EPS)
    mixed = torch.einsum("bhij,bjhd->bihd", scores, v.view(2, 9, 2, 6))
    near = [attention.conv(h.transpose(1, 2).reshape(2, 6, 3, 3)).flatten(2) for h in v.split(6, -1)]
    wanted = attention.proj(mixed.reshape(2, 9, 12) + torch.cat(near, 1).transpose(1, 2))
    torch.testing.assert_close(attention(x), wanted, rtol=1e-12, atol=1e-12)


def test_with_windows_in_every_stage_and_layernorm_it_is_swin(float64_default):
    theirs = tiny_swin(img_size=32, window_size=2, idle_ratio=None)
    ours = small_swin("SS").eval()
    weights = {}
    for name, tensor in theirs.state_dict().items():
        name = re.sub(r"^patch_embed\.proj", "stem.patch_embed.proj", name)
        name = re.sub(r"^patch_embed\.norm", "stem.norm", name)
        name = re.sub(  # two blocks and the merging behind them are three layers
            r"^layers\.(\d)\.(?:blocks\.(\d)|downsample)",
            lambda found: f"layers.{3 * int(found[1]) + int(found[2] or 2)}",
            name,
        )
        name = name.replace("mlp.norm", "norm2").replace("mlp.", "")
        weights[re.sub(r"(norm\d?)\.(weight|bias)$", r"\1.layer_norm.\2", name)] = tensor
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert (unexpected, {name.split(".")[-1] for name in missing if "rep_bn" not in name}) == ([], {"share"})
    x = torch.randn(2, 3, 32, 32)
    assert relative(ours(x), theirs(x)) < 1e-12


def test_windows_that_do_not_cover_a_map_are_refused():
    with pytest.raises(ValueError, match="window: got 3 for maps of 8 x 8 tokens, wanted a divisor of 8"):
        slab_models.SlabSwinTransformer(24, (2, 2), (2, 4), "SS", window=3, img_size=32)


@pytest.mark.parametrize("family", ROWS)
def test_a_slab_model_has_the_papers_work_and_the_positions_of_its_code(family):
    row = ROWS[family]
    with torch.device("meta"):
        model = slab_models.MODELS[family]("deployed").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    counted, positions = method.size_of(row), slab_models.position_parameters(model)
    products = counter.get_total_flops() / 2e9  # without biases
    tokens = {"slab_deit_base": [(196, 768)] * 12, "slab_swin_base": [(3136, 128)] * 2 + [(784, 256)] * 2}[family]
    assert positions == sum(count * channels for count, channels in tokens)
    assert counted.mparams - positions / 1e6 == pytest.approx(row.mparams, abs=0.06)
    assert 0 < counted.gmacs - products < 0.032
    assert round(products if family == "slab_swin_base" else counted.gmacs, 1) == row.gmacs


@pytest.mark.parametrize(("family", "build"), [("slab_deit_base", small_deit), ("slab_swin_base", deep_swin)])
def test_what_table_3_times_is_the_merged_model(monkeypatch, family, build):
    monkeypatch.setattr(slab_models, "MODELS", {family: lambda form: build()})
    assert method.kinds_of(ROWS[family]) == (method.PLAIN,)
    forms = method._Forms(ROWS[family], 1, torch.float32)
    call = forms.plain()  # merged, and compared with the float64 of what was not
    assert not any(isinstance(module, slab.ProgressiveNorm) for module in call.func.modules())
    assert relative(call().double(), forms.float64()) < 1e-5
