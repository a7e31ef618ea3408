"""reparameterize, fuse and fusion_report: exact, idempotent, copying by default, refusing with the fix."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from model_helpers import images, randomise, relative, tiny_swin, tiny_vit
from torch import nn

import repavit_ops
from repavit_ops import backends
from repavit_ops.fusing.family import Described, Family
from repavit_ops.fusing.folding import AttentionParts, WindowParts, fold_attention, reason_against
from repavit_ops.nn import (
    FFN,
    Attention,
    Block,
    ChannelIdleFFN,
    PartialGELUFFN,
    RepAttention,
    RepBN,
    TokenBatchNorm,
    WindowRepAttention,
)

MODELS = {
    "vit": (tiny_vit, {}, (32, 32)),
    "vit_other_size": (tiny_vit, {}, (40, 56)),
    "vit_layer_scale": (tiny_vit, {"layer_scale": 0.5, "skip_lam": 2.0}, (32, 32)),
    "vit_theta_1": (tiny_vit, {"idle_ratio": 1.0}, (32, 32)),
    "vit_theta_0": (tiny_vit, {"idle_ratio": 0.0}, (32, 32)),
    "vit_per_block": (tiny_vit, {"idle_ratio": [0.25, 0.75]}, (32, 32)),
    "vit_vanilla": (tiny_vit, {"idle_ratio": None}, (32, 32)),
    "vit_no_qkv_bias": (tiny_vit, {"qkv_bias": False}, (32, 32)),
    "swin": (tiny_swin, {}, (64, 64)),
    "swin_padded": (tiny_swin, {}, (52, 90)),
    "swin_vanilla": (tiny_swin, {"idle_ratio": None}, (64, 64)),
}
every_model = pytest.mark.parametrize(("build", "config", "size"), MODELS.values(), ids=MODELS.keys())


@every_model
def test_merged_and_fused_equal_the_training_form_in_float64(build, config, size):
    model, x = build(**config).double(), images(2, *size).double()
    expected = model(x)
    assert relative(repavit_ops.reparameterize(model)(x), expected) < 1e-10
    assert relative(repavit_ops.fuse(model)(x), expected) < 1e-10


@every_model
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def test_fused_passes_verification_in_every_dtype(build, config, size, dtype):
    model = build(**config)
    report = repavit_ops.verify(model, repavit_ops.fuse(model, dtype=dtype), images(3, *size))
    assert report.passed, str(report)


@every_model
def test_every_block_is_fused_and_reported(build, config, size):
    fused = repavit_ops.fuse(build(**config), strict=True)
    report = repavit_ops.fusion_report(fused)
    blocks = sum(hasattr(m, "attn") and hasattr(m, "mlp") for m in fused.modules())
    assert len(report.fused) == 2 * blocks
    assert not report.skipped
    assert not any(isinstance(m, ChannelIdleFFN | Attention | FFN) for m in fused.modules())
    assert "cpu" in report.runs_on
    assert all(entry.name in str(report) for entry in report.entries)


@every_model
def test_both_verbs_are_idempotent(build, config, size):
    model, x = build(**config), images(1, *size)
    for verb in (repavit_ops.reparameterize, repavit_ops.fuse):
        once = verb(model)
        twice = verb(once)
        assert torch.equal(once(x), twice(x))
        assert [type(m) for m in once.modules()] == [type(m) for m in twice.modules()]


def test_copies_unless_told_otherwise():
    model, x = tiny_vit(), images()
    before, state = model(x), copy.deepcopy(model.state_dict())
    fused = repavit_ops.fuse(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert all(a.data_ptr() != b.data_ptr() for a in fused.parameters() for b in model.parameters() if a.numel())
    same = repavit_ops.fuse(model, inplace=True)
    assert same is model
    assert isinstance(model.blocks[0].mlp, PartialGELUFFN)


def test_the_root_itself_may_be_fusible():
    ffn = randomise(ChannelIdleFFN(16, 64, idle_ratio=0.75))
    x = torch.randn(2, 5, 16)
    fused = repavit_ops.fuse(ffn, inplace=True)
    assert isinstance(fused, PartialGELUFFN)
    torch.testing.assert_close(fused(x), ffn(x), rtol=1e-4, atol=1e-5)
    attention = randomise(Attention(16, 2))
    assert isinstance(repavit_ops.fuse(attention), RepAttention)


def test_shared_modules_are_fused_once_and_stay_shared():
    block = Block(Attention(16, 2), ChannelIdleFFN(16, 64, idle_ratio=0.5))
    model = randomise(nn.Sequential(block, nn.Sequential(block, block.mlp)))
    fused = repavit_ops.fuse(model)
    assert fused[0] is fused[1][0]
    assert fused[0].mlp is fused[1][1]
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [TokenBatchNorm, RepBN], ids=["batchnorm", "repbn"])
def test_batchnorm_in_front_of_attention_leaves_no_norm(norm):
    model = randomise(Attention(24, 3, norm=norm, layer_scale=0.1)).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    merged, fused = repavit_ops.reparameterize(model), repavit_ops.fuse(model)
    assert isinstance(merged, Attention)
    assert isinstance(merged.norm, nn.Identity)
    assert fused.norm_eps is None
    assert relative(merged(x), model(x)) < 1e-10
    assert relative(fused(x), model(x)) < 1e-10


def test_attention_bias_reaches_the_fused_block():
    model = randomise(Attention(24, 3)).double()
    x, bias = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(3, 7, 7, dtype=torch.float64)
    assert relative(repavit_ops.fuse(model)(x, bias), model(x, bias)) < 1e-10


def parts_with_an_inner_norm(norm):
    qkv, proj = randomise(nn.Linear(24, 72)).double(), randomise(nn.Linear(24, 24)).double()
    return AttentionParts(qkv, proj, 3, 8, 0.3, inner_norm=randomise(norm(24)).double())


def test_a_norm_in_front_of_the_projection_folds_exactly():
    parts, x = parts_with_an_inner_norm(nn.LayerNorm), torch.randn(2, 7, 24, dtype=torch.float64)
    q, k, v = parts.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)
    fused = fold_attention(parts, "reference")
    assert relative(fused(x), parts.proj(parts.inner_norm(heads))) < 1e-12
    assert fused.b_qkv[48:].any()  # the V bias does not pass a norm


def test_norms_in_front_of_the_projection_that_no_operator_has():
    parts = parts_with_an_inner_norm(nn.RMSNorm)
    assert reason_against(parts) == "the norm behind its softmax is RMSNorm; only LayerNorm can be fused"
    windows = WindowParts(parts_with_an_inner_norm(nn.LayerNorm), torch.zeros(3, 4, 4), (2, 2), (0, 0))
    assert reason_against(windows).startswith("a norm stands between its windows and their projection")


@pytest.mark.parametrize("verb", [repavit_ops.reparameterize, repavit_ops.fuse])
def test_training_mode_is_refused_with_the_place_and_the_fix(verb):
    model = tiny_vit()
    with pytest.raises(RuntimeError, match=r"training mode.*model\.eval\(\)"):
        verb(copy.deepcopy(model).train())
    model.blocks[1].mlp.drop.train()
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.drop.*model\.eval\(\)"):
        verb(model)


def test_what_cannot_be_fused_stays_and_says_why():
    model = tiny_vit(idle_ratio=None)
    model.blocks[0].attn.norm = nn.GroupNorm(1, 48).eval()
    model.blocks[0].attn.norm.forward = lambda x: x * 2
    model.blocks[1].mlp.act = nn.SiLU()
    hook = model.blocks[1].attn.qkv.register_forward_hook(lambda *_: None)
    x = images()
    fused = repavit_ops.fuse(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    reasons = {entry.name: entry.note for entry in repavit_ops.fusion_report(fused).skipped}
    assert set(reasons) == {"blocks.0.attn", "blocks.1.attn", "blocks.1.mlp"}
    assert "GroupNorm" in reasons["blocks.0.attn"]
    assert "hooks" in reasons["blocks.1.attn"]
    assert "SiLU" in reasons["blocks.1.mlp"]
    with pytest.raises(RuntimeError, match=r"strict=True.*blocks\.0\.attn.*blocks\.1\.mlp"):
        repavit_ops.fuse(model, strict=True)
    hook.remove()
    assert repavit_ops.can_fuse(model.blocks[1].attn) is None


def test_filter_leaves_sub_blocks_as_they_are():
    model = tiny_vit()
    fused = repavit_ops.fuse(model, filter_fn=lambda module, name: not name.startswith("blocks.0"))
    assert isinstance(fused.blocks[0].mlp, ChannelIdleFFN)
    assert isinstance(fused.blocks[0].attn, Attention)
    assert isinstance(fused.blocks[1].mlp, PartialGELUFFN)
    assert isinstance(fused.blocks[1].attn, RepAttention)
    assert {e.name for e in repavit_ops.fusion_report(fused).skipped} == {"blocks.0.attn", "blocks.0.mlp"}


def test_low_precision_takes_the_folded_shortcut_out():
    model = tiny_vit()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.weight.mul_(0.02)  # small branches: rounding 1 + w would lose them
    merged = repavit_ops.reparameterize(model)
    assert not merged.blocks[0].mlp.residual
    fused = repavit_ops.fuse(merged, dtype=torch.bfloat16)
    mlp = fused.blocks[0].mlp
    assert mlp.residual
    apart = merged.blocks[0].mlp.w_merged.double() - torch.eye(48)
    torch.testing.assert_close(mlp.w_merged.double(), apart, rtol=2**-8, atol=1e-7)


@torch.no_grad()
def test_the_shortcut_is_added_beside_the_merged_matrix():
    """Inside w_merged x passes a sum of products, which is several times as far off behind some blocks."""
    model, x = tiny_vit(embed_dim=192, depth=8), images()
    for block in model.blocks:
        block.mlp.fc2.weight.mul_(0.3)
    truth = copy.deepcopy(model).double()(x.double())
    merged, fused = repavit_ops.reparameterize(model), repavit_ops.fuse(model)
    assert all(block.mlp.residual for block in fused.blocks)
    assert not any(block.mlp.residual for block in repavit_ops.fuse(model, backend="reference").blocks)
    errors = [(m(x).double() - truth).abs().max() for m in (fused, merged)]
    assert errors[0] < 0.7 * errors[1]


@torch.no_grad()
def test_state_dicts_with_and_without_the_shortcut_load_into_either():
    merged, x = repavit_ops.reparameterize(tiny_vit()).blocks[0].mlp, torch.randn(3, 48)
    fused = repavit_ops.fuse(merged)
    assert fused.residual > merged.residual
    other = repavit_ops.reparameterize(tiny_vit(3)).blocks[0].mlp
    for target, state in (
        (fused, other.state_dict()),
        (merged, repavit_ops.fuse(other).state_dict()),
        (merged, other.state_dict()),
        (fused, repavit_ops.fuse(other).state_dict()),
    ):
        target = copy.deepcopy(target)
        before = {name: value.clone() for name, value in state.items()}
        target.load_state_dict(state)
        torch.testing.assert_close(target(x), other(x), rtol=1e-5, atol=1e-5)
        assert all(torch.equal(state[name], value) for name, value in before.items())
    lean = repavit_ops.fuse(merged, keep_unpacked=False)
    lean.load_state_dict(other.state_dict())
    torch.testing.assert_close(lean(x), other(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_forms_are_told_apart_behind_a_cast_and_a_file(tmp_path):
    """What was fused in bfloat16, or comes from a file, takes the other form's weights too."""
    merged, other = (repavit_ops.reparameterize(tiny_vit(seed)) for seed in (0, 3))
    repavit_ops.save_checkpoint(repavit_ops.fuse(merged), tmp_path / "fused.safetensors")
    for target, state, close in (
        (repavit_ops.load_checkpoint(tmp_path / "fused.safetensors"), other.state_dict(), 1e-4),
        (repavit_ops.fuse(merged, dtype=torch.bfloat16), other.state_dict(), 5e-2),
        (repavit_ops.fuse(merged), repavit_ops.fuse(other, dtype=torch.bfloat16).state_dict(), 5e-2),
        (copy.deepcopy(merged), repavit_ops.fuse(other, dtype=torch.bfloat16).state_dict(), 5e-2),
    ):
        for block, name in ((b, f"blocks.{i}.mlp.") for i, b in enumerate(target.blocks)):
            part = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
            part = type(state)(part)
            part._metadata = {"": state._metadata[name[:-1]]}
            block.mlp.load_state_dict(part)
            tokens = torch.randn(2, 5, 48)
            dtype = block.mlp.w_in.dtype
            expected = other.get_submodule(name[:-1])(tokens)
            torch.testing.assert_close(block.mlp(tokens.to(dtype)).float(), expected, rtol=close, atol=close)


