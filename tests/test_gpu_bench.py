"""bench/gpu.py without a GPU: cases run and are checked, results go on where they stopped, the table judges rightly."""

from __future__ import annotations

import json
import subprocess
import sys

import gpu
import gpu_cases
import gpu_table
import pytest
import torch
from gpu_timing import ceilings, interleave

pytest.importorskip("triton", reason="triton is not installed")

CPU = torch.device("cpu")


@pytest.mark.parametrize("part", ["ops", "models"])
@torch.no_grad()
def test_small_cases_build_check_and_run(part):
    for case in gpu_cases.cases(part, small=True):
        times = interleave(case.build(CPU, False), CPU)
        assert next(iter(times)) == gpu_cases.OURS
        assert len(times) >= 2, case.name
        assert all(t.p20 <= t.p50 <= t.p80 for t in times.values())


def test_every_goal_has_its_case():
    names = {case.name for part in ("ops", "models") for case in gpu_cases.cases(part)}
    assert {goal.case for goal in gpu_table.GOALS} <= names
    for part in ("ops", "models"):
        listed = [case.name for case in gpu_cases.cases(part)]
        assert len(listed) == len(set(listed))


def test_a_wrong_peer_is_left_out_and_a_wrong_kernel_raises(capsys):
    truth = torch.ones(4, dtype=torch.float64)
    right, wrong = (lambda: torch.ones(4)), (lambda: torch.zeros(4))

    def failing():
        raise RuntimeError("no such kernel")

    calls = {gpu_cases.OURS: right, "good": right, "bad": wrong, "none": failing}
    assert list(gpu_cases.checked(calls, torch.ones(4), truth)) == [gpu_cases.OURS, "good"]
    assert "none left out: RuntimeError: no such kernel" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="not timed"):
        gpu_cases.checked({gpu_cases.OURS: wrong}, torch.ones(4), truth)


def row(case, part="ops", **values):
    return {"device": "X", "torch": "2", "triton": "3", "date": "d", "part": part, "case": case, **values}


def seconds(**providers):
    return {name: [0.9 * t, t, 1.1 * t] for name, t in providers.items()}


def test_verdicts_take_the_best_peer_and_the_measured_ceiling():
    rows = [
        row("ceilings", "ceilings", product_flops=1e15, copy_bytes_per_second=4e12, node_seconds=1e-6),
        row("ffn C192 batch 128", seconds=seconds(repavit_ops=1.0, eager=3.0, addmm=1.2, compile=2.0), flop=1.0),
        row("ffn C1024 batch 128", seconds=seconds(repavit_ops=2.0, eager=2.0), flop=1.6e15),
        row("windows 56x56x96 batch 128", seconds=seconds(repavit_ops=1.0, eager=9.0), flop=1.0),
    ]
    found = {(goal.text, goal.case): value for goal, value in gpu_table.verdicts(rows)}
    assert found["FFN / best peer", "ffn C192 batch 128"] == pytest.approx(1.2)
    assert found["FFN / best peer", "ffn C1024 batch 128"] == pytest.approx(1.0)
    assert found["FFN / product rate", "ffn C1024 batch 128"] == pytest.approx(0.8)
    assert found["windows / SDPA with bias", "windows 56x56x96 batch 128"] is None  # its peer was left out
    assert found["FFN / best peer", "ffn C384 batch 128"] is None
    text = gpu_table.markdown(rows)
    assert "| FFN / best peer | ffn C192 batch 128 | ≥ 1.15 | 1.200 | pass |" in text
    assert "| FFN / best peer | ffn C1024 batch 128 | ≥ 1.05 | 1.000 | MISS |" in text
    assert "| FFN / best peer | ffn C384 batch 128 | ≥ 1.15 |  | not measured |" in text


def test_table_shows_failures():
    failures = {"passed": 7, "failed": 1, "skipped": 2, "failures": ["a::b"]}
    text = gpu_table.markdown([row("gpu tests", "check", **failures), row("ffn", error="RuntimeError: no")])
    assert "gpu tests: 7 passed, 1 failed, 2 skipped" in text
    assert "- a::b" in text
    assert "- ffn: RuntimeError: no" in text


def test_the_last_measurement_of_a_case_counts(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row("a", n=n)) for n in (1, 2)) + "\n")
    assert [r["n"] for r in gpu.read(path)] == [2]
    assert gpu.read(tmp_path / "none") == []


def test_tests_are_counted_from_their_report(tmp_path):
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1">'
        '<testcase classname="t" name="a"/><testcase classname="t" name="b"><failure/></testcase>'
        '<testcase classname="t" name="c"><error/></testcase><testcase classname="t" name="d"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    counted = gpu.count_tests(tmp_path / "r.xml")
    assert counted == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["t::b", "t::c"]}


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Run one part as its own process would, and give back its exit status."""
    monkeypatch.setenv("REPAVIT_TUNED", "")  # main sets it: this puts it back

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path), *options])
        return gpu.main()

    return run


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path, worker):
    part = ("--worker", "ceilings", "--seconds", "60")
    command = [sys.executable, gpu.__file__, "--dry-run", "--parts", "ceilings", "--out", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "| FFN / best peer | ffn C192 batch 128 | ≥ 1.15 |  | not measured |" in first.stdout
    (path,) = tmp_path.glob("*.jsonl")
    assert worker(*part) == 0
    assert len(path.read_text().splitlines()) == 1
    assert worker(*part, "--again") == 0
    assert len(path.read_text().splitlines()) == 2


def test_what_there_is_no_time_for_is_told(worker, capsys):
    assert worker("--worker", "ops") == 1
    assert "ops: no time for 3 more" in capsys.readouterr().out


@torch.no_grad()
def test_ceilings():
    assert all(value > 0 for value in ceilings(CPU).values())
