"""Backend "auto" follows the table of ``repavit-ops tune --cpu`` wherever a model runs, and nothing else does."""

from __future__ import annotations

import copy

import pytest
import torch
from cpu_tuning_helpers import (
    BF16,
    FP32,
    MODELS,
    MODULES,
    NO_KERNELS,
    empty_table,
    ours_compiled,
    ours_in,
    remember,
    tuned,
)
from model_helpers import Recorder, images, randomise, tiny_vit
from op_helpers import assert_follows_rule
from torch import nn

import repavit_ops
from repavit_ops import backends, cpu_tuning, info
from repavit_ops.benchmarking import cpu_tuner
from repavit_ops.nn import Block, GatedFFN, PartialGELUFFN, RepAttention
from repavit_ops.nn.packed_weights import PackedWeights
from repavit_ops.stack import FusedStack
from repavit_ops.stack.pytorch_run import PyTorchRun

pytestmark = pytest.mark.skipif(NO_KERNELS is not None, reason=f"no C++ kernels: {NO_KERNELS}")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    yield from empty_table(tmp_path, monkeypatch)


@pytest.fixture
def without_amx(monkeypatch):
    """A processor whose AMX the kernels cannot use, as far as the library says."""
    monkeypatch.setattr(torch.ops.repavit_ops, "amx_refusal", lambda: 1)
    cpu_tuning.forget()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_auto_follows_the_table_for_every_operator(name, dtype):
    make, shape = MODULES[name]
    module = randomise(make()).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert len(ours_in(lambda: module(x))[0]) == 1
    remember(module.operation(), shape[1:], shape[0], "pytorch")
    module.repack()
    called, y = ours_in(lambda: module(x))
    assert called == []
    truth = copy.deepcopy(module).double()(x.double())
    forced = copy.deepcopy(module)
    forced.backend = "reference"
    assert_follows_rule(y.contiguous(), forced(x).contiguous(), truth)
    assert len(ours_in(lambda: module(torch.cat([x, x], -2)))[0]) == 1  # of another size


@torch.no_grad()
def test_pytorch_is_given_the_gelu_that_models_call():
    module, x = PartialGELUFFN(16, 8), torch.randn(2, 5, 16)
    remember(module.operation(), (5, 16), 2, "pytorch")
    module.repack()
    with Recorder() as recorder:
        module(x)
    assert "aten::gelu" in recorder.calls
    module.backend = "reference"
    with Recorder() as recorder:
        module(x)
    assert "aten::gelu" not in recorder.calls


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "operator",
    ["partial_gelu_ffn", "rep_attention", "window_rep_attention", "patch_projection", "token_embedding", "pooled_head"],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_one_call_leaves_an_operator_to_pytorch_and_follows_the_rule(name, operator, batch):
    make, side = MODELS[name]
    model, x = make(), images(batch, side)
    plain = repavit_ops.reparameterize(model)
    places = cpu_tuner.places_of(repavit_ops.fuse(model, backend="cpp"), x)
    here = sum(len(place.parts) for place in places if place.operation.operator == operator)
    if not here:
        pytest.skip(f"a {name} has no {operator}")
    tuned(model, x, lambda other: "pytorch" if other == operator else "cpp")
    fused = repavit_ops.fuse(model)
    route = fused.route(x)
    left = [step for run in route.calls if isinstance(run, PyTorchRun) for step in run.steps]
    in_steps = here - (operator == "patch_projection")  # the convolution is a token_embedding there
    assert [step.operator for step in left] == [operator] * in_steps
    called, y = ours_in(lambda: fused(x))
    assert set(called) == {"repavit_ops::fused_blocks"}
    assert_follows_rule(y, plain(x), copy.deepcopy(plain).double()(x.double()))
    assert torch.equal(fused(x), y)


@torch.no_grad()
def test_one_call_changes_its_runs_with_the_batch():
    model, x = tiny_vit(), images(8)
    tuned(model, x[:1], lambda operator: "cpp")
    tuned(model, x, lambda operator: "pytorch" if operator == "rep_attention" else "cpp")
    fused = repavit_ops.fuse(model)
    lengths = [len(fused.route(x[:batch]).calls) for batch in (1, 2, 3, 8, 2, 8)]
    assert lengths == [1, 1, 5, 5, 1, 5]