def test_state_dicts_that_do_not_say_their_form_load_into_their_own_alone():
    """As safetensors keeps them: without _metadata."""
    merged = repavit_ops.reparameterize(tiny_vit()).blocks[0].mlp
    fused = repavit_ops.fuse(merged)
    for target, state, words in (
        (fused, merged.state_dict(), "holds the shortcut, which this module adds by itself"),
        (merged, fused.state_dict(), "is without the shortcut, which this module has in w_merged"),
    ):
        with pytest.raises(RuntimeError, match=words):
            copy.deepcopy(target).load_state_dict(dict(state))
        copy.deepcopy(target).load_state_dict(dict(target.state_dict()))


def test_bad_arguments_are_named():
    model = tiny_vit()
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        repavit_ops.fuse(model, backend="gpu")
    with pytest.raises(ValueError, match=r"dtype: got torch\.int8"):
        repavit_ops.fuse(model, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"dtype: got 'bfloat16', wanted a floating dtype such as torch\.bfloat16"):
        repavit_ops.fuse(model, dtype="bfloat16")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="backend 'triton' is not available"):
            repavit_ops.fuse(model, backend="triton")


def test_a_family_whose_classes_are_of_another_library_is_refused():
    """They would be looked for in the wrong package, and never found."""
    described = Described(lambda module: None, holds=())
    for tables in ({"ffns": {"theirs.FFN": described}}, {"refused": {"theirs.Attention": "pools"}}):
        with pytest.raises(ValueError, match=r"library: got 'mine' beside theirs\.\w+, wanted 'theirs'"):
            Family("mine", **tables)
    assert "theirs.FFN" in Family("theirs", ffns={"theirs.FFN": described}).known()


