"""``repavit-ops tune --cpu``: its table, which backend "auto" follows wherever a model runs, and nothing else does."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from cli_helpers import run_command
from model_helpers import Recorder, images, randomise, tiny_swin, tiny_vit
from op_helpers import assert_follows_rule
from torch import nn

import repavit_ops
from repavit_ops import backends, cpu_tuning, info
from repavit_ops.benchmarking import cpu_tuner
from repavit_ops.benchmarking.harness import Timing
from repavit_ops.cpu_tuning import Measured, Operation
from repavit_ops.nn import (
    Block,
    GatedFFN,
    PartialGELUFFN,
    PatchConv2d,
    PatchProjection,
    RepAttention,
    WindowRepAttention,
)
from repavit_ops.nn.packed_weights import PackedWeights
from repavit_ops.stack import FusedStack
from repavit_ops.stack.pytorch_run import PyTorchRun

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
BF16, FP32 = torch.bfloat16, torch.float32
USAGE = 2
MODULES = {  # and the shape of what one is called with
    "partial_gelu_ffn": (lambda: PartialGELUFFN(16, 8), (2, 5, 16)),
    "gated_ffn": (lambda: GatedFFN(16, 8, activation="gelu"), (2, 5, 16)),
    "rep_attention": (lambda: RepAttention(16, 2, norm_eps=1e-6, residual=True), (2, 5, 16)),
    "window_rep_attention": (lambda: WindowRepAttention(16, 2, window=2, shift=1), (2, 4, 4, 16)),
    "patch_projection": (lambda: PatchProjection(16, 8, 2, channels_last=True, norm_eps=1e-6), (2, 4, 4, 16)),
    "patch_convolution": (lambda: PatchConv2d.replacing(nn.Conv2d(3, 8, 4, stride=4)), (2, 3, 8, 8)),
}
MODELS = {"vit": (tiny_vit, 32), "swin": (tiny_swin, 64)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder for the table, and no trace left behind."""
    monkeypatch.setenv("REPAVIT_TUNED", str(tmp_path))
    cpu_tuning.forget()
    yield tmp_path
    monkeypatch.undo()
    cpu_tuning.forget()


@pytest.fixture
def call(monkeypatch):
    """Run the command with a timer that takes no time: (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cpu_tuner, "microseconds", lambda seconds: preferring("pytorch"))

    return run_command


@pytest.fixture
def without_amx(monkeypatch):
    """A processor whose AMX the kernels cannot use, as far as the library says."""
    monkeypatch.setattr(torch.ops.repavit_ops, "amx_refusal", lambda: 1)
    cpu_tuning.forget()


def preferring(choice):
    """A timer by which one choice takes half of what the other does; it calls each once."""

    def timer(calls):
        for provider in calls.values():
            provider()
        return {name: 1.0 if name == choice else 2.0 for name in calls}

    return timer


def remember(operation, size, batch, choice):
    us, pytorch_us = (2.0, 1.0) if choice == "pytorch" else (1.0, 2.0)
    cpu_tuning.add(Measured.of(operation, size, batch, us, pytorch_us), cpu_tuning.path())
    cpu_tuning.forget()


def tuned(model, x, choice=lambda operation: "pytorch"):
    """Fill the table for a model, with a choice for each operation."""
    for place in cpu_tuner.places_of(repavit_ops.fuse(model, backend="cpp", dtype=x.dtype), x):
        remember(place.operation, place.x.shape[1:], place.x.shape[0], choice(place.operation.operator))


def ours_in(call):
    """Operators of this library that a call runs, and its result."""
    with Recorder() as recorder:
        y = call()
    return [name for name in recorder.calls if name.startswith("repavit_ops::")], y


def ours_compiled(module, x, **options):
    """Operators of this library in the graph that torch.compile makes of a call, and the call's result."""
    found = []

    def keep(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if "repavit_ops" in str(node.target))
        return graph.forward

    torch.compiler.reset()
    y = torch.compile(module, backend=keep, fullgraph=True, **options)(x)
    return found, y


def named(entry, table):
    """An entry of a table's file."""
    return json.loads(table.read_text())["entries"][entry]


# --- the table --------------------------------------------------------------------------------------------------------