@torch.no_grad()
def test_a_model_that_is_all_pytorchs_runs_part_by_part():
    model, x = tiny_vit(), images(1)
    tuned(model, x)
    fused = repavit_ops.fuse(model)
    assert fused.why_apart(x) == "all of it is left to PyTorch on this CPU"
    assert ours_in(lambda: fused(x))[0] == []


@torch.no_grad()
@pytest.mark.parametrize("operator", ["partial_gelu_ffn", "rep_attention"])
def test_blocks_of_a_sequence_go_through_fewer_calls(operator):
    model, x = tiny_vit().blocks, torch.randn(2, 17, 48)
    tuned(model, x, lambda other: "pytorch" if other == operator else "cpp")
    fused = repavit_ops.fuse(model)
    called, y = ours_in(lambda: fused(x))
    assert called == ["repavit_ops::fused_blocks"] * 2
    plain = repavit_ops.reparameterize(model)
    assert_follows_rule(y, plain(x), copy.deepcopy(plain).double()(x.double()))


@torch.no_grad()
def test_gated_ffns_of_a_stack_are_left_to_pytorch():
    halves = [(RepAttention(16, 2, residual=True), GatedFFN(16, 8, activation="silu", residual=True)) for _ in range(2)]
    blocks, x = randomise(nn.Sequential(*(Block(*pair) for pair in halves))), torch.randn(2, 5, 16)
    plain = blocks(x)
    remember(blocks[0].mlp.operation(), (5, 16), 2, "pytorch")
    for _, ffn in halves:
        ffn.repack()
    called, y = ours_in(lambda: FusedStack.replacing(blocks)(x))
    assert called == ["repavit_ops::fused_blocks"] * 2
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", [32, 64], ids=["own_size", "resampled"])
def test_positions_that_pytorch_adds_are_followed(side):
    model, x = tiny_vit(), images(2, side)
    tuned(model, x, lambda operator: "pytorch" if operator == "token_embedding" else "cpp")
    fused = repavit_ops.fuse(model)
    route = fused.route(x)
    assert [type(run).__name__ for run in route.calls] == ["PyTorchRun", "KeptPlan"]
    assert len(route.copied) == (side != 32)  # where the step holds pos_embed itself there is nothing to compare
    before = fused(x)
    fused.pos_embed.data.mul_(1.5)
    plain = repavit_ops.fuse(model, backend="reference")
    plain.pos_embed.mul_(1.5)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fused(x), before, atol=1e-2)


@torch.no_grad()
def test_rotary_tables_reach_the_steps_that_pytorch_runs():
    from repavit_ops import stack_plan
    from repavit_ops.stack.kept_plan import KeptPlan

    module, x = randomise(RepAttention(16, 2, norm_eps=1e-6, residual=True)), torch.randn(2, 5, 16)
    angles = torch.randn(5, 8)
    rotary = (angles.cos(), angles.sin())
    steps = [module.step((5,)), randomise(PartialGELUFFN(16, 8)).step((5,))]
    ours, pytorchs = KeptPlan(stack_plan.encode(steps))(x, rotary), PyTorchRun(steps)(x, rotary)
    torch.testing.assert_close(pytorchs, ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pytorchs, PyTorchRun(steps)(x), atol=1e-2)


@torch.no_grad()
def test_a_forced_backend_is_not_moved_by_the_table():
    model, x = tiny_vit(), images(2)
    tuned(model, x)
    forced = repavit_ops.fuse(model, backend="cpp")
    assert [type(run).__name__ for run in forced.route(x).calls] == ["KeptPlan"]
    assert ours_in(lambda: forced(x))[0] == ["repavit_ops::fused_blocks"]
    assert len(ours_in(lambda: forced.forward_features(x))[0]) == 2  # the convolution, and the blocks
    mixed = repavit_ops.fuse(model)
    mixed.patch_embed.proj.backend = "cpp"
    assert [type(run).__name__ for run in mixed.route(x).calls] == ["KeptPlan", "PyTorchRun"]
    plain = repavit_ops.fuse(model, backend="reference")
    assert all(part.choice is None for part in plain.modules() if isinstance(part, PackedWeights))


def test_pytorch_is_no_backend_to_ask_for():
    with pytest.raises(ValueError, match=r"backend: got 'pytorch', wanted one of auto, reference, cpp, triton$"):
        repavit_ops.fuse(tiny_vit(), backend="pytorch")


