"""Everything that a GPU has to show, in under ten minutes: ``python bench/gpu.py``; call again for the rest.

    check      pytest -m gpu
    ceilings   bf16 product, copy, nodes of a graph
    tune       tiles of the products of the papers' models, into OUT/tuned (move what is good to kernels/tuned)
    ops        FFN, attention and windows beside every peer
    models     whole models, vanilla, merged and fused, beside torch.compile

The checkout is installed first, without network. Each part runs in a process of its own and ends when its share of
the time is up; every result is a JSON line in OUT/gpu_DEVICE_DATE.jsonl, written at once. A second call goes on with
what that file has not yet (``--again`` measures anew). The table beside it is made from the file.

On a machine without a GPU ``--dry-run`` walks the same road with tiny shapes, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
PARTS = ("check", "ceilings", "tune", "ops", "models")
SHARES = {"check": 0.34, "ceilings": 0.05, "tune": 0.3, "ops": 0.4, "models": 1.0}  # of the time that is left
STARTING = 20.0  # seconds that a part may take beyond its share, before it is ended
TEST_PROCESSES = 14
COMPILERS = 12  # processes that compile ahead of the tuner
BATCHES = (128, 1, 8)

Row = dict[str, Any]


def main() -> int:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["REPAVIT_TUNED"] = str(options.out.resolve() / "tuned")
    if options.worker:
        return Worker(options).run()
    end = time.monotonic() + 60 * options.minutes
    if not (options.no_install or options.dry_run):
        install()
    failed = [part for part in PARTS if part in options.parts and not _start(part, options, end)]
    path = results_file(options)
    rows = read(path)
    from gpu_table import markdown

    report = path.with_suffix(".md")
    report.write_text(markdown(rows))
    print(report.read_text(), f"\n{path}\n{report}", sep="")
    if failed:
        print("not finished:", ", ".join(failed), "(call again to go on)")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=CHECKOUT / "bench" / "results", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all parts together")
    parser.add_argument("--again", action="store_true", help="measure what the results have already, too")
    parser.add_argument("--no-install", action="store_true", help="take repavit_ops as it is installed")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: every case, far sooner")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to try this script")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"--parts: got {unknown[0]!r}, wanted some of {','.join(PARTS)}")
    return options


def install() -> None:
    """The checkout into this interpreter, from what is here: no network, no dependencies."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(CHECKOUT)]
    subprocess.run(command, check=True)


