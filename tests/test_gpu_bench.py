"""bench/gpu.py without a GPU: the plan, cases that run and are checked, crashes and second calls, the table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import gpu
import gpu_ahead
import gpu_cases
import gpu_plan
import gpu_table
import gpu_test_log
import gpu_worker
import pytest
import torch
from gpu_timing import ceilings, interleave

pytest.importorskip("triton", reason="triton is not installed")

CPU = torch.device("cpu")


# --- plan -------------------------------------------------------------------------------------------------------------


def test_the_plan_fits_its_minutes_and_is_in_the_order_of_worth():
    stages = [stage for group in gpu_plan.PLAN for stage in group]
    assert [s.name for s in stages] == ["first", "ceilings", "headline", "tests", "ops", "tune", "cpu", "rest"]
    assert sum(s.seconds for s in stages[:-1]) <= 60 * gpu_plan.MINUTES
    assert all(hasattr(gpu_worker.Worker, name) for name in gpu_plan.STAGES)


def test_every_goal_has_its_case():
    assert {goal.case for goal in gpu_table.GOALS} <= set(gpu_plan.every_case())
    for stage in gpu_plan.STAGES:
        listed = [case.name for case in gpu_plan.cases(stage)]
        assert len(listed) == len(set(listed))


def test_what_needs_no_compiler_comes_first():
    names = [case.name for case in gpu_plan.cases("headline")]
    assert len([name for name in names[:6] if "compile" not in name]) == 6
    assert names[-1].endswith("max_autotune")
    assert sum("max_autotune" in name for name in gpu_plan.every_case()) == 1


# --- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["first", "headline", "ops"])
@torch.no_grad()
def test_small_cases_build_check_and_run(stage):
    for case in gpu_plan.cases(stage, small=True):
        times = interleave(case.build(CPU, False), CPU)
        assert next(iter(times)) == gpu_cases.OURS
        assert len(times) >= 2, case.name
        assert all(t.p20 <= t.p50 <= t.p80 for t in times.values())


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


@torch.no_grad()
def test_ceilings():
    assert all(value > 0 for value in ceilings(CPU).values())


def test_what_is_compiled_ahead_is_found_again(tmp_path, monkeypatch):
    """The kernels of a fused model land in Triton's cache; who compiles them later writes nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    job = gpu_ahead.Job("kernels", "deit_tiny", "fused", 1)

    def written():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}

    command = [sys.executable, "-c", f"import gpu_ahead; print(gpu_ahead.run(gpu_ahead.{job}, 'cpu', 'sm_90', True))"]
    found = []
    for _ in range(2):
        subprocess.run(command, cwd=gpu.CHECKOUT / "bench", check=True, capture_output=True)
        found.append(written())
    assert len(found[0]) >= 5
    assert found[0] == found[1]


# --- table ------------------------------------------------------------------------------------------------------------


def row(case, part="ops", **values):
    return {"device": "X", "torch": "2", "triton": "3", "date": "d", "time": 1.0, "part": part, "case": case, **values}


def seconds(**providers):
    return {name: [0.9 * t, t, 1.1 * t] for name, t in providers.items()}


ROWS = [
    row("ceilings", "ceilings", product_flops=1e15, copy_bytes_per_second=4e12, node_seconds=1e-6),
    row("ffn C192 batch 128", seconds=seconds(repavit_ops=1.0, eager=3.0, addmm=1.2, compile=2.0), flop=1.0),
    row("ffn C1024 batch 128", seconds=seconds(repavit_ops=2.0, eager=2.0), flop=1.6e15),
    row("windows 56x56x96 batch 128", seconds=seconds(repavit_ops=1.0, eager=9.0), flop=1.0),
]


def test_verdicts_take_the_best_peer_and_the_measured_ceiling():
    found = {(goal.text, goal.case): value for goal, value in gpu_table.verdicts(ROWS)}
    assert found["FFN / best peer", "ffn C192 batch 128"] == pytest.approx(1.2)
    assert found["FFN / best peer", "ffn C1024 batch 128"] == pytest.approx(1.0)
    assert found["FFN / product rate", "ffn C1024 batch 128"] == pytest.approx(0.8)
    assert found["windows / SDPA with bias", "windows 56x56x96 batch 128"] is None  # its peer was left out
    assert found["FFN / best peer", "ffn C384 batch 128"] is None
    text = gpu_table.markdown(ROWS)
    assert "| FFN / best peer | ffn C192 batch 128 | ≥ 1.15 | 1.200 | pass |" in text
    assert "| FFN / best peer | ffn C1024 batch 128 | ≥ 1.05 | 1.000 | MISS |" in text
    assert "| FFN / best peer | ffn C384 batch 128 | ≥ 1.15 |  | not measured |" in text


def test_only_what_missed_a_goal_is_tuned():
    assert gpu_table.missed(ROWS) == ["ffn C1024 batch 128"]


def test_table_shows_failures_host_times_and_what_is_wrong():
    failures = {"passed": 7, "failed": 1, "skipped": 2, "cut": True, "failures": [{"test": "a::b", "why": "no"}]}
    rows = [
        row("gpu tests", "check", **failures),
        row("ffn", error="RuntimeError: no"),
        row("ffn C384 batch 8", "first", right=False, why="max error 1.0"),
        row("host", "host", seconds=seconds(model=1e-3), launches={"model": 50}),
    ]
    text = gpu_table.markdown(rows)
    assert "gpu tests: 7 passed, 1 failed, 2 skipped, cut off" in text
    assert "- a::b" in text
    assert "- ffn: RuntimeError: no" in text
    assert "first ffn C384 batch 8: WRONG: max error 1.0" in text
    assert "| model | 1000.0 | 50 | 20.0 |" in text


