"""Start and memory of workers on one packed file:  python bench/packed_files.py [--models NAME …] [--workers 8]

(a) A process that has imported torch and the library: ``load_packed`` alone and to the first logits of one image, over
reading the plain safetensors file into the unfused model, alone and to its first logits. Files are read once before, so
that both come out of the page cache; the ways take turns, and medians are told.
(b) Workers on one file, after a first answer: the sum of their proportional shares of memory (PSS of
/proc/PID/smaps_rollup) over one worker's. Started afresh (spawn), each holds its own interpreter and PyTorch; forked
from a process that has imported them (what gunicorn --preload does) it shares those too. With ``--own`` also workers
that fuse for themselves: eight of a ViT-L take some 20 GB. Needs Linux, and a quiet machine for (a).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STARTS = {
    "load_packed": "model = repavit_ops.load_packed(packed)",
    "load_packed to first logits": "model = repavit_ops.load_packed(packed); model(image)",
    "plain file read": "model = repavit_ops.load_checkpoint(plain)",
    "plain file to first logits": "model = repavit_ops.load_checkpoint(plain); model(image)",
    "plain file fused to first logits": (
        "model = repavit_ops.fuse(repavit_ops.load_checkpoint(plain), inplace=True, keep_unpacked=False); model(image)"
    ),
}
START = """
import sys, time, torch, repavit_ops
plain, packed, threads, way = sys.argv[1:]
torch.set_num_threads(int(threads))
image = torch.zeros(1, 3, 224, 224)
repavit_ops.load_packed  # imported by name at its first use; the others are there already
with torch.inference_mode():
    torch.zeros(64, 64) @ torch.zeros(64, 64)
    begin = time.perf_counter()
    exec(way)
    print(time.perf_counter() - begin)
"""


def seconds_of(way: str, plain: Path, packed: Path, threads: int) -> float:
    """One start in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", START, str(plain), str(packed), str(threads), way]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def pss_of(pid: int) -> float:
    """MiB of a process: its own pages, and its share of those that others have too."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no Pss")


def serve(file: str, packed: bool, ready: Any, done: Any) -> None:
    """One worker: a model, an answer, and then to be looked at."""
    import torch

    import repavit_ops

    torch.set_num_threads(1)
    if packed:
        model = repavit_ops.load_packed(file)
    else:
        model = repavit_ops.fuse(repavit_ops.load_checkpoint(file), inplace=True, keep_unpacked=False)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    repavit_ops.backends.release_freed_memory()
    ready.release()
    done.wait()


def pss_of_workers(count: int, file: Path, packed: bool, method: str) -> float:
    """MiB of all workers together."""
    if method == "fork":
        import repavit_ops

        _ = repavit_ops.load_packed  # what a preloading server has imported
    context = multiprocessing.get_context(method)
    ready, done = context.Semaphore(0), context.Event()
    workers = [context.Process(target=serve, args=(str(file), packed, ready, done), daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    try:
        for _ in workers:
            if not ready.acquire(timeout=600):
                raise RuntimeError("a worker did not answer within ten minutes")
        return sum(pss_of(worker.pid or 0) for worker in workers)
    finally:
        done.set()
        for worker in workers:
            worker.join()


def files_of(name: str, folder: Path) -> tuple[Path, Path]:
    """The plain and the packed file of a model of random weights."""
    import torch

    import repavit_ops

    torch.manual_seed(0)
    model = repavit_ops.create_model(name).eval()
    plain, packed = folder / f"{name}.safetensors", folder / f"{name}.packed.safetensors"
    repavit_ops.save_checkpoint(model, plain)
    repavit_ops.save_packed(repavit_ops.fuse(model, inplace=True, keep_unpacked=False), packed, source=plain)
    for file in (plain, packed):
        file.read_bytes()
    return plain, packed


def starts(name: str, plain: Path, packed: Path, threads: int, rounds: int) -> None:
    """Part (a) for one model."""
    times: dict[str, list[float]] = {way: [] for way in STARTS}
    for _ in range(rounds):
        for label, way in STARTS.items():
            times[label].append(seconds_of(way, plain, packed, threads))
    medians = [statistics.median(each) for each in times.values()]
    load, first, read, *rest = medians
    ratios = [load / read, first / read, *(first / other for other in rest)]
    print(
        f"| {name} | "
        + " | ".join(f"{t:.3f}" for t in medians)
        + " | "
        + " | ".join(f"{r:.2f}x" for r in ratios)
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vanilla_deit_base", "vanilla_vit_large"])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--own", action="store_true", help="also workers that each fuse for themselves")
    parser.add_argument("--threads", type=int, default=2, help="of a start; workers have one each")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: files_made_apart(name, Path(folder)) for name in arguments.models}
        ratios = ("load / read", "first / read", "first / first", "first / fused first")
        print("| model, seconds | " + " | ".join((*STARTS, *ratios)) + " |")
        print("|---|" + "---|" * (len(STARTS) + len(ratios)))
        for name, (plain, packed) in files.items():
            starts(name, plain, packed, arguments.threads, arguments.rounds)
        name, (plain, packed) = list(files.items())[-1]
        print(f"\n| {name}, PSS in MiB | 1 worker | {arguments.workers} workers | ratio |\n|---|---|---|---|")
        rows = [
            ("packed file, forked from one that imported", packed, True, "fork"),
            ("packed file, started afresh", packed, True, "spawn"),
        ]
        for label, file, mapped, method in (
            *rows,
            *([("each fuses for itself", plain, False, "spawn")] * arguments.own),
        ):
            one, many = (pss_of_workers(count, file, mapped, method) for count in (1, arguments.workers))
            print(f"| {label} | {one:.0f} | {many:.0f} | {many / one:.2f}x |")


def files_made_apart(name: str, folder: Path) -> tuple[Path, Path]:
    """:func:`files_of` in a process of its own: this one stays small, and runs no threads, until workers are forked."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(files_of, (name, folder))


if __name__ == "__main__":
    main()
