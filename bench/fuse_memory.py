"""Resident memory of ``fuse`` at its peak, over the weights: ``python bench/fuse_memory.py [--models NAME …]``.

A process for each way of calling, measured by the high-water mark of Linux, less what one with the libraries loaded and
another model run holds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

WAYS = {
    "fuse(model)": {},
    "fuse(model, inplace=True)": {"inplace": True},
    "fuse(model, keep_unpacked=False)": {"keep_unpacked": False},
    "fuse(model, inplace=True, keep_unpacked=False)": {"inplace": True, "keep_unpacked": False},
    "fuse(model, inplace=True, keep_unpacked=False, dtype=torch.bfloat16)": {
        "inplace": True,
        "keep_unpacked": False,
        "dtype": "bfloat16",
    },
}

MEASURED = """
import ast, gc, sys, torch, repavit_ops

def mebibytes(kind):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))

name, options = ast.literal_eval(sys.argv[1])
if "dtype" in options:
    options["dtype"] = getattr(torch, options["dtype"])
small = repavit_ops.fuse(repavit_ops.create_model("vanilla_deit_tiny").eval(), dtype=options.get("dtype"))
with torch.no_grad():
    small(torch.zeros(1, 3, 224, 224, dtype=options.get("dtype")))
del small
gc.collect()
repavit_ops.backends.release_freed_memory()
libraries = mebibytes("VmRSS")
model = repavit_ops.create_model(name).eval()
weights = sum(p.nbytes for p in model.parameters()) / 2**20
with open("/proc/self/clear_refs", "w") as marks:
    marks.write("5")
fused = repavit_ops.fuse(model, **options)
print(weights, mebibytes("VmHWM") - libraries, mebibytes("VmRSS") - libraries)
"""


def measured(name: str, options: dict[str, object]) -> tuple[float, float, float]:
    """MiB of the weights, of the peak while ``fuse`` ran, and behind it."""
    command = [sys.executable, "-c", MEASURED, repr((name, options))]
    weights, peak, after = map(
        float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    return weights, peak, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vanilla_vit_large"])
    for name in parser.parse_args().models:
        for way, options in WAYS.items():
            weights, peak, after = measured(name, options)
            print(
                f"{name} {weights:.0f} MiB  {way}: peak {peak / weights:.2f}x, behind it {after / weights:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