def test_infinite_statistics_are_refused_by_name():
    model = tiny_vit()
    model.blocks[1].mlp.norm1.running_var[3] = float("inf")
    with pytest.raises(ValueError, match="running_var"):
        repavit_ops.fuse(model)


def test_frozen_parameters_stay_frozen():
    model = tiny_vit()
    model.blocks[0].requires_grad_(False)
    fused = repavit_ops.fuse(model)
    assert not any(p.requires_grad for p in fused.blocks[0].parameters())
    assert all(p.requires_grad for p in fused.blocks[1].parameters())


def test_fused_models_can_be_fine_tuned():
    model, x = repavit_ops.fuse(tiny_vit()), images()
    before = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss = before.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert model(x).square().mean() < loss


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin], ids=["vit", "swin"])
def test_copies_pickles_and_state_dicts_round_trip(build):
    fused = repavit_ops.fuse(build())
    x = images(2, 32 if build is tiny_vit else 64)
    expected = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
    other = repavit_ops.fuse(build(seed=5))
    assert not torch.equal(other(x), expected)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), expected)
    assert not any("packed" in key for key in fused.state_dict())


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin], ids=["vit", "swin"])
def test_compiles_in_one_graph_and_exports(build):
    torch._dynamo.reset()
    fused = repavit_ops.fuse(build())
    x = images(2, 32 if build is tiny_vit else 64)
    with torch.no_grad():
        expected = fused(x)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(x), expected)
        more = torch.cat([x, x.flip(0)])
        torch.testing.assert_close(program.module()(more), fused(more))
    kinds = {
        node.target.name().split("::")[1].split(".")[0] for node in program.graph.nodes if "repavit" in str(node.target)
    }
    assert kinds == {"patch_projection", "fused_blocks"} or {"patch_projection", "partial_gelu_ffn"} < kinds


