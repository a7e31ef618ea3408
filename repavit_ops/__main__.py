"""``python -m repavit_ops …`` is the command ``repavit-ops …``."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="repavit-ops")
