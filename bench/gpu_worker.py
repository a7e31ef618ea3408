"""One process of bench/gpu.py: some stages of gpu_plan.py in turn, each within its time."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_plan
import gpu_test_log
from gpu import CHECKOUT, CRASHED, DONE, LEFT_OUT, LOST, known, read, write

if TYPE_CHECKING:
    from gpu_cases import Case

TEST_PROCESSES = 14
COMPILERS = 12  # processes that compile ahead of the tuner
CASE = 120.0  # seconds that one case may take, before its process is ended
AHEAD = 75.0  # of them it waits for what is compiled ahead
SLOW = 45.0  # seconds that must be left to begin max-autotune
FIRST_TESTS = {"gpu tests": ("-k", "not billion and not every_tile")}
SLOW_TESTS = {"large indices": ("-k", "billion"), "every tile": ("-k", "every_tile")}


class Worker:
    """Stages in this process, and where their results go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = options.end  # of the stage at work, seconds since the epoch
        self.known = known(read(options.results), options.since, options.again)
        self.left_out = 0

    def run(self) -> int:
        stages = {stage.name: stage for group in (*gpu_plan.PLAN, *gpu_plan.AGAIN_SHORT) for stage in group}
        for name in self.options.stages.split(","):
            share = gpu_plan.seconds_of(stages[name], self.options.minutes)
            self.end = min(self.options.end, time.time() + share)
            getattr(self, name)()
        if self.left_out:
            print(f"{self.options.stages}: no time for {self.left_out} more", flush=True)
        return LEFT_OUT if self.left_out else DONE

    # --- results ------------------------------------------------------------------------------------------------------

    def write(self, part: str, case: str, **values: Any) -> None:
        from importlib.metadata import version

        row = {"device": self.options.device_name, "torch": version("torch"), "triton": version("triton")}
        row |= {"date": datetime.date.today().isoformat(), "time": time.time(), "part": part, "case": case}
        write(self.options.results, {**row, **values})
        self.known.add((part, case))

    def wanted(self, part: str, names: list[str], seconds: float = CASE) -> Iterator[str]:
        """Those not measured yet, while there is time; counts the others. Says which is at work, and until when."""
        names = [name for name in names if (part, name) not in self.known]
        for i, name in enumerate(names):
            if time.time() > self.end:
                self.left_out += len(names) - i
                break
            self._now(part, name, seconds)
            yield name
        (self.options.state / "now").unlink(missing_ok=True)

    def _now(self, part: str, case: str, seconds: float) -> None:
        path = self.options.state / "now"
        path.with_suffix(".tmp").write_text(json.dumps({"part": part, "case": case, "until": time.time() + seconds}))
        path.with_suffix(".tmp").replace(path)

    # --- stages -------------------------------------------------------------------------------------------------------

    def first(self) -> None:
        if not self.options.dry_run:
            assert_triton_is_selected()
        cases = {case.name: case for case in gpu_plan.cases("first", self.options.dry_run)}
        for name in self.wanted("first", list(cases)):
            began = time.time()
            try:
                with no_grad():
                    calls = cases[name].build(self.torch_device(), False)
                result: dict[str, Any] = {"right": True, "providers": list(calls)}
            except AssertionError as error:
                result = {"right": False, "why": str(error)[:300]}
            except Exception as error:
                self.write_error("first", name, error)
                continue
            self.write("first", name, **result, took=round(time.time() - began, 1))
            print(f"{name}: {'right' if result['right'] else result['why']}", flush=True)

    def ceilings(self) -> None:
        from gpu_timing import ceilings

        for name in self.wanted("ceilings", ["ceilings"]):
            with no_grad():
                self.write("ceilings", name, **ceilings(self.torch_device()))

    def headline(self) -> None:
        """Host time is taken once nothing compiles beside it, yet early; max-autotune begins only if there is time."""
        cases = gpu_plan.cases("headline", self.options.dry_run)
        late = [case for case in cases if case.name.endswith("vanilla compiled")]
        slow = [case for case in cases if case.name.endswith("max_autotune")]
        self.measure([case for case in cases if case not in [*late, *slow]])
        self.host()
        self.measure(late)
        if self.end - time.time() > SLOW:
            self.measure(slow)
        else:
            self.left_out += len(slow)

    def host(self) -> None:
        from gpu_host import host_times

        for name in self.wanted("host", ["host"]):
            with no_grad():
                times, launches = host_times(self.torch_device(), self.options.dry_run)
            seconds = {provider: [t.p20, t.p50, t.p80] for provider, t in times.items()}
            self.write("host", name, seconds=seconds, launches=launches)
            print(f"host: {summary(seconds)}", flush=True)

    def tests(self) -> None:
        self.run_tests(FIRST_TESTS)

    def ops(self) -> None:
        self.measure(gpu_plan.cases("ops", self.options.dry_run))

    def tune(self) -> None:
        """Tiles for the products of what missed its goal, then that again; goes on with an earlier call's tables."""
        from gpu_table import missed

        cases = gpu_plan.every_case()
        short = [cases[name] for name in missed(read(self.options.results)) if name in cases]
        if self.options.dry_run:
            short = gpu_plan.cases("ops", small=True)
        half = time.time() + 0.6 * (self.end - time.time())
        tuned = [case for case in short if self.tune_case(case, half)]
        self.measure(tuned, anew=True, suffix=" tuned")

    def tune_case(self, case: Case, end: float) -> bool:
        """Tune what one case launches, until the time is up; whether there was time for anything."""
        from gpu_ledger import products_of

        from repavit_ops.kernels import tuner, tuning
        from repavit_ops.kernels.chips import KNOWN, chip_of

        if time.time() > end:
            self.left_out += 1
            return False
        chip = KNOWN["sm_90"] if self.options.dry_run else chip_of(self.torch_device())
        products = products_of(case.meta, chip)
        if self.options.dry_run:
            self.write("tune", case.name, products=len(products))
            return True
        self._now("tune", case.name, end - time.time() + CASE)
        for measured in tuner.tune(products, self.torch_device(), tuning.folders()[0], processes=COMPILERS):
            print(measured, flush=True)
            if time.time() > end:
                self.left_out += 1
                return True
        self.write("tune", case.name, products=len(products))
        return True

    def cpu(self) -> None:
        import gpu_cpu

        for name in self.wanted("cpu", ["lscpu"]):
            self.write("cpu", name, **gpu_cpu.lscpu())
        for name in self.wanted("cpu", ["amx tests"]):
            if (result := gpu_cpu.amx_tests(self.end)) is not None:
                self.write("cpu", name, **result)
        with no_grad():
            for name, values in gpu_cpu.measure(self.options.dry_run, self.end):
                self.write("cpu", name, **values)
                print(f"{name}: {summary(values['seconds'])}", flush=True)

    def rest(self) -> None:
        self.measure(gpu_plan.cases("rest", self.options.dry_run))
        self.run_tests(SLOW_TESTS)

    def failed(self) -> None:
        """What failed in an earlier call: tests by name, then cases."""
        rows = read(self.options.results)
        names = [f["test"] for row in rows if row["part"] == "check" for f in row.get("failures", ())]
        if names:
            self.run_tests({"failed tests": tuple(names)})
        cases = gpu_plan.every_case()
        wrong = [row["case"] for row in rows if "error" in row or row.get("right") is False]
        self.measure([cases[name] for name in wrong if name in cases], anew=True)

    # --- how ----------------------------------------------------------------------------------------------------------

    def torch_device(self) -> Any:
        import torch

        return torch.device("cpu" if self.options.dry_run else "cuda")

    def measure(self, cases: Iterable[Case], anew: bool = False, suffix: str = "") -> None:
        """Build and check, time, write; a case that fails is written down and the next begins."""
        from gpu_timing import interleave

        raise_recompile_limit()
        by_name = {(case.part, case.name): case for case in cases}
        if anew:
            self.known -= set(by_name)
        for part in dict.fromkeys(part for part, _ in by_name):
            for name in self.wanted(part, [name for own, name in by_name if own == part]):
                case, began = by_name[part, name], time.time()
                self.wait_for_ahead(name)
                try:
                    with no_grad():
                        calls = case.build(self.torch_device(), not self.options.no_compile)
                        times = interleave(calls, self.torch_device())
                except Exception as error:
                    self.write_error(part, name, error)
                    continue
                seconds = {provider: [t.p20, t.p50, t.p80] for provider, t in times.items()}
                numbers = {"flop": case.flop, "bytes": case.bytes, "images": case.images}
                took = round(time.time() - began, 1)
                self.write(part, name, seconds=seconds, **numbers, **case.facts, took=took)
                print(f"{name}{suffix}: {summary(seconds)} ({took:.0f} s)", flush=True)

    def write_error(self, part: str, name: str, error: Exception) -> None:
        """Write a failure down; a device that is lost to this process ends it."""
        import torch

        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        self.write(part, name, error=f"{type(error).__name__}: {lines[0][:300]}")
        if isinstance(error, torch.AcceleratorError):
            (self.options.state / "now").unlink(missing_ok=True)  # it has its line
            raise error

    def ahead(self) -> list[dict[str, Any]]:
        """Jobs of gpu_ahead.py that have ended."""
        path = self.options.state / "ahead"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_ahead(self, name: str) -> None:
        """Until the compilation that this case needs has ended elsewhere; not where nothing is compiled ahead."""
        words = name.split()
        if words[-1] != "compiled" or self.options.no_compile or not (self.options.state / "ahead.log").exists():
            return
        job = {"kind": "compile", "name": words[0], "batch": int(words[2]), "form": words[3]}
        end = min(self.end, time.time() + AHEAD)
        while time.time() < end and not any(job.items() <= done.items() for done in self.ahead()):
            time.sleep(0.2)

    def run_tests(self, runs: dict[str, tuple[str, ...]]) -> None:
        """pytest on the GPU, side by side, for as long as there is time; what ended until then counts."""
        parallel = (
            ["-n", str(2 if self.options.dry_run else TEST_PROCESSES)] if importlib.util.find_spec("xdist") else []
        )
        for name in self.wanted("check", list(runs), 600.0):
            log = self.options.state / f"{name.replace(' ', '_')}.jsonl"
            chosen = list(runs[name])
            by_name = "::" in chosen[0]
            files = [] if by_name else [str(path) for path in sorted((CHECKOUT / "tests").glob("test_gpu_*.py"))]
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-p", "gpu_test_log"]
            command += ["--tb=short", *([] if "billion" in chosen else parallel), *chosen, *files]
            paths = os.pathsep.join([str(CHECKOUT / "bench"), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
            environment = os.environ | {"REPAVIT_TEST_LOG": str(log), "PYTHONPATH": paths}
            cut = False
            try:
                left = max(10.0, self.end - time.time())
                subprocess.run(command, cwd=CHECKOUT, env=environment, timeout=left)
            except subprocess.TimeoutExpired:
                cut, self.left_out = True, self.left_out + 1
            self.write("check", name, **gpu_test_log.count(log), cut=cut)


def no_grad() -> Any:
    import torch

    return torch.no_grad()


def summary(seconds: dict[str, list[float]]) -> str:
    return ", ".join(f"{provider} {1e6 * times[1]:.1f} us" for provider, times in seconds.items())


def assert_triton_is_selected() -> None:
    """This checkout is what is imported, and "auto" takes the Triton kernels on this GPU."""
    import torch

    from repavit_ops import backends, kernels, library, ops

    where = Path(kernels.__file__).resolve().parent
    assert where == CHECKOUT / "kernels", f"repavit_ops.kernels is {where}, not this checkout's: install it"
    assert (reason := backends.why_unavailable("triton")) is None, reason
    assert all(backends.has_triton_kernel(operator.name) for operator in library.OPERATORS)
    shapes = ((40, 64), (64, 64), (64,), (64, 64))
    tensors = [torch.randn(*shape, device="cuda").bfloat16() for shape in shapes]
    auto, forced = (ops.partial_gelu_ffn(*tensors, None, None, backend=b) for b in ("auto", "triton"))
    assert torch.equal(auto, forced)


def raise_recompile_limit() -> None:
    """Every shape and mode is compiled anew, on purpose."""
    import torch._dynamo.config as dynamo

    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo, name, 10_000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", required=True)
    parser.add_argument("--end", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--since", type=float, required=True, help="errors before this are tried again")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder that the starter watches")
    parser.add_argument("--device-name", required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of the whole plan")
    for flag in ("--dry-run", "--no-compile", "--again"):
        parser.add_argument(flag, action="store_true")
    worker = Worker(parser.parse_args())
    run: Callable[[], int] = worker.run
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        return LOST if type(error).__name__ == "AcceleratorError" else CRASHED


if __name__ == "__main__":
    sys.exit(main())