@torch.no_grad()
def test_weights_written_behind_a_model_are_followed_on_either_side():
    model, x = tiny_vit(), images(2)
    tuned(model, x, lambda operator: "pytorch" if operator == "rep_attention" else "cpp")
    fused = repavit_ops.fuse(model)
    fused(x)
    for write in (lambda w: w.mul_(1.5), lambda w: w.data.mul_(0.5)):
        for block in fused.blocks:
            write(block.attn.w_proj)
            write(block.mlp.w_out)
        plain = repavit_ops.fuse(model, backend="reference")
        for mine, theirs in zip(plain.blocks, fused.blocks, strict=True):
            mine.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def test_gradients_hooks_and_autocast_are_right():
    model, x = tiny_vit(), images(2)
    tuned(model, x, lambda operator: "pytorch" if operator in ("rep_attention", "partial_gelu_ffn") else "cpp")
    fused, plain = repavit_ops.fuse(model), repavit_ops.fuse(model, backend="reference")
    for some in (fused, plain):
        some(x).square().sum().backward()
    for (name, mine), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
    seen = []
    fused.blocks[0].attn.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
        assert seen == [(2, 17, 48)]
        with torch.autocast("cpu", BF16):
            assert fused.blocks[0].mlp.backend_for(torch.zeros(2, 17, 48)) == "auto"  # that was not measured
            torch.testing.assert_close(fused(x).float(), plain(x).float(), rtol=0.1, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "somewhere"])
