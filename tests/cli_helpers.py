"""Running the command line inside the tests' process."""

from __future__ import annotations

from typer.testing import CliRunner

from repavit_ops.cli import app


def run_command(*arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of ``repavit-ops`` with these arguments; an exception of its own is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr
