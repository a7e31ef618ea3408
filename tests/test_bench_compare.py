"""bench/compare.py: a loss beyond the spread is found, one within it is not, and other machines are not compared."""

from __future__ import annotations

import json

import compare
import pytest

SAME, SLOWER, NOTHING = 0, 1, 2


@pytest.fixture
def results(tmp_path):
    """Write a file of results: case → ours in seconds, eager's, and the half spread of both as a share."""

    def write(name, cases, **machine):
        lines = []
        for case, (ours, eager, spread) in cases:
            seconds = {k: [s * (1 - spread), s, s * (1 + spread)] for k, s in (("repavit_ops", ours), ("eager", eager))}
            machine = {"cpu": "A", "isa": "avx2", "threads": 2, "torch": "2.13.0", **machine}
            lines.append(json.dumps({**machine, "case": case, "dtype": "float32", "seconds": seconds}))
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_a_loss_beyond_the_spread_fails_and_stands_first(results, capsys):
    old = results("old", [("a", (1.0, 2.0, 0.01)), ("b", (1.0, 2.0, 0.01))])
    new = results("new", [("a", (1.0, 2.0, 0.01)), ("b", (1.1, 2.0, 0.01))])
    assert compare.main([str(old), str(new)]) == SLOWER
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("b float32")
    assert out.splitlines()[1].endswith("slower")
    assert out.splitlines()[-1].startswith("1 slower, 0 faster, 1 same, 0 no verdict; mean -4.7%")
    assert compare.main([str(new), str(old)]) == SAME
    assert "1 faster" in capsys.readouterr().out


def test_a_slower_machine_is_no_loss(results):
    """Both times grew: the ratio did not move."""
    old = results("old", [("a", (1.0, 2.0, 0.01))])
    assert compare.main([str(old), str(results("new", [("a", (1.5, 3.0, 0.01))]))]) == SAME


def test_a_loss_within_the_spread_is_none_and_says_so_where_it_is_wide(results, capsys):
    old, new = (results(name, [("a", (ours, 2.0, 0.05))]) for name, ours in (("old", 1.0), ("new", 1.1)))
    assert compare.main([str(old), str(new)]) == SAME
    assert "same" in capsys.readouterr().out
    old, new = (results(name, [("a", (ours, 2.0, 0.2))]) for name, ours in (("old", 1.0), ("new", 1.3)))
    assert compare.main([str(old), str(new)]) == SAME
    assert "0 slower, 0 faster, 0 same, 1 no verdict" in capsys.readouterr().out


def test_a_change_too_small_to_matter_is_none(results):
    old, new = (results(name, [("a", (ours, 2.0, 0.001))]) for name, ours in (("old", 1.0), ("new", 1.02)))
    assert compare.main([str(old), str(new)]) == SAME
    assert compare.main([str(old), str(new), "--least", "0.01"]) == SLOWER


def test_rows_that_disagree_widen_the_spread(results):
    old = results("old", [("a", (1.0, 2.0, 0.01)), ("a", (1.25, 2.0, 0.01)), ("a", (1.1, 2.0, 0.01))])
    assert compare.main([str(old), str(results("new", [("a", (1.2, 2.0, 0.01))]))]) == SAME
    assert compare.main([str(old), str(results("new", [("a", (1.5, 2.0, 0.01))]))]) == SLOWER


def test_another_machine_or_other_cases_are_not_compared(results, capsys):
    old = results("old", [("a", (1.0, 2.0, 0.01))])
    for other in (results("cpu", [("a", (9.0, 2.0, 0.01))], cpu="B"), results("case", [("b", (9.0, 2.0, 0.01))])):
        assert compare.main([str(old), str(other)]) == NOTHING
        assert "no case of both has repavit_ops and eager on the same machine" in capsys.readouterr().err
    assert compare.main([str(old), str(old), "--peer", "openvino"]) == NOTHING


def test_a_line_that_is_no_result_is_named(results, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.write_text('{"case": "a"}\n')
    assert compare.main([str(bad), str(results("new", []))]) == NOTHING
    assert "bad, line 1: is no row of results (KeyError: 'seconds')" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "none"), str(bad)]) == NOTHING
    assert "none" in capsys.readouterr().err


def test_the_published_results_can_be_compared_with_themselves():
    for path in sorted((compare.Path(compare.__file__).parent / "results").glob("2026-11-2?-zen4-*.jsonl")):
        assert compare.main([str(path), str(path)]) == SAME, path
