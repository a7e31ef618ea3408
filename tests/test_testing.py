"""repavit_ops.testing and the pytest plugin: an assertion, its reports, and the workflow that runs both."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from model_helpers import images, tiny_vit

import repavit_ops
from repavit_ops.testing import NotEquivalentError, assert_equivalent
from repavit_ops.verification import VerificationReport

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "examples/ci/github-actions.yml"

TESTS = """
import pytest, torch
from torch import nn

def linear(spoilt=False):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).eval()
    with torch.no_grad():
        model.bias += 0.01 * spoilt
    return model

def test_equal(repavit_equivalence):
    assert repavit_equivalence(linear(), linear(), torch.ones(2, 4)).output.top1 == 1.0
    repavit_equivalence(linear(), linear(), torch.ones(1, 4), name="one image")
    assert [row["name"] for row in repavit_equivalence.comparisons] == ["0", "one image"]

def test_spoilt(repavit_equivalence):
    repavit_equivalence(linear(), linear(True), torch.ones(2, 4))

def test_own_bound(repavit_equivalence):
    repavit_equivalence(linear(), linear(True), torch.ones(2, 4), atol=0.1)

def test_not_a_number(repavit_equivalence):
    other = linear()
    nn.init.constant_(other.bias, float("nan"))
    repavit_equivalence(linear(), other, torch.ones(2, 4))

def test_a_name_twice(repavit_equivalence):
    repavit_equivalence(linear(), linear(), torch.ones(2, 4), name="a")
    with pytest.raises(ValueError, match="name: got 'a' twice in test_a_name_twice"):
        repavit_equivalence(linear(), linear(), torch.ones(2, 4), name="a")

def test_without():
    pass
"""


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_equal_models_give_the_report():
    model = tiny_vit()
    report = assert_equivalent(model, repavit_ops.fuse(model), images())
    assert isinstance(report, VerificationReport)
    assert report.blocks


def test_unlike_models_raise_with_the_report():
    model = tiny_vit()
    with pytest.raises(
        NotEquivalentError, match=r"candidate: not equivalent to the reference\nFAIL in float32"
    ) as caught:
        assert_equivalent(model, tiny_vit(seed=1), images())
    assert isinstance(caught.value, AssertionError)
    assert not caught.value.report
    assert "blocks.1" in str(caught.value)
    assert_equivalent(model, tiny_vit(seed=1), images(), atol=1e3)


def test_models_that_cannot_be_compared_are_no_failed_assertion():
    with pytest.raises(RuntimeError, match="candidate: in training mode"):
        assert_equivalent(tiny_vit(), tiny_vit().train(), images())


def test_reports_of_the_plugin_from_two_workers(tmp_path):
    (tmp_path / "test_models.py").write_text(TESTS)
    done = pytest_in(tmp_path, "-n", "2", "--repavit-json", "out/found.json", "--junit-xml", "junit.xml")
    assert done.returncode == 1
    assert "2 failed, 4 passed" in done.stdout
    assert "FAIL in float32" in done.stdout
    assert re.search(r"DIFFERS test_models.py::test_spoilt \[0\] float32: max abs 1\.00e-02 \(bound ", done.stdout)
    assert "equal   test_models.py::test_equal [one image]" in done.stdout

    found = json.loads((tmp_path / "out/found.json").read_text())
    assert found["passed"] is False
    rows = {(row["test"].split("::")[1], row["name"]): row for row in found["comparisons"]}
    names = {("test_equal", "0"), ("test_equal", "one image"), ("test_spoilt", "0"), ("test_own_bound", "0")}
    assert rows.keys() == names | {("test_not_a_number", "0"), ("test_a_name_twice", "a")}
    assert rows["test_spoilt", "0"]["passed"] is False
    assert rows["test_spoilt", "0"]["outputs"][0]["max_abs"] == pytest.approx(0.01, rel=1e-3)
    assert rows["test_own_bound", "0"]["passed"] is True
    assert rows["test_not_a_number", "0"]["output"]["cosine"] is None  # JSON knows no NaN

    cases = {case.get("name"): case for case in ElementTree.parse(tmp_path / "junit.xml").iter("testcase")}
    properties = {p.get("name"): p.get("value") for p in cases["test_spoilt"].iter("property")}
    assert properties["repavit_equivalence.0.passed"] == "False"
    assert float(properties["repavit_equivalence.0.max_abs"]) == pytest.approx(0.01, rel=1e-3)
    assert "repavit_equivalence.one image.bound" in {p.get("name") for p in cases["test_equal"].iter("property")}
    assert not list(cases["test_without"].iter("property"))


def test_the_plugin_costs_no_import_of_torch():
    """It is loaded by every run of pytest in an environment that has this package."""
    code = "import sys, pytest_repavit_ops; print([name for name in ('torch', 'repavit_ops') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_example_workflow_runs_what_is_there(tmp_path):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(WORKFLOW.read_text())
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == "ubuntu-latest"
    (command,) = (step["run"] for step in job["steps"] if step.get("name") == "Compare")
    words = command.replace('"$TESTS"', str(ROOT / workflow["env"]["TESTS"])).split()
    assert words[0] == "pytest"
    done = pytest_in(tmp_path, "-n", "0", "--rootdir", str(tmp_path), *words[1:])
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "equivalence.json").read_text())["passed"] is True
    assert len(json.loads((tmp_path / "equivalence.json").read_text())["comparisons"]) == 4
    (upload,) = (step for step in job["steps"] if step.get("uses", "").startswith("actions/upload-artifact"))
    assert upload["with"]["path"] == "equivalence.*"
    assert (tmp_path / "equivalence.xml").exists()
