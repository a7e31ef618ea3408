"""Two checkouts of this library in turns: ``python bench/two_builds.py OTHER [--models deit_tiny …] [--batches 1 8]``.

What a change costs or gains a whole model, in one run: a process for each checkout, with the packages of the Python at
hand, of which one at a time is asked to time its model. OTHER is another checkout whose kernels are built in place
(``python setup.py build_ext --inplace``). Where a process has its memory is worth half a percent, so both are started
anew several times: printed is the mean over the starts of this one's time over the other's, and its standard error.
``--models windows:56x96 core:197x384 ffn:50x768x3072`` times operators alone: attention in shifted windows of 7 x 7 on
a map of 56 x 56 with 96 channels, or of 197 tokens with 384; the FFN of 50 tokens of 768 channels with 3072 hidden;
``attention:50x768`` the whole attention block of 50 tokens of 768 channels in heads of 64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent

WORKER = """
import json, sys, time, torch
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.path.insert(0, sys.argv[2])
import repavit_ops, repavit_ops.library
name, form, batch, dtype, threads, seconds = json.loads(sys.argv[1])
torch.set_num_threads(threads)
torch.manual_seed(0)
if name.startswith("ffn:"):
    tokens, channels, hidden = map(int, name.split(":")[1].split("x"))
    with torch.no_grad():
        ffn = repavit_ops.nn.PartialGELUFFN(channels, hidden, merged=False, norm_eps=1e-6, residual=True)
        fused = ffn.to(getattr(torch, dtype)).eval().requires_grad_(False)
    x = torch.randn(batch, tokens, channels).to(getattr(torch, dtype))
elif name.startswith("attention:"):
    tokens, channels = map(int, name.split(":")[1].split("x"))
    with torch.no_grad():
        block = repavit_ops.nn.RepAttention(channels, channels // 64, norm_eps=1e-6, residual=True)
        fused = block.to(getattr(torch, dtype)).eval().requires_grad_(False)
    x = torch.randn(batch, tokens, channels).to(getattr(torch, dtype))
elif ":" in name:
    kind, size = name.split(":")
    tokens, channels = map(int, size.split("x"))
    width = 32 if kind == "windows" else 64
    heads, shape = channels // width, (tokens, tokens) if kind == "windows" else (tokens,)
    x = torch.randn(batch, *shape, 3 * channels).to(getattr(torch, dtype))
    bias = torch.randn(heads, 49, 49).to(x.dtype) if kind == "windows" else None
    arguments = {"num_heads": heads, "d_qk": width, "scale": width**-0.5}
    if kind == "windows":
        place = {"window": [7, 7], "shift": [3, 3]}
        fused = lambda x: torch.ops.repavit_ops.window_attention_core(x, bias, None, **arguments, **place)
    else:
        fused = lambda x: torch.ops.repavit_ops.attention_core(x, None, **arguments)
else:
    model = repavit_ops.create_model(("vanilla_" if form == "vanilla" else "repa_") + name).eval()
    fused = repavit_ops.fuse(model, dtype=getattr(torch, dtype))
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
with torch.inference_mode():
    y = fused(x)
    print(json.dumps([repavit_ops.__file__, y.float().flatten()[:64].tolist()]), flush=True)
    for _ in sys.stdin:
        end, times = time.perf_counter() + seconds, []
        fused(x)
        while time.perf_counter() < end or len(times) < 3:
            start = time.perf_counter()
            fused(x)
            times.append(time.perf_counter() - start)
        times.sort()
        print(json.dumps(times[len(times) // 5]), flush=True)
"""


def start(checkout: Path, case: list[Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, json.dumps(case), str(checkout)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a process ended; what it wrote stands above")
    return json.loads(line)


def timed(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    seconds: float = answer(process)
    return seconds


def ratios(other: Path, case: list[Any], rounds: int) -> tuple[list[float], float]:
    """This checkout's time over the other's in each round, and this one's time."""
    processes = [start(checkout, case) for checkout in (HERE, other)]
    try:
        (mine, y), (theirs, z) = map(answer, processes)
        if not (mine.startswith(str(HERE)) and theirs.startswith(str(other))):
            raise SystemExit(f"loaded {mine} and {theirs}, wanted the packages of {HERE} and {other}")
        size = max(map(abs, z))
        if max(abs(a - b) for a, b in zip(y, z, strict=True)) > 2e-2 * size:
            raise SystemExit("the two checkouts do not agree on the result")
        found, times = [], []
        for turn in range(rounds):
            seconds = [timed(process) for process in (processes if turn % 2 else processes[::-1])]
            ours, others = seconds if turn % 2 else seconds[::-1]
            found.append(ours / others)
            times.append(ours)
        return found, statistics.median(times)
    finally:
        for process in processes:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout, its kernels built")
    parser.add_argument("--models", nargs="+", default=["deit_tiny"])
    parser.add_argument("--forms", nargs="+", default=["merged"], choices=["merged", "vanilla"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--starts", type=int, default=12, help="of both processes")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each, for every start")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn")
    given = parser.parse_args()
    for name in given.models:
        for form in given.forms:
            for batch in given.batches:
                for dtype in given.dtypes:
                    case = [name, form, batch, dtype, given.threads, given.seconds]
                    starts = [ratios(given.other.resolve(), case, given.rounds) for _ in range(given.starts)]
                    each = [statistics.median(found) for found, _ in starts]
                    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
                    seconds = statistics.median(time for _, time in starts)
                    ratio = f"{statistics.mean(each):.4f} ± {error:.4f} of the other's time"
                    print(f"{name} {form} batch {batch} {dtype}: {ratio}, {seconds * 1e3:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
