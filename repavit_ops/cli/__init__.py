"""The command ``repavit-ops``: info, convert, verify, tune, idle, demo; one file each.

Nothing heavy is imported above the commands, so that ``--help`` and completion stay quick. A mistake of the user's is
one line on stderr and exit status 2; a failed check is exit status 1.
"""

import typer

from .convert import convert
from .demo import demo
from .idle import idle
from .info import info
from .tune import tune
from .verify import verify

app = typer.Typer(
    name="repavit-ops",
    help="Train, merge, fuse and verify reparameterized Vision Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (info, convert, verify, tune, idle, demo):
    app.command()(command)