def test_window_attention_keeps_both_kinds_of_padding_apart():
    """Folding β into qkv without pad_kv would be wrong by order one at sizes the window does not divide."""
    model, x = tiny_swin().double(), images(1, 52, 90).double()
    fused = repavit_ops.fuse(model)
    window = next(m for m in fused.modules() if isinstance(m, WindowRepAttention))
    assert window.pad_kv is not None
    expected = model(x)
    for module in fused.modules():
        if isinstance(module, WindowRepAttention):
            module.pad_kv = None
    assert relative(fused(x), expected) > 1e-3


needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)


@needs_cpp
def test_reference_and_cpp_backends_agree():
    model, x = tiny_vit(), images()
    plain, cpp = (repavit_ops.fuse(model, backend=b) for b in ("reference", "cpp"))
    torch.testing.assert_close(cpp(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len(repavit_ops.fusion_report(plain).with_status("merged")) == 4


@needs_cpp
@pytest.mark.parametrize("edit", ["in_place", "load", "data", "to"])
def test_packed_weights_follow_their_source(edit):
    fused, x = repavit_ops.fuse(tiny_vit()), images()
    fused(x)
    other = repavit_ops.fuse(tiny_vit(seed=9))
    mlp, theirs = fused.blocks[0].mlp, other.blocks[0].mlp
    if edit == "in_place":
        with torch.no_grad():
            mlp.w_in.copy_(theirs.w_in)
    elif edit == "load":
        mlp.load_state_dict(theirs.state_dict())
    elif edit == "data":
        mlp.w_in.data.copy_(theirs.w_in.data)
        mlp.repack()
    else:
        fused.to(torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(fused(x), repavit_ops.fuse(fused, backend="reference")(x), rtol=1e-4, atol=1e-5)


@needs_cpp
def test_keep_unpacked_false_frees_weights_and_gives_them_back():
    model, x = tiny_vit(), images()
    full = repavit_ops.fuse(model)
    lean = repavit_ops.fuse(model, keep_unpacked=False)
    with torch.no_grad():
        expected = full(x)
        assert torch.equal(lean(x), expected)
        assert lean.blocks[0].mlp.w_in.untyped_storage().nbytes() <= 8
        assert torch.equal(copy.deepcopy(lean)(x), expected)
    state = {key: value.clone() for key, value in lean.state_dict().items()}
    assert all(torch.equal(state[key], value) for key, value in full.state_dict().items())
    with pytest.raises(RuntimeError, match="keep_unpacked=False"):
        lean(x.requires_grad_())
    x = x.detach()
    with torch.no_grad():
        lean.load_state_dict(repavit_ops.fuse(tiny_vit(seed=3)).state_dict())
        assert not torch.equal(lean(x), expected)
        lean.load_state_dict(state)
        assert torch.equal(lean(x), expected)
        torch.testing.assert_close(repavit_ops.fuse(lean, backend="reference")(x), expected, rtol=1e-4, atol=1e-5)
    report = repavit_ops.verify(model, repavit_ops.fuse(model, keep_unpacked=False).to(torch.bfloat16), x)
    assert report.passed, str(report)