def test_compiled_and_exported_programs_take_what_no_size_decides(everywhere):
    module, x = randomise(PartialGELUFFN(16, 8)), torch.randn(2, 5, 16)
    remember(module.operation(), (5, 16), 2, "pytorch")
    if not everywhere:
        remember(module.operation(), (7, 16), 2, "cpp")
    module.repack()
    plain = module(x)
    batch = torch.export.Dim("batch", min=1, max=64)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch, 1: tokens},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("repavit_ops.partial_gelu_ffn.default" in targets) != everywhere
    torch.testing.assert_close(program.module()(x), plain, rtol=1e-4, atol=1e-5)
    for some in (x, torch.randn(3, 7, 16)):
        called, y = ours_compiled(module, some, dynamic=True)
        assert (called == []) == everywhere
        torch.testing.assert_close(y, module(some), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compiled_stack_takes_what_no_size_decides():
    model, x = tiny_vit().blocks, torch.randn(2, 17, 48)
    tuned(model, x, lambda operator: "pytorch" if operator == "rep_attention" else "cpp")
    fused = repavit_ops.fuse(model)
    called, y = ours_compiled(fused, x)
    assert called == ["repavit_ops.fused_blocks"] * 2
    torch.testing.assert_close(y, fused(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_model_without_its_plain_weights_runs_on_the_kernels():
    model, x = tiny_vit(), images(2)
    tuned(model, x, lambda operator: "cpp" if operator == "pooled_head" else "pytorch")
    fused = repavit_ops.fuse(model, keep_unpacked=False)
    called, y = ours_in(lambda: fused(x))
    assert called == ["repavit_ops::fused_blocks"]
    torch.testing.assert_close(y, repavit_ops.fuse(model, backend="cpp")(x))


def test_quantized_modules_stay_on_their_kernels(without_amx):
    fused = repavit_ops.fuse(tiny_vit(), dtype=BF16, quantize="int8")
    quantized = [part for part in fused.modules() if isinstance(part, PackedWeights) and part.quantize != "none"]
    assert len(quantized) == 4
    assert all(part.choice is None and part.packed_copy is not None for part in quantized)


def test_the_report_says_what_is_pytorchs_and_by_which_table():
    model, x = tiny_vit(), images(2)
    tuned(model, x, lambda operator: "pytorch" if operator == "rep_attention" else "cpp")
    report = repavit_ops.fusion_report(repavit_ops.fuse(model))
    assert report.runs_on.endswith(f"; 2 fused modules in PyTorch's own form by {cpu_tuning.path()}")
    notes = {entry.name: entry.note for entry in report.entries}
    assert notes["blocks.0.attn"].endswith("PyTorch's own form for 17x48 at every batch")
    assert "PyTorch" not in notes["blocks.0.mlp"]
    assert notes["blocks"].startswith("2 blocks in few calls around what is PyTorch's")


# --- processors with AMX ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_until_tuned_bfloat16_is_pytorchs_where_amx_cannot_be_used(without_amx):
    model, x = tiny_vit(), images(2)
    half, single = repavit_ops.fuse(model, dtype=BF16), repavit_ops.fuse(model)
    assert ours_in(lambda: half(x.to(BF16)))[0] == []
    assert ours_in(lambda: single(x))[0] == ["repavit_ops::fused_blocks"]
    parts = [part for part in half.modules() if isinstance(part, PackedWeights)]
    assert parts
    assert all(part.packed_copy is None for part in parts)  # no memory for what is never called
    assert half.blocks.why_apart() == "its blocks are left to PyTorch on this CPU"
    plain = repavit_ops.reparameterize(model)
    truth = copy.deepcopy(plain).double()(x.double())
    assert_follows_rule(half(x.to(BF16)), plain.to(BF16)(x.to(BF16)), truth)
    forced = repavit_ops.fuse(model, dtype=BF16, backend="cpp")
    assert ours_in(lambda: forced(x.to(BF16)))[0] == ["repavit_ops::fused_blocks"]


@torch.no_grad()
def test_autocast_to_bfloat16_is_pytorchs_there_too(without_amx):
    fused, x = repavit_ops.fuse(tiny_vit()), images(2)
    plain = fused(x)
    with torch.autocast("cpu", BF16):
        called, y = ours_in(lambda: fused(x))
        assert called == []
        torch.testing.assert_close(y.float(), plain, rtol=0.1, atol=0.1)
        assert ours_compiled(fused.blocks[0].mlp, torch.zeros(2, 17, 48))[0] == []
    assert len(ours_in(lambda: fused(x))[0]) == 1


@torch.no_grad()
def test_compiled_bfloat16_is_pytorchs_there_too(without_amx):
    fused, x = repavit_ops.fuse(tiny_vit(), dtype=BF16), torch.randn(2, 17, 48).to(BF16)
    called, y = ours_compiled(fused.blocks, x)
    assert called == []
    torch.testing.assert_close(y, fused.blocks(x), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_what_was_tuned_holds_there(without_amx):
    model, x = tiny_vit(), images(2).to(BF16)
    tuned(model, x, lambda operator: "cpp")
    fused = repavit_ops.fuse(model, dtype=BF16)
    assert ours_in(lambda: fused(x))[0] == ["repavit_ops::fused_blocks"]


@torch.no_grad()
def test_what_one_call_takes_to_a_kernel_there_is_packed(without_amx):
    """The convolution by itself is PyTorch's, the token embedding around the same weights is not."""
    model, x = tiny_vit(), images(2).to(BF16)
    tuned(model, x, lambda operator: "cpp" if operator == "token_embedding" else "pytorch")
    fused = repavit_ops.fuse(model, dtype=BF16)
    assert [type(run).__name__ for run in fused.route(x).calls] == ["KeptPlan", "PyTorchRun"]
    assert fused.patch_embed.proj.packed_copy is not None


@pytest.mark.parametrize("refusal", [1, 2, 3])
def test_info_and_the_report_say_why_bfloat16_is_pytorchs(refusal, monkeypatch):
    monkeypatch.setattr(torch.ops.repavit_ops, "amx_refusal", lambda: refusal)
    cpu_tuning.forget()
    with pytest.warns(UserWarning, match="level avx512_bf16"):
        rows = dict(info.rows(info.collect()))
    left = f"until {cpu_tuning.COMMAND} has measured it: {backends.AMX_REFUSALS[refusal]}"
    assert rows["bfloat16"] == f"PyTorch's own form {left}"
    with pytest.warns(UserWarning, match="level avx512_bf16"):
        report = repavit_ops.fusion_report(repavit_ops.fuse(tiny_vit(), dtype=BF16))
    assert report.runs_on.endswith(f"; 5 fused modules in PyTorch's own form {left}")
    notes = {entry.name: entry.note for entry in report.entries}
    assert notes["blocks.0.mlp"].endswith("PyTorch's own form")
    assert notes["VisionTransformer"] == "all of it is left to PyTorch on this CPU"
    with pytest.warns(UserWarning, match="level avx512_bf16"):
        assert "PyTorch's own form" not in str(repavit_ops.fusion_report(repavit_ops.fuse(tiny_vit())))


def test_packed_files_of_what_is_pytorchs_are_refused_with_the_fix(without_amx, folder):
    fused = repavit_ops.fuse(tiny_vit(), dtype=BF16)
    with pytest.raises(ValueError, match=r"its blocks are left to PyTorch until .*fuse it with backend='cpp'"):
        repavit_ops.save_packed(fused, folder / "tiny.safetensors")