def test_a_table_gives_back_what_was_added_and_replaces_what_is_measured_again(folder):
    ffn, attention = (make().operation() for make, _ in (MODULES["partial_gelu_ffn"], MODULES["rep_attention"]))
    first = [Measured.of(ffn, (5, 16), 1, 2.0, 1.0), Measured.of(ffn, (5, 16), 8, 1.0, math.pi)]
    other = Measured.of(attention, (5, 16), 1, math.inf, 1.0)
    again = Measured.of(ffn, (5, 16), 1, 1.0, 2.0)
    for measured in (*first, other, again):
        cpu_tuning.add(measured, cpu_tuning.path())
    assert set(cpu_tuning.read(cpu_tuning.path())) == {again, first[1], other}
    assert first[1].pytorch_us == 3.14
    assert [file.name for file in folder.iterdir()] == [cpu_tuning.path().name]  # and nothing half written
    assert named(0, cpu_tuning.path())["operator"] == "partial_gelu_ffn"


def test_the_table_is_where_the_variable_says_or_in_the_users_cache(folder, monkeypatch):
    assert cpu_tuning.path().parent == folder
    monkeypatch.delenv("REPAVIT_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert cpu_tuning.path().parent == folder / "cache" / "repavit_ops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert cpu_tuning.path().parent == folder / "home" / ".cache" / "repavit_ops"


@pytest.mark.parametrize(
    ("us", "pytorch_us", "choice"),
    [(1.03, 1.0, "pytorch"), (1.0299, 1.0, "cpp"), (1.0, 1.0, "cpp"), (math.inf, 1.0, "pytorch")],
)
def test_pytorch_is_chosen_where_it_is_faster_by_three_percent(us, pytorch_us, choice):
    assert Measured.of(PartialGELUFFN(16, 8).operation(), (5, 16), 1, us, pytorch_us).choice == choice


@pytest.mark.parametrize("name", ["cpu", "level", "repavit_ops", "torch"])
def test_a_table_of_something_else_is_not_followed_and_info_says_so(name, monkeypatch):
    module, x = PartialGELUFFN(16, 8), torch.zeros(1, 5, 16)
    remember(module.operation(), (5, 16), 1, "pytorch")
    file = cpu_tuning.path()
    table = json.loads(file.read_text())
    value, table[name] = table[name], "another"
    file.write_text(json.dumps(table))
    cpu_tuning.forget()
    module.repack()
    assert module.backend_for(x) == "auto"
    said = dict(info.rows(info.collect()))["cpu table"]
    assert said == f"not used: {file} was measured with {name} another, not {value}; {cpu_tuning.COMMAND} measures anew"
    remember(module.operation(), (7, 16), 1, "pytorch")  # begins anew
    assert [measured.size for measured in cpu_tuning.read(file)] == [(7, 16)]


def test_info_says_how_the_table_stands(monkeypatch, folder):
    def said():
        return dict(info.rows(info.collect()))["cpu table"]

    file = cpu_tuning.path()
    assert said() == f"none ({file}): {cpu_tuning.COMMAND} measures"
    (folder / "cpu_another_avx2.json").write_text("")
    assert said() == f"none ({file}); 1 of other CPUs or levels: {cpu_tuning.COMMAND} measures"
    remember(PartialGELUFFN(16, 8).operation(), (5, 16), 1, "pytorch")
    remember(PartialGELUFFN(16, 8).operation(), (5, 16), 8, "cpp")
    threads = torch.get_num_threads()
    assert said() == f"{file}: 2 measured on {threads} threads; PyTorch's own form for 1"
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert f", none of which has the {threads + 1} of now; " in said()


MALFORMED = {
    "empty": b"",
    "bytes": b"\xff\xfe\x00",
    "list": b"[]",
    "no_header": b'{"entries": []}',
    "deep": b"[" * 100_000,
    "entries": b"null",
    "entry": b"[3]",
    "batch": b'[{"batch": 0}]',
    "choice": b'[{"choice": "fastest"}]',
    "size": b'[{"size": "wide"}]',
    "us": b'[{"us": "quick"}]',
    "huge": b'[{"batch": 1e999}]',
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_file_that_is_no_table_is_a_warning_with_its_name_and_the_fix(what, call):
    module, file = PartialGELUFFN(16, 8), cpu_tuning.path()
    remember(module.operation(), (5, 16), 1, "pytorch")
    content = MALFORMED[what]
    if what in ("entries", "entry", "batch", "choice", "size", "us", "huge"):
        table, wrong = json.loads(file.read_text()), json.loads(content)
        of_entry = isinstance(wrong, list) and isinstance(wrong[0], dict)
        table["entries"] = [{**table["entries"][0], **wrong[0]}] if of_entry else wrong
        content = json.dumps(table).encode()
    file.write_bytes(content)
    cpu_tuning.forget()
    with pytest.warns(RuntimeWarning, match="the CPU's table is not used: .*is no table of this library") as caught:
        module.repack()
    assert f"{file} is no table" in str(caught[0].message)
    assert "delete it" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module(torch.zeros(1, 5, 16)).shape == (1, 5, 16)  # and is told once
    assert cpu_tuning.state().startswith(f"not used: {file} is no table")
    status, _, err = call("tune", "--cpu", "vanilla_deit_tiny", "--batch", "1", "--dtype", "float32")
    assert status == USAGE
    assert f"{file} is no table" in err
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_read_is_a_warning_too():
    cpu_tuning.path().mkdir()
    with pytest.warns(RuntimeWarning, match=r"is no table of this library \(IsADirectoryError"):
        PartialGELUFFN(16, 8).repack()


@pytest.mark.parametrize(
    "other",
    [
        lambda: PartialGELUFFN(16, 9),
        lambda: PartialGELUFFN(16, 8, bias=False),
        lambda: PartialGELUFFN(16, 8, merged=False),
        lambda: PartialGELUFFN(16, 8, norm_eps=1e-6),
        lambda: PartialGELUFFN(16, 8, residual=True),
        lambda: PartialGELUFFN(16, 8, approximate="tanh"),
        lambda: PartialGELUFFN(16, 8, dtype=BF16),
        lambda: GatedFFN(16, 8, activation="silu"),
    ],
)
def test_other_operations_are_not_in_the_table(other):
    remember(PartialGELUFFN(16, 8).operation(), (5, 16), 1, "pytorch")
    assert cpu_tuning.choose(PartialGELUFFN(16, 8).operation()) is not None
    assert cpu_tuning.choose(other().operation()) is None


def test_attention_and_windows_of_one_width_are_different_operations():
    plain, window = RepAttention(16, 2), WindowRepAttention(16, 2, window=2)
    assert plain.operation().operator == "rep_attention"
    assert window.operation().operator == "window_rep_attention"
    shifted = WindowRepAttention(16, 2, window=2, shift=1)
    assert window.operation() != shifted.operation()


def test_another_number_of_threads_has_its_own_entries(monkeypatch):
    remember(PartialGELUFFN(16, 8).operation(), (5, 16), 1, "pytorch")
    assert cpu_tuning.choose(PartialGELUFFN(16, 8).operation()) is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert cpu_tuning.choose(PartialGELUFFN(16, 8).operation()) is None


def test_a_batch_goes_where_its_nearest_measured_one_goes():
    operation = PartialGELUFFN(16, 8).operation()
    for batch, choice in ((1, "cpp"), (8, "pytorch"), (32, "pytorch"), (128, "cpp")):
        remember(operation, (5, 16), batch, choice)
    module = PartialGELUFFN(16, 8)
    module.repack()
    batches = (1, 2, 3, 8, 32, 63, 64, 65, 1000)  # edges: √(1·8) = 2.8, √(32·128) = 64
    chosen = [module.backend_for(torch.zeros(batch, 5, 16)) for batch in batches]
    assert chosen == ["auto", "auto", *["pytorch"] * 5, "auto", "auto"]
    assert [cpu_tuning.batch_class(batch) for batch in batches] == [0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert module.backend_for(torch.zeros(8, 6, 16)) == "auto"
    assert str(module.choice) == "PyTorch's own form for 5x16 at batch 3 to 64"


# --- what follows it --------------------------------------------------------------------------------------------------


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


# --- measuring --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_operation_of_a_model_is_found_once_with_all_its_blocks():
    fused = repavit_ops.fuse(tiny_swin(), backend="cpp")
    places = cpu_tuner.places_of(fused, images(2, 64))
    found = {(place.operation.operator, tuple(place.x.shape)): len(place.parts) for place in places}
    assert found == {
        ("patch_projection", (2, 3, 64, 64)): 1,
        ("window_rep_attention", (2, 16, 16, 24)): 1,  # the shifted one has the same shape
        ("partial_gelu_ffn", (2, 16, 16, 24)): 2,
        ("patch_projection", (2, 16, 16, 24)): 1,
        ("window_rep_attention", (2, 8, 8, 48)): 1,
        ("partial_gelu_ffn", (2, 8, 8, 48)): 2,
        ("token_embedding", (2, 3, 64, 64)): 1,
        ("pooled_head", (2, 8, 8, 48)): 1,
    }
    assert len(places) == len(found) + 2
    assert all(not module._forward_pre_hooks for module in fused.modules())


@torch.no_grad()
def test_both_forms_of_every_operation_are_what_would_run():
    fused, x = repavit_ops.fuse(tiny_vit(), backend="cpp"), images(2)
    for place in cpu_tuner.places_of(fused, x):
        ours, y = ours_in(place.turns("cpp"))
        assert len(ours) == 1
        theirs, z = ours_in(place.turns("pytorch"))
        assert theirs == []
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocks_of_one_kind_take_turns():
    (place,) = [
        place
        for place in cpu_tuner.places_of(repavit_ops.fuse(tiny_vit(), backend="cpp"), images(2))
        if place.operation.operator == "rep_attention"
    ]
    turn = place.turns("pytorch")
    first, second, third = turn(), turn(), turn()
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_what_the_table_has_is_not_measured_again_unless_asked(folder):
    places = cpu_tuner.places_of(repavit_ops.fuse(tiny_vit(), backend="cpp"), images(2))
    file = cpu_tuning.path()
    run = lambda choice, **options: len(list(cpu_tuner.tune(places, file, timer=preferring(choice), **options)))  # noqa: E731
    assert run("pytorch") == len(places)
    assert run("cpp") == 0
    assert {measured.choice for measured in cpu_tuning.read(file)} == {"pytorch"}
    assert run("cpp", again=True) == len(places)
    assert {measured.choice for measured in cpu_tuning.read(file)} == {"cpp"}


def test_a_kernel_that_is_wrong_here_is_left_to_pytorch_with_a_warning(monkeypatch):
    (place,) = cpu_tuner.places_of(randomise(PartialGELUFFN(16, 8, backend="cpp")), torch.randn(2, 5, 16))
    good = place.call

    def call(part, backend):
        made = good(part, backend)
        return (lambda: made() + 1) if backend == "cpp" else made

    place.call = call
    with pytest.warns(UserWarning, match=r"partial_gelu_ffn on \[2, 5, 16\]: max error .*left to PyTorch"):
        measured = cpu_tuner.measure(place, preferring("cpp"))
    assert (measured.us, measured.choice) == (math.inf, "pytorch")
    assert cpu_tuner.measure(dataclasses.replace(place), preferring("cpp")).choice == "cpp"


@pytest.mark.parametrize(("p80", "busy"), [(1.4, False), (1.6, True)])
def test_medians_are_told_and_a_busy_machine_too(p80, busy, monkeypatch):
    monkeypatch.setattr(cpu_tuner, "interleave", lambda calls, seconds: {"cpp": Timing(1e-6, 1.2e-6, p80 * 1e-6)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cpu_tuner.microseconds(0.0)({})["cpp"] == pytest.approx(1.2)
    assert ["the machine is busy" in str(warning.message) for warning in caught] == [True] * busy


def test_the_command_measures_a_checkpoint_and_a_model_then_follows_it(call, tmp_path):
    repavit_ops.save_checkpoint(repavit_ops.reparameterize(tiny_vit()), tmp_path / "tiny.safetensors")
    arguments = ("tune", "--cpu", tmp_path / "tiny.safetensors", "--batch", "1", "--dtype", "float32")
    status, out, err = call(*arguments)
    assert status == 0, err
    file = cpu_tuning.path()
    entries = cpu_tuning.read(file)
    assert {entry.operation.operator for entry in entries} == {
        *("partial_gelu_ffn", "rep_attention", "patch_projection", "token_embedding", "pooled_head"),
    }
    (line,) = [line for line in out.splitlines() if line.startswith("rep_attention")]
    assert line.split() == ["rep_attention", "1x17x48", "float32", "2.0", "1.0", "0.50", "PyTorch"]
    assert out.splitlines()[0].split() == [
        "operator",
        "shape",
        "dtype",
        "ours",
        "µs",
        "PyTorch",
        "µs",
        "ratio",
        "choice",
    ]
    assert f"wrote {file}" in out
    fused = repavit_ops.fuse(tiny_vit())
    with torch.no_grad():
        assert ours_in(lambda: fused(images(1)))[0] == []
    assert f"{file} has all of it" in call(*arguments)[1]
    assert len(call(*arguments, "--again")[1].splitlines()) == len(out.splitlines())


def test_the_command_writes_where_it_is_told(call, tmp_path):
    repavit_ops.save_checkpoint(repavit_ops.reparameterize(tiny_vit()), tmp_path / "tiny.safetensors")
    arguments = ("tune", "--cpu", tmp_path / "tiny.safetensors", "--batch", "1", "--dtype", "float32")
    assert call(*arguments, "--out", tmp_path / "elsewhere")[0] == 0
    assert cpu_tuning.path(tmp_path / "elsewhere").exists()
    assert not cpu_tuning.path().exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cpu", "no_such_model"), "MODEL: got 'no_such_model'"),
        (("--cpu", "repa_deit_tiny", "--dtype", "int8"), "--dtype: got 'int8'"),
        (("--cpu", "repa_deit_tiny", "--device", "cuda:1"), "--device: got 'cuda:1' beside --cpu"),
        (("repa_deit_tiny", "--threads", "2"), "--threads: is of the CPU"),
    ],
)
def test_mistakes_are_one_line(call, torchvision_stub, arguments, message):
    status, _, err = call("tune", *arguments)
    assert status == USAGE
    assert message in err


def test_a_model_of_which_nothing_fuses_is_refused(call, monkeypatch):
    monkeypatch.setattr(
        sys.modules["repavit_ops.cli.tune"], "model_of", lambda source: nn.Sequential(nn.Conv2d(3, 3, 3)).eval()
    )
    with pytest.warns(UserWarning, match="nothing"):
        status, _, err = call("tune", "--cpu", "some.pth", "--batch", "1")
    assert status == USAGE
    assert "MODEL: nothing of 'some.pth' fuses" in err


def test_the_command_says_why_there_is_nothing_to_tune(call, monkeypatch):
    monkeypatch.setattr(backends, "_cpp_failure", "not built")
    status, _, err = call("tune", "--cpu", "repa_deit_tiny")
    assert status == USAGE
    assert "nothing to tune: not built" in err


# --- nothing unasked --------------------------------------------------------------------------------------------------


def test_nothing_is_read_at_import_and_the_table_once_when_a_model_is_fused(folder):
    remember(PartialGELUFFN(16, 8).operation(), (5, 16), 1, "pytorch")
    program = f"""
        import sys
        opened = []
        watch = lambda event, args: opened.append(str(args[0])) if event == "open" else None
        sys.addaudithook(watch)
        import torch
        torch.nn.Linear(2, 2)
        opened.clear()
        import repavit_ops, repavit_ops.cpu_tuning
        table = {str(cpu_tuning.path())!r}
        asked = [name for name in opened if name == table or name.startswith("/proc/cpu")]
        assert not asked, asked
        repavit_ops.fuse(repavit_ops.create_model("repa_deit_tiny", img_size=32).eval())
        assert opened.count(table) == 1, opened.count(table)
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in program.splitlines())],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_measured_or_written_unasked(folder, monkeypatch):
    monkeypatch.setattr(cpu_tuner, "interleave", lambda *args: pytest.fail("measured"))
    fused = repavit_ops.fuse(tiny_vit())
    with torch.no_grad():
        fused(images(1))
    info.collect()
    assert list(folder.iterdir()) == []


def test_a_call_asks_no_table(monkeypatch):
    model, x = repavit_ops.fuse(tiny_vit()), images(1)
    with torch.no_grad():
        model(x)
        model.in_one_call = False
        model(x)
        monkeypatch.setattr(cpu_tuning, "choose", lambda operation: pytest.fail("asked"))
        monkeypatch.setattr(Operation, "of", lambda *args: pytest.fail("asked"))
        model(x)
        model.in_one_call = True
        model(x)
