"""What a GPU has to show, by value, in some minutes: ``python bench/gpu.py --minutes 8 --out FOLDER``.

gpu_plan.py says what is measured and in which order. Every result is a JSON line in FOLDER/gpu_DEVICE_DATE.jsonl,
written as it comes; the table beside it is made from that file, tuned tiles go to FOLDER/tuned.
A call whose file is there goes on with what that has not yet (``--again`` measures anew). After the first call

    python bench/gpu.py --again-short 4 --out FOLDER       # minutes

measures only what failed or missed its goal, with the tiles that the first call tuned. ``--earlier OTHER`` copies the
results and tiles of an earlier call into FOLDER first, where that was emptied in between.

It needs nothing else. The checkout is installed first, without network and without its C++ kernels, which are built
behind all else. Stages run in processes of their own, which are begun again behind a case that crashed or hung.
On a machine without a GPU ``--dry-run`` walks the same road with tiny shapes, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_plan import AGAIN_SHORT, MINUTES, PLAN, STAGES, Stage, seconds_of

CHECKOUT = Path(__file__).resolve().parents[1]
STARTING = 20.0  # seconds that a process may take beyond its stages, before it is ended
RESTARTS = 4  # of one process, behind cases that end it
DONE, LEFT_OUT, CRASHED, LOST = 0, 1, 3, 4  # exit codes of a worker; LOST: its device, by a case that has its line
MOST_LINES = 8_000_000  # bytes that the results may take: what comes back is limited

Row = dict[str, Any]


def main() -> int:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as state:
        run = Run(options, Path(state))
        failed = run.everything()
    rows = read(run.results)
    from gpu_table import markdown

    report = run.results.with_suffix(".md")
    report.write_text(markdown(rows))
    print(report.read_text(), f"\n{run.results}\n{report}", sep="")
    if failed:
        print("not finished:", ", ".join(failed), "(call again to go on)")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all stages together")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "bench" / "results", help="folder of the results")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=None, help=",".join(STAGES))
    parser.add_argument("--again", action="store_true", help="measure what the results have already, too")
    parser.add_argument("--again-short", type=float, metavar="MINUTES", help="only what failed or missed its goal")
    parser.add_argument("--earlier", type=Path, help="folder of an earlier call's results and tiles, copied first")
    parser.add_argument("--no-install", action="store_true", help="take repavit_ops as it is installed")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: every case, far sooner")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to try this script")
    options = parser.parse_args()
    if options.again_short:
        options.minutes = options.again_short
    if unknown := sorted(set(options.stages or ()) - set(STAGES)):
        parser.error(f"--stages: got {unknown[0]!r}, wanted some of {','.join(STAGES)}")
    return options


def read(path: Path) -> list[Row]:
    """The results so far; of a case that was measured again the last one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(row["part"], row["case"]): row for row in rows}.values())


def copy_results(source: Path, target: Path) -> None:
    """Lines and tuned tables of an earlier call."""
    for pattern in ("gpu_*.jsonl", "tuned/*.json"):
        for path in source.glob(pattern):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def write(path: Path, row: Row) -> None:
    """Add one line."""
    with path.open("a") as file:
        if file.tell() < MOST_LINES:
            file.write(json.dumps(row) + "\n")


def device_name() -> str:
    """Of the first GPU, without a context on it."""
    ask_driver = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    ask_torch = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name(0))"]
    for command in (ask_driver, ask_torch):
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    raise SystemExit("no GPU: neither nvidia-smi nor torch names one (--dry-run walks the plan without)")


