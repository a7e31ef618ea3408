"""The command ``repavit-ops``: info, models, convert, export, verify, profile, bench, tune, idle, predict, demo.

One file each.

Nothing heavy is imported above the commands, so that ``--help`` and completion stay quick. A mistake of the user's is
one line on stderr and exit status 2; a failed check is exit status 1.
"""

from typing import Annotated

import typer

from ..version import __version__
from .bench import bench
from .convert import convert
from .demo import demo
from .export import export
from .idle import idle
from .info import info
from .models import models
from .predict import predict
from .profile import profile
from .tune import tune
from .verify import verify

app = typer.Typer(
    name="repavit-ops",
    help="Train, merge, fuse and verify reparameterized Vision Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (info, models, convert, export, verify, profile, tune, idle, predict, demo):
    app.command()(command)
app.add_typer(bench)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"repavit-ops {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train, merge, fuse and verify reparameterized Vision Transformers."""