def _start(part: str, options: argparse.Namespace, end: float) -> bool:
    """Run a part in its own process, within its share of what is left; whether it finished all it had to do."""
    seconds = max(5.0, SHARES[part] * (end - time.monotonic()))
    print(f"\n== {part}: {seconds:.0f} s", flush=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", part, "--seconds", str(seconds)]
    process = subprocess.Popen(command, cwd=CHECKOUT, start_new_session=True)
    try:
        return process.wait(seconds + STARTING) == 0
    except subprocess.TimeoutExpired:
        print(f"{part}: ended after {seconds + STARTING:.0f} s", flush=True)
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started


def device_name(dry_run: bool) -> str:
    import torch

    return "dry run" if dry_run else torch.cuda.get_device_name()


def results_file(options: argparse.Namespace) -> Path:
    device = re.sub(r"[^A-Za-z0-9]+", "_", device_name(options.dry_run)).lower()
    return options.out / f"gpu_{device}_{datetime.date.today().isoformat()}.jsonl"


def read(path: Path) -> list[Row]:
    """The results so far; of a case that was measured again the last one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(row["part"], row["case"]): row for row in rows}.values())


class Worker:
    """One part, in its own process."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        self.options = options
        self.end = time.monotonic() + options.seconds
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.path = results_file(options)
        self.known = set() if options.again else {(r["part"], r["case"]) for r in read(self.path) if "error" not in r}
        self.left_out = 0

    def run(self) -> int:
        import torch

        if not self.options.dry_run:
            assert_triton_is_selected(self.device)
        parts: dict[str, Callable[[], None]] = {
            "check": self.check,
            "ceilings": self.ceilings,
            "tune": self.tune,
            "ops": lambda: self.measure("ops"),
            "models": lambda: self.measure("models"),
        }
        with torch.no_grad():
            parts[self.options.worker]()
        if self.left_out:
            print(f"{self.options.worker}: no time for {self.left_out} more", flush=True)
        return 1 if self.left_out else 0

    def write(self, part: str, case: str, **values: Any) -> None:
        import torch
        import triton

        versions = {"torch": str(torch.__version__), "triton": triton.__version__}
        row = {
            "device": device_name(self.options.dry_run),
            **versions,
            "date": datetime.date.today().isoformat(),
            "part": part,
            "case": case,
            **values,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def wanted(self, part: str, names: list[str]) -> Iterator[str]:
        """Those not measured yet, while there is time; counts the others."""
        names = [name for name in names if (part, name) not in self.known]
        for i, name in enumerate(names):
            if time.monotonic() > self.end:
                self.left_out += len(names) - i
                return
            yield name

    # --- parts --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """The gpu tests, side by side; those that take most of the memory after them, one by one."""
        parallel = ["-n", str(TEST_PROCESSES)] if importlib.util.find_spec("xdist") else []
        runs = {
            "gpu tests": ["-k", "not billion and not every_tile", *parallel],
            "large indices": ["-k", "billion"],
            "every tile": ["-k", "every_tile", *parallel],
        }
        for name in self.wanted("check", list(runs)):
            report = self.path.with_name(f"{name.replace(' ', '_')}.xml")
            files = [str(path) for path in sorted((CHECKOUT / "tests").glob("test_gpu_*.py"))]
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *runs[name]]
            left = max(10.0, self.end - time.monotonic())
            try:
                subprocess.run([*command, f"--junitxml={report}", *files], cwd=CHECKOUT, timeout=left)
            except subprocess.TimeoutExpired:
                self.left_out += 1
                continue
            self.write("check", name, **count_tests(report))

    def ceilings(self) -> None:
        from gpu_timing import ceilings

        for name in self.wanted("ceilings", ["ceilings"]):
            self.write("ceilings", name, **ceilings(self.device))

    def tune(self) -> None:
        """Tables for the papers' models, until the time is up; what they have is not measured again."""
        from repavit_ops.kernels import tuner, tuning

        for name in self.wanted("tune", [f"{model} batch {b}" for b in BATCHES for model in self.models()]):
            products = products_of(name, self.device, self.options.dry_run)
            folder, processes = tuning.folders()[0], 0 if self.options.dry_run else COMPILERS
            for measured in tuner.tune(products, self.device, folder, processes=processes):
                print(measured, flush=True)
                if time.monotonic() > self.end:
                    self.left_out += 1
                    return
            self.write("tune", name, products=len(products))

    def models(self) -> list[str]:
        from gpu_cases import MODELS

        return list(MODELS)[: 1 if self.options.dry_run else None]

    def measure(self, part: str) -> None:
        """Operators or models: build and check, time, write; a case that fails is written down and the next begins."""
        import gpu_cases
        import torch
        from gpu_timing import interleave

        raise_recompile_limit()
        cases = {case.name: case for case in gpu_cases.cases(part, small=self.options.dry_run)}
        for name in self.wanted(part, list(cases)):
            case, began = cases[name], time.monotonic()
            try:
                calls = case.build(self.device, not (self.options.no_compile or self.options.dry_run))
                times = interleave(calls, self.device)
            except Exception as error:
                traceback.print_exc()
                self.write(part, name, error=f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")
                if isinstance(error, torch.AcceleratorError):
                    raise  # the device is lost to this process
                continue
            seconds = {provider: [t.p20, t.p50, t.p80] for provider, t in times.items()}
            numbers = {"flop": case.flop, "bytes": case.bytes, "images": case.images}
            self.write(part, name, seconds=seconds, **numbers, **case.facts)
            took = time.monotonic() - began
            print(f"{name}: {summary(seconds)} ({took:.0f} s)", flush=True)


def summary(seconds: dict[str, list[float]]) -> str:
    return ", ".join(f"{provider} {1e6 * times[1]:.1f} us" for provider, times in seconds.items())


def count_tests(report: Path) -> Row:
    """Passed, failed and skipped tests of a JUnit file, and the names of the failed ones."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, skipped = (sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "skipped"))
    failed = sum(int(suite.get(key, 0)) for suite in suites for key in ("failures", "errors"))
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"passed": total - skipped - failed, "failed": failed, "skipped": skipped, "failures": names}


def assert_triton_is_selected(device: Any) -> None:
    """This checkout is what is imported, and "auto" takes the Triton kernels on this GPU."""
    import torch

    from repavit_ops import backends, kernels, library, ops

    where = Path(kernels.__file__).resolve().parent
    assert where == CHECKOUT / "kernels", f"repavit_ops.kernels is {where}, not this checkout's: install it"
    assert (reason := backends.why_unavailable("triton")) is None, reason
    assert all(backends.has_triton_kernel(operator.name) for operator in library.OPERATORS)
    tensors = [torch.randn(*shape, device=device).bfloat16() for shape in ((40, 64), (64, 64), (64,), (64, 64))]
    auto, forced = (ops.partial_gelu_ffn(*tensors, None, None, backend=b) for b in ("auto", "triton"))
    assert torch.equal(auto, forced)


def raise_recompile_limit() -> None:
    """Every shape and mode is compiled anew, on purpose."""
    import torch._dynamo.config as dynamo

    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo, name, 10_000)


def products_of(name: str, device: Any, small: bool) -> set[Any]:
    """What a fused model's forward looks up in the tables; ``name``: as "deit_tiny batch 128"."""
    import torch
    from gpu_cases import MODELS

    import repavit_ops
    from repavit_ops.kernels import tuning

    model, _, batch = name.split()
    sizes = {"img_size": 32} if small else {}
    with device:
        trained = repavit_ops.create_model(f"repa_{model}", idle_ratio=MODELS[model], **sizes).eval()
    fused = repavit_ops.fuse(trained, dtype=torch.bfloat16)
    side = sizes.get("img_size", 224)
    with tuning.recording() as products:
        fused(torch.randn(1 if small else int(batch), 3, side, side, device=device).bfloat16())
    return products


if __name__ == "__main__":
    sys.exit(main())
