"""A pytest plugin: one JSON line per test as it ends, to $REPAVIT_TEST_LOG, so that a cut run still counts.

python -m pytest -p gpu_test_log        # with bench/ on PYTHONPATH
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

REASON = 400  # characters kept of a failure


def pytest_runtest_logreport(report: Any) -> None:
    """Called where all reports arrive: with xdist that is the process which started the others."""
    path = os.environ.get("REPAVIT_TEST_LOG")
    if not path or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    if report.when != "call" and report.passed:
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        row["why"] = str(report.longrepr).strip()[-REASON:]
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def count(path: Path) -> dict[str, Any]:
    """Numbers of tests by outcome, those that failed with their reason, the slowest; all that ended so far."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    last = {row["test"]: row for row in rows}  # a test that failed and whose tear-down failed too is one
    outcomes = Counter(row["outcome"] for row in last.values())
    failures = [{"test": row["test"], "why": row["why"]} for row in last.values() if row["outcome"] == "failed"]
    slowest = sorted(last.values(), key=lambda row: -row["seconds"])[:5]
    return {
        **{outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": failures,
        "slowest": {row["test"]: row["seconds"] for row in slowest},
    }
