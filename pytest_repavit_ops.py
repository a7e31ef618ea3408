"""pytest plugin of repavit_ops: the fixture ``repavit_equivalence``, with results as JSON and as JUnit properties.

    def test_fused_model(repavit_equivalence):
        repavit_equivalence(model, repavit_ops.fuse(model), images)

    pytest --repavit-json equivalence.json --junit-xml report.xml

It is a module of its own, since pytest loads it in every run of an environment in which repavit_ops is installed:
importing the package would import PyTorch there. Under pytest-xdist results travel with the tests' reports.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from repavit_ops.verification import VerificationReport

FOUND = "repavit_equivalence"  # where a test's report holds its comparisons
RESULTS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
JUNIT = ("passed", "dtype", "max_abs", "bound", "cosine", "top1")  # of the worst output of each comparison


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("repavit_ops", "equivalence of models (repavit_ops)")
    group.addoption(
        "--repavit-json",
        metavar="FILE",
        type=Path,
        help="write every comparison of the fixture repavit_equivalence, by block and output, as JSON",
    )


class Equivalence:
    """What the fixture ``repavit_equivalence`` gives: call it to assert that two models compute the same.

    Attributes:
        comparisons: plain data of what was compared so far in this test.
    """

    def __init__(self, node: pytest.Item) -> None:
        self._node = node
        self.comparisons: list[dict[str, Any]] = node.stash.setdefault(RESULTS, [])

    def __call__(
        self, reference: Any, candidate: Any, inputs: Any, *, name: str | None = None, **options: Any
    ) -> VerificationReport:
        """As :func:`repavit_ops.testing.assert_equivalent`, and kept for the reports.

        Args:
            reference, candidate, inputs, options: as :func:`repavit_ops.verify`.
            name: what the comparison is called in the reports; default its number in this test, from 0.

        Raises:
            ValueError: this test has a comparison of that name already.
            AssertionError, RuntimeError, ValueError: as :func:`repavit_ops.testing.assert_equivalent`.
        """
        __tracebackhide__ = True
        from repavit_ops.testing import NotEquivalentError, assert_equivalent

        name = str(len(self.comparisons)) if name is None else name
        if any(row["name"] == name for row in self.comparisons):
            raise ValueError(f"name: got {name!r} twice in {self._node.name}, wanted a name for each comparison")
        try:
            report = assert_equivalent(reference, candidate, inputs, **options)
        except NotEquivalentError as error:
            self._keep(name, error.report)
            raise
        self._keep(name, report)
        return report

    def _keep(self, name: str, report: VerificationReport) -> None:
        data = report.to_dict()
        self.comparisons.append({"test": self._node.nodeid, "name": name, **data})
        values = {**data["output"], "passed": data["passed"], "dtype": data["dtype"]}
        prefix = f"{FOUND}.{name}"
        self._node.user_properties += [(f"{prefix}.{key}", values[key]) for key in JUNIT if values[key] is not None]


@pytest.fixture
def repavit_equivalence(request: pytest.FixtureRequest) -> Equivalence:
    """Assert that two models compute the same, and put the comparison into the JSON and JUnit reports."""
    return Equivalence(request.node)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and RESULTS in item.stash:
        setattr(report, FOUND, item.stash[RESULTS])
    return report


class Collected:
    """Gathers the comparisons of all tests, in the process that writes the reports."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.rows += getattr(report, FOUND, [])

    def pytest_sessionfinish(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = {"passed": all(row["passed"] for row in self.rows), "comparisons": self.rows}
            self.path.write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.rows:
            return
        terminalreporter.section("equivalence of models (repavit_ops)", sep="-")
        for row in self.rows:
            worst, mark = row["output"], "equal" if row["passed"] else "DIFFERS"
            terminalreporter.write_line(
                f"{mark:<7} {row['test']} [{row['name']}] {row['dtype']}: max abs {worst['max_abs']:.2e} "
                f"(bound {worst['bound']:.2e})"
            )
        if self.path is not None:
            terminalreporter.write_line(f"written to {self.path}")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that pytest-xdist's workers report to, or the only one
        config.pluginmanager.register(Collected(config.getoption("--repavit-json")), "repavit_ops_collected")