# --- results ----------------------------------------------------------------------------------------------------------


def test_the_last_measurement_of_a_case_counts(tmp_path):
    path = tmp_path / "x.jsonl"
    for n in (1, 2):
        gpu.write(path, row("a", n=n))
    assert [r["n"] for r in gpu.read(path)] == [2]
    assert gpu.read(tmp_path / "none") == []


def test_errors_are_tried_again_by_the_next_call_but_not_by_this_one():
    rows = [row("good"), row("failed", error="no"), row("failed now", error="no") | {"time": 9.0}]
    assert gpu.known(rows, since=5.0, again=False) == {("ops", "good"), ("ops", "failed now")}
    assert gpu.known(rows, since=5.0, again=True) == {("ops", "failed now")}


TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip
def test_skipped(): pass
def test_cut():
    import os
    os._exit(1)
"""


def test_tests_count_as_they_end_though_their_run_is_cut(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(TESTS)
    log = tmp_path / "log"
    monkeypatch.setenv("REPAVIT_TEST_LOG", str(log))
    monkeypatch.setenv("PYTHONPATH", str(gpu.CHECKOUT / "bench"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # these tests may run side by side themselves
    command = [sys.executable, "-m", "pytest", "-p", "gpu_test_log", "-p", "no:cacheprovider", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    counted = gpu_test_log.count(log)
    assert [counted[outcome] for outcome in ("passed", "failed", "skipped")] == [1, 1, 1]
    (failure,) = counted["failures"]
    assert failure["test"] == "test_some.py::test_bad"
    assert "assert 1 == 2" in failure["why"]


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path):
    """A worker of a dry run, with a minute for its stage."""

    def make(stages="ceilings", seconds=60.0, since=0.0):
        return gpu_worker.Worker(
            argparse.Namespace(
                stages=stages,
                end=time.time() + seconds,
                since=since,
                results=tmp_path / "x.jsonl",
                state=tmp_path,
                device_name="dry run",
                minutes=8.0,
                dry_run=True,
                no_compile=True,
                again=False,
            )
        )

    return make


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path, worker):
    assert worker().run() == gpu.DONE
    assert worker().run() == gpu.DONE
    assert [r["case"] for r in map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())] == ["ceilings"]


def test_what_there_is_no_time_for_is_told(worker, capsys):
    assert worker("ops", seconds=-1.0).run() == gpu.LEFT_OUT
    assert "ops: no time for 3 more" in capsys.readouterr().out


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A call of bench/gpu.py that starts ``worker``, a Python text, in place of its stages."""

    def make(worker, minutes=1.0, **given):
        options = argparse.Namespace(
            minutes=minutes, out=tmp_path, stages=None, again=False, again_short=None, no_install=True,
            no_compile=True, dry_run=True, earlier=None,
        )  # fmt: skip
        vars(options).update(given)
        script = tmp_path / "bench" / "gpu_worker.py"
        script.parent.mkdir()
        script.write_text(worker)
        for name in ("REPAVIT_TUNED", "PYTHONUNBUFFERED", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            monkeypatch.setenv(name, str(tmp_path / name))  # the call sets some: this puts them back
        monkeypatch.setattr(gpu, "CHECKOUT", tmp_path)
        monkeypatch.setattr(gpu, "STARTING", 0.5)
        return gpu.Run(options, tmp_path)

    return make


CRASHES = """
import json, os, pathlib, sys
state, results = (sys.argv[sys.argv.index(name) + 1] for name in ("--state", "--results"))
if pathlib.Path(results).exists():
    sys.exit(0)
pathlib.Path(state, "now").write_text(json.dumps({"part": "ops", "case": "ffn", "until": UNTIL}))
END
"""


@pytest.mark.parametrize(
    ("until", "end", "error"),
    [("9e9", "os.abort()", "its process ended with -6"), ("0", "import time; time.sleep(60)", "hung, or was cut off")],
)
def test_a_case_that_crashes_or_hangs_is_written_down_and_the_rest_goes_on(until, end, error, run):
    call = run(CRASHES.replace("UNTIL", until).replace("END", end))
    assert call._group([gpu_plan.Stage("ops", 400)])
    (found,) = gpu.read(call.results)
    assert (found["part"], found["case"], found["error"]) == ("ops", "ffn", error)


def test_a_process_that_ends_outside_of_every_case_is_not_begun_again(tmp_path, run):
    call = run("import pathlib, sys; pathlib.Path('begun').open('a').write('x'); sys.exit(3)")
    assert not call._group([gpu_plan.Stage("ops", 400)])
    assert (tmp_path / "begun").read_text() == "x"
    assert gpu.read(call.results) == []


def test_the_second_call_takes_results_and_tiles_of_the_first(tmp_path, run):
    first = tmp_path / "first"
    (first / "tuned").mkdir(parents=True)
    (first / "gpu_dry_run_2001-01-01.jsonl").write_text(json.dumps(row("ffn")) + "\n")
    (first / "tuned" / "x.json").write_text("{}")
    call = run("", again_short=1.0, earlier=first)
    assert call.results == tmp_path / "gpu_dry_run_2001-01-01.jsonl"
    assert [r["case"] for r in gpu.read(call.results)] == ["ffn"]
    assert (tmp_path / "tuned" / "x.json").exists()


def test_a_stage_that_takes_too_long_is_ended(run):
    call = run("import time; time.sleep(60)", minutes=0.15)
    began = time.time()
    assert not call._group([gpu_plan.Stage("ops", 40)])
    assert time.time() - began < 20
