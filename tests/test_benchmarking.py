"""repavit_ops bench: what is timed was checked, what is missing is said, tables hold the papers' figures. No times."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
from model_helpers import randomise, tiny_vit
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import repavit_ops
from repavit_ops.benchmarking import (
    harness,
    measuring,
    method,
    models,
    operators,
    papers,
    peers,
    phones,
    plots,
    report,
)
from repavit_ops.benchmarking.harness import Timing
from repavit_ops.benchmarking.measuring import OURS, Case, Limits, Provider, measure
from repavit_ops.benchmarking.peers import ALL, Peer
from repavit_ops.cli import app

NONE = Limits(0.0, 1)


@pytest.fixture
def steady(monkeypatch):
    """Every provider takes one millisecond more than the one before; calls are made once."""

    def interleave(calls, *_, progress=lambda share: None, **__):
        for call in calls.values():
            call()
        progress(1.0)
        return {name: Timing(*[1e-3 * (index + 1)] * 3) for index, name in enumerate(calls)}

    monkeypatch.setattr(measuring, "interleave", interleave)


@pytest.fixture
def tiny(monkeypatch, steady):
    """Any name is a ViT of 32 pixels."""

    def build(name, idle_ratio=0.75):
        if name.startswith("vanilla"):
            return tiny_vit(idle_ratio=None, act_channels=None)
        return tiny_vit(idle_ratio=idle_ratio)

    for module in (models, method):
        monkeypatch.setattr(module, "seeded_model", build)


@pytest.fixture
def fakes(monkeypatch):
    """Peers: one that computes the same, one that is wrong, one that breaks, one that is not installed."""

    def fake(name, build, modules=()):
        return Peer(name, f"pip install {name}", modules, ALL, build)

    def wrong(subject):
        return lambda: subject.cast(subject.x) + 0.1

    def breaks(subject):
        def call():
            raise TypeError("no such layer\nand more")

        return call

    all_four = (
        fake("right", lambda subject: lambda: subject.cast(subject.x)),
        fake("wrong", wrong),
        fake("breaks", breaks),
        fake("absent", wrong, modules=("no_such_module",)),
    )
    monkeypatch.setattr(peers, "PEERS", {peer.name: peer for peer in all_four})


def shown(*renderables):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for renderable in renderables:
        console.print(renderable)
    return console.export_text()


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


# --- timing -----------------------------------------------------------------------------------------------------------


def test_providers_are_timed_in_turns(monkeypatch):
    monkeypatch.setattr(harness, "SETTLE", 0.0)
    monkeypatch.setattr(harness, "TURN", 0.0)
    order, now, shares = [], itertools.count(), []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = harness.interleave(calls, seconds=0.0, rounds=4, clock=lambda: next(now), progress=shares.append)
    assert order[3:] == [name for name in "abc" for _ in range(2)] * 4  # after one call each: warm-up and timed
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert {name: t.p50 for name, t in times.items()} == dict.fromkeys("abc", 1)


def test_the_eager_side_calls_the_common_gelu_and_the_reference_gets_its_own_back():
    x = torch.randn(64, 16)
    exact = repavit_ops.reference.gelu(x)
    with repavit_ops.reference.common_gelu():
        assert torch.equal(repavit_ops.reference.gelu(x), torch.nn.functional.gelu(x))
    assert torch.equal(repavit_ops.reference.gelu(x), exact)


# --- what is checked --------------------------------------------------------------------------------------------------


def test_a_peer_that_is_wrong_or_breaks_is_not_timed_and_that_is_said(tiny, fakes):
    measured = measure(models.model_case("repa_deit_tiny", 2, torch.float32), NONE)
    assert list(measured.timings) == ["eager", OURS, "right"]
    assert measured.left_out["wrong"].startswith("max error 1.0")
    assert measured.left_out["wrong"].endswith("not timed")
    assert measured.left_out["breaks"] == "failed: TypeError: no such layer"
    assert measured.left_out["absent"] == "no_such_module not installed: pip install absent"
    assert measured.errors[OURS] < 1e-5


def test_a_wrong_result_of_ours_is_an_error(steady):
    one = torch.ones(1, 3)
    providers = {"eager": Provider(lambda: lambda: one), OURS: Provider(lambda: lambda: one + 0.01, own=True)}
    with pytest.raises(AssertionError, match=r"repavit_ops: max error 1.000e-02"):
        measure(Case("case", torch.float32, 1, providers, {"": one.double}), NONE)


def test_ours_may_be_off_by_twice_eagers_error_and_a_peer_by_eight_times(steady):
    truth = torch.zeros(1, 3)
    offs = {"eager": 1.0, OURS: 1.9, "near": 7.9, "far": 8.1}
    providers = {name: Provider(lambda off=off: lambda: truth + off) for name, off in offs.items()}
    providers[OURS] = Provider(providers[OURS].make, own=True, slack=measuring.OWN_SLACK)
    measured = measure(Case("case", torch.float32, 1, providers, {"": truth.double}), NONE)
    assert list(measured.timings) == ["eager", OURS, "near"]
    providers[OURS] = Provider(lambda: lambda: truth + 2.1, own=True, slack=measuring.OWN_SLACK)
    with pytest.raises(AssertionError, match=OURS):
        measure(Case("case", torch.float32, 1, providers, {"": truth.double}), NONE)


def test_every_result_is_held_against_a_truth_of_its_own(steady):
    one, two = torch.ones(1, 3), torch.full((1, 3), 2.0)
    providers = {
        "a": Provider(lambda: lambda: one, "one"),
        "b": Provider(lambda: lambda: two, "two"),
        "of a": Provider(lambda: lambda: one, "one"),
        "of b": Provider(lambda: lambda: one, "two"),
    }
    measured = measure(Case("case", torch.float32, 1, providers, {"one": one.double, "two": two.double}), NONE)
    assert list(measured.timings) == ["a", "b", "of a"]
    assert list(measured.left_out) == ["of b"]


# --- peers ------------------------------------------------------------------------------------------------------------


def test_a_peer_says_what_is_missing_and_how_to_get_it(monkeypatch):
    absent = Peer("x", "pip install x", ("json", "no_such_module"), (torch.float32,), lambda subject: None)
    assert absent.why_unavailable(torch.float32) == "no_such_module not installed: pip install x"
    narrow = Peer("x", "pip install x", (), (torch.float32,), lambda subject: None)
    assert narrow.why_unavailable(torch.float32) is None
    assert narrow.why_unavailable(torch.bfloat16) == "does not compute in bfloat16 on a CPU"
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    reason = peers.PEERS["compile"].why_unavailable(torch.float32)
    assert reason == "no C++ compiler, which inductor needs: apt install g++"


def test_quick_leaves_out_peers_that_take_minutes_unless_they_are_named(monkeypatch):
    slow = Peer("slow", "", (), ALL, lambda subject: None, slow=True)
    monkeypatch.setattr(peers, "PEERS", {"slow": slow})
    assert peers.find_peers(None, torch.float32) == ([slow], {})
    assert peers.find_peers(["slow"], torch.float32, quick=True) == ([slow], {})
    found, missing = peers.find_peers(None, torch.float32, quick=True)
    assert found == []
    assert "--peers slow" in missing["slow"]
    with pytest.raises(ValueError, match="peers: got fast, wanted some of slow"):
        peers.find_peers(["slow", "fast"], torch.float32)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "litert", "executorch", "ncnn", "iree", "zentorch"])
def test_peers_compute_a_tiny_model(name):
    peer = peers.PEERS[name]
    if reason := peer.why_unavailable(torch.float32):
        pytest.skip(reason)
    model, x = repavit_ops.reparameterize(tiny_vit()), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        out = peer.call(peers.Subject(model, x))()
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


def test_ncnn_takes_one_image():
    with pytest.raises(ValueError, match="one image at once, got 2"):
        phones.ncnn(tiny_vit(), torch.randn(2, 3, 32, 32))


# --- operators and models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", operators.OPERATORS)
def test_an_operators_work_is_what_pytorch_counts(name):
    operator = operators.OPERATORS[name]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        operator.build("reference")(torch.empty(1, *operator.tokens))
    assert counter.get_total_flops() == 2 * operator.products


@pytest.mark.parametrize("dtype", ALL[:2])
@pytest.mark.parametrize("name", ["ffn C192 m192", "attention C192", "windows 7x7 C768"])
def test_operators_are_checked_beside_eager(steady, name, dtype):
    measured = measure(operators.operator_case(name, 1, dtype, peers=[]), NONE)
    row = measured.to_dict()
    assert {"eager", OURS} == set(row["seconds"]) == set(row["errors"])
    assert row["ratio"] == row["ratios"]["eager"] == 0.5
    assert row["gflops"] == pytest.approx(row["flop"] / 2e-3 / 1e9)
    assert row["peak_bytes_per_second"] > 0


def test_a_models_row_is_one_json_line_with_the_machine(tiny, fakes, tmp_path):
    done = run("models", "--model", "repa_deit_tiny", "--batch", "2", "--json", str(tmp_path / "rows.jsonl"))
    assert done.exit_code == 0, done.output
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert {"cpu", "isa", "threads", "torch", "date"} <= row.keys()
    assert row["case"] == "repa_deit_tiny batch 2"
    assert row["seconds"][OURS] == [2e-3] * 3
    assert row["images_per_second"][OURS] == 1000
    assert row["ratios"] == {"eager": 0.5, "right": 1.5}
    for words in ("eager", "1.00", "0.50x", "right", "1.50x", "not timed: absent", "pip install absent"):
        assert words in done.output


def test_a_wrong_result_ends_the_command_with_status_1(tiny, monkeypatch):
    monkeypatch.setattr(models, "fuse", lambda model, **_: randomise(tiny_vit(), seed=5))
    done = run("models", "--model", "repa_deit_tiny", "--peers", "none")
    assert done.exit_code == 1
    assert "wrong: repavit_ops: max error" in done.output


def test_json_on_stdout_is_alone_there(tiny, fakes):
    done = run("models", "--model", "repa_deit_tiny", "--peers", "none", "--json", "-")
    assert [json.loads(line)["case"] for line in done.stdout.splitlines()] == ["repa_deit_tiny batch 1"]


def test_a_reason_is_said_once_with_the_cases_that_it_holds_for(tiny, fakes):
    rows = [measure(models.model_case(name, 1, torch.float32), NONE) for name in ("repa_deit_tiny", "repa_deit_small")]
    lines = report.left_out_lines(rows)
    assert sum("absent" in line for line in lines) == 1
    only = report.left_out_lines([rows[0], measure(models.model_case("x", 1, torch.float32, peers=[]), NONE)])
    assert any(line.startswith("not timed: absent of repa_deit_tiny batch 1: no_such_module") for line in only)


def test_quick_means_few_cases_and_short_ones(tiny, fakes, monkeypatch):
    seen = []
    monkeypatch.setattr(
        measuring, "measure", lambda case, *rest: seen.append((case.name, rest[0])) or measure(case, *rest)
    )
    assert run("models", "--quick").exit_code == 0
    assert seen == [(f"{name} batch 1", Limits(0.5, 3)) for name in models.QUICK]
    assert len(models.QUICK) < len(models.MODELS) / 4
    assert set(models.QUICK) < set(models.MODELS)
    assert set(operators.QUICK) < set(operators.OPERATORS)
    assert [group.name for group in method.groups_of(method.QUICK, quick=True)] == [
        "table 1, DeiT-Tiny",
        "table 4, DeiT-Tiny",
        "table depth, ViT-Tiny, 12 blocks",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("models", "--model", "repa_deit_tinny"), "close: repa_deit_tiny"),
        (("ops", "--dtype", "int8"), "--dtype: got 'int8', wanted one of float32"),
        (("ops", "--peers", "openvino,foo"), "peers: got foo, wanted some of openvino"),
        (("method", "--table", "5"), "table: got '5', wanted one of 1, 2, 3, 4, 8, 9, depth"),
    ],
)
def test_a_mistake_is_one_line(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.output
    assert done.output.count("\n") == 1


# --- the papers' tables -----------------------------------------------------------------------------------------------


def test_tables_have_every_row_of_the_papers():
    counts = {table: len(rows) for table, rows in papers.TABLES.items()}
    assert counts == {"1": 30, "2": 24, "3": 4, "4": 30, "8": 4, "9": 6, "depth": 4}
    assert set(papers.NOTES) == set(papers.TABLES)


@pytest.mark.parametrize(
    ("table", "label", "ratio"),
    [
        ("1", "RePa-DeiT-Base/0.75", 1.578),
        ("1", "RePa-ViT-Huge/0.75", 1.688),
        ("2", "LPViT", 1.163),
        ("3", "RePa-DeiT-Base/0.25", 1.169),
        ("8", "RePa-ViT-Base/0.75", 1.572),
        ("9", "RePa-CLIP-ViT-B/32/0.75", 1.506),
    ],
)
def test_the_papers_own_ratios(table, label, ratio):
    groups = [group for group in method.groups_of([table]) if any(row.label == label for row in group.rows)]
    row = next(row for row in reversed(groups[0].rows) if row.label == label)
    assert method.paper_ratio(row, groups[0].rows[0]) == pytest.approx(ratio, abs=6e-4)


def test_ratios_are_to_the_vanilla_backbone_plain_to_plain_and_fused_to_fused(tiny):
    group = method.groups_of(["1"])[0]
    vanilla, training, deployed = method.measure_group(group, 1, torch.float32, NONE)
    # in their order: vanilla plain and fused, training, deployed plain and fused take 1 to 5 ms
    assert vanilla.ratios == {"plain": 1.0, "fused": 1.0}
    assert training.ratios == pytest.approx({"plain": 1 / 3})
    assert deployed.ratios == pytest.approx({"plain": 1 / 4, "fused": 2 / 5})
    assert deployed.rates == pytest.approx({"plain": 250.0, "fused": 200.0})
    row = deployed.to_dict()
    assert (row["params"], row["backbone"], row["form"]) == (4381288, "deit_tiny", "deployed")
    assert row["paper"]["speed"] == 4001.2


def test_a_form_that_computes_something_else_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(method, "fuse", lambda model, **_: randomise(tiny_vit(), seed=5))
    with pytest.raises(AssertionError, match="fused: max error"):
        method.measure_group(method.groups_of(["1"])[0], 1, torch.float32, NONE)


def test_methods_of_other_papers_stand_beside_ours_untimed(tiny):
    lines = method.measure_group(method.groups_of(["2"])[2], 1, torch.float32, NONE)
    assert [line.paper.label for line in lines if not line.rates] == ["WDPruning", "X-pruner"]
    text = shown(report.method_table("2", lines))
    assert re.search(r"WDPruning +\[32.8\] +\[6.3\] +1.15 +81.8", text)
    assert re.search(r"Swin-Small +49.6 +8.6 +1000.0 +1.00 +500.0 +1.00 +1.00 +83.0", text)
    assert re.search(r"RePa-Swin-Small/0.50 +37.8 +6.5 .* 1.21 +82.8 *\n +\[6.4\]", text)


def test_bench_method_prints_tables_notes_and_json(tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    done = run("method", "--table", "8,1", "--quick", "--json", str(path), "--plot", str(tmp_path))
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["table"], row["label"]) for row in rows][:2] == [("8", "ViT-Small"), ("8", "RePa-ViT-Small/0.75")]
    assert all(row["batch"] == 1 and row["dtype"] == "float32" and "cpu" in row for row in rows)
    assert "one A6000 at batch 128" in done.output
    assert (tmp_path / "speed-against-parameters-dark.svg").exists()


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_without_matplotlib_the_command_says_so_before_it_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else name)
    monkeypatch.setattr(measuring, "measure", pytest.fail)
    for arguments in (("ops", "--quick", "--peers", "none"), ("models", "--peers", "none"), ("method",)):
        done = run(*arguments, "--plot", str(tmp_path))
        assert (done.exit_code, "pip install 'repavit-ops[bench]'" in done.output) == (2, True)


def test_pictures_for_light_and_dark_pages(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    row = measure(operators.operator_case("ffn C192 m192", 1, torch.float32, peers=[]), NONE).to_dict()
    lines = [line.to_dict() for line in method.measure_group(method.groups_of(["4"])[0], 1, torch.float32, NONE)]
    written = plots.peers_as_bars([row], tmp_path) + plots.roofline([row], tmp_path)
    written += plots.speed_against_parameters(lines, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert {path.name.removeprefix("roofline") for path in written if "roofline" in path.name} == {
        ".svg",
        ".png",
        "-dark.svg",
        "-dark.png",
    }
    for name, words in {
        "peers": ("ffn C192 m192 batch 1", "repavit_ops", " ms"),
        "roofline": ("ffn C192 m192", "GFLOP/s in registers", "operations per byte"),
        "speed-against-parameters": ("DeiT-Tiny", "parameters, millions", "reparameterized"),
    }.items():
        light, dark = ((tmp_path / f"{name}{suffix}.svg").read_text() for suffix in ("", "-dark"))
        assert all(word in light and word in dark for word in words)
        assert ("#16181d" in dark, "#16181d" in light) == (True, False)
