"""Run a script that knows timm's models, such as timm's ``train.py``, with the models of repavit_ops among them::

torchrun --nproc-per-node 8 examples/imagenet/launch.py path/to/train.py --config … --data-dir …
"""

import runpy
import sys

import repavit_ops.models  # noqa: F401  registers the models with timm

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: launch.py SCRIPT [ARGUMENTS]")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