class Run:
    """One call: what it starts, watches and ends."""

    def __init__(self, options: argparse.Namespace, state: Path) -> None:
        self.options, self.state = options, state
        self.began = time.time()
        self.end = self.began + 60 * options.minutes
        self.device = "dry run" if options.dry_run else device_name()
        name = re.sub(r"[^A-Za-z0-9]+", "_", self.device).lower()
        if options.earlier:
            copy_results(options.earlier, options.out)
        earlier = sorted(options.out.glob(f"gpu_{name}_*.jsonl")) if options.again_short else []
        today = options.out / f"gpu_{name}_{datetime.date.today().isoformat()}.jsonl"
        self.results = earlier[-1] if earlier else today
        os.environ["REPAVIT_TUNED"] = str(options.out.resolve() / "tuned")
        os.environ["PYTHONUNBUFFERED"] = "1"
        for cache in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            os.environ.setdefault(cache, str(state / cache.lower()))
        self.background: dict[str, subprocess.Popen[bytes]] = {}

    def everything(self) -> list[str]:
        """Every stage within its time; the names of those that did not finish."""
        if not (self.options.no_install or self.options.dry_run):
            self._install()
        groups = AGAIN_SHORT if self.options.again_short else PLAN
        wanted = self.options.stages or STAGES
        failed = []
        try:
            if groups is PLAN and {"first", "headline"} & set(wanted):
                ahead = [sys.executable, "bench/gpu_ahead.py", "--log", str(self.state / "ahead")]
                self._begin("ahead", [*ahead, *self._jobs()])
            for group in groups:
                stages = [stage for stage in group if stage.name in wanted]
                if stages and not self._group(stages):
                    failed += [stage.name for stage in stages]
        finally:
            for process in self.background.values():
                _end(process)
        if (log := self.state / "ahead").exists():
            self._write("ahead", "ahead", jobs=[json.loads(line) for line in log.read_text().splitlines()])
        self._write("run", "again short" if groups is AGAIN_SHORT else "run", took=round(time.time() - self.began))
        return failed

    def _jobs(self) -> list[str]:
        """Which jobs are compiled ahead."""
        small = ["--small", "--device", "cpu", "--processes", "2"] if self.options.dry_run else []
        return [*small, *(["--kind", "kernels"] if self.options.no_compile else [])]

    def _install(self) -> None:
        """The checkout into this interpreter, from what is here: no network, no dependencies; C++ in the background."""
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(CHECKOUT)]
        subprocess.run(pip, check=True, env=os.environ | {"REPAVIT_BUILD_CPU": "0"})
        build = ["nice", "-n", "19", sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        self._begin("C++ kernels", build)

    def _begin(self, name: str, command: list[str]) -> None:
        log = (self.state / f"{name.replace(' ', '_')}.log").open("wb")
        self.background[name] = subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=log, start_new_session=True)

    def _group(self, stages: list[Stage]) -> bool:
        """Some stages in one process, begun again behind a case that ended it; whether all that they had was done."""
        if any(stage.name == "cpu" for stage in stages) and (build := self.background.get("C++ kernels")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                build.wait(max(1.0, min(60.0, self.end - time.time())))
        group_end = min(self.end, time.time() + sum(seconds_of(stage, self.options.minutes) for stage in stages))
        since = time.time()
        for _ in range(1 + RESTARTS):
            if time.time() > self.end - 5:
                print(f"no time for {', '.join(stage.name for stage in stages)}", flush=True)
                return False
            code = self._worker(stages, group_end, since)
            if code in (DONE, LEFT_OUT, CRASHED):
                return code == DONE
        return False

    def _worker(self, stages: list[Stage], end: float, since: float) -> int:
        """One process of stages; where a case ends it, that is written down as its result."""
        names = ",".join(stage.name for stage in stages)
        print(f"\n== {names}: {end - time.time():.0f} s", flush=True)
        now = self.state / "now"
        now.unlink(missing_ok=True)
        switches = ("dry_run", "no_compile", "again")
        flags = ["--" + name.replace("_", "-") for name in switches if getattr(self.options, name)]
        command = [sys.executable, "bench/gpu_worker.py", "--stages", names, "--end", str(end), "--since", str(since)]
        command += ["--results", str(self.results), "--device-name", self.device, "--state", str(self.state)]
        command += ["--minutes", str(self.options.minutes), *flags]
        process = subprocess.Popen(command, cwd=CHECKOUT, start_new_session=True)
        try:
            while process.poll() is None and time.time() < end + STARTING and not _stuck(now):
                time.sleep(0.2)
            code = process.poll()
        finally:
            _end(process)
        if code in (DONE, LEFT_OUT):
            return code
        if now.exists() and (case := json.loads(now.read_text())):
            error = f"its process ended with {code}" if code is not None else "hung, or was cut off"
            self._write(case["part"], case["case"], error=error)
            print(f"{case['case']}: {error}", flush=True)
        elif code not in (None, LOST):  # no case is to blame, so that it would end like this again
            return CRASHED
        return LEFT_OUT if code is None and time.time() >= end + STARTING else LOST

    def _write(self, part: str, case: str, **values: Any) -> None:
        write(self.results, {"device": self.device, "time": time.time(), "part": part, "case": case, **values})


def _stuck(now: Path) -> bool:
    """Whether the case at work has had its time."""
    try:
        return time.time() > json.loads(now.read_text()).get("until", float("inf"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def known(rows: Iterable[Row], since: float, again: bool) -> set[tuple[str, str]]:
    """What need not be measured: what was tried since then and, unless ``again``, what was measured before."""
    return {(r["part"], r["case"]) for r in rows if r["time"] >= since or not (again or "error" in r)}


if __name__ == "__main__":
    sys.exit(main())
