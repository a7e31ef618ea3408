"""Coverage-guided fuzzing by atheris:  python tests/fuzz/coverage_guided.py checkpoints|packed -runs=N [folder]

Inputs that reach new code are kept in the folder, where one is named; what fails is written to ``crash-…`` in the
current folder. libFuzzer's own options follow the target: -max_total_time=60, -rss_limit_mb=3000, …
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: F401 -- before what is watched: all of it would take minutes

with atheris.instrument_imports(include=["repavit_ops", "fuzz_targets"]):
    import fuzz_targets


def main() -> None:
    """Fuzz the target that the command line names."""
    name, *options = sys.argv[1:] or [""]
    if name not in fuzz_targets.TARGETS:
        sys.exit(f"target: got {name!r}, wanted one of {', '.join(fuzz_targets.TARGETS)}")
    target, seeds = fuzz_targets.TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"repavit_{name}_"))
    for number, seed in enumerate(seeds()):
        (folder / f"seed{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], "-rss_limit_mb=3000", "-timeout=20", "-max_len=65536", *options, str(folder)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
