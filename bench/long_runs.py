"""Long runs of fused models on a CPU:  python bench/long_runs.py [--forwards 10000] [--cycles 200]

Many forwards of varying shapes, models fused and dropped, many threads, worker processes, thread counts that change and
interrupts in mid-forward. Prints one line of JSON for each run, and fails where one is not as it should be.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

import repavit_ops
from repavit_ops.models import SwinTransformer, VisionTransformer

MIB = 2**20
ALLOWED = 24 * MIB  # by which a process may grow: allocators keep pages, and Python its free lists


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def vit(seed: int = 0, **options: Any) -> nn.Module:
    """A small ViT with θ = 0.75 for images of any multiple of 8 pixels."""
    torch.manual_seed(seed)
    config = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}
    return VisionTransformer(**config | options, idle_ratio=0.75).eval()


def swin(seed: int = 0) -> nn.Module:
    """A small Swin, which pads and rolls."""
    torch.manual_seed(seed)
    return SwinTransformer(
        img_size=56, patch_size=4, embed_dim=24, depths=(2, 2), num_heads=(1, 2), window_size=4, idle_ratio=0.75
    ).eval()


def forwards(count: int) -> dict[str, Any]:
    """Batches, maps and dtypes that change from call to call; memory after the first tenth and at the end."""
    chance = random.Random(0)
    models = [repavit_ops.fuse(swin()), repavit_ops.fuse(swin(), dtype=torch.bfloat16), repavit_ops.fuse(vit())]
    sizes = [(side, other) for side in range(32, 100, 4) for other in range(32, 100, 12)]
    before = 0
    with torch.inference_mode():
        for i in range(count):
            model = chance.choice(models)
            height, width = (64, 64) if isinstance(model, VisionTransformer) else chance.choice(sizes)
            dtype = next(model.parameters()).dtype
            y = model(torch.zeros(chance.randint(1, 4), 3, height, width, dtype=dtype))
            assert y.isfinite().all()
            if i == count // 10:
                gc.collect()
                before = resident()
    gc.collect()
    return {"forwards": count, "grown_mib": (resident() - before) / MIB, "ok": resident() - before < ALLOWED}


def cycles(count: int) -> dict[str, Any]:
    """Fuse, call, drop; memory after ten cycles and at the end."""
    model, before = vit(embed_dim=192), 0
    for i in range(count):
        fused = repavit_ops.fuse(model, keep_unpacked=bool(i % 2))
        with torch.inference_mode():
            fused(torch.zeros(1, 3, 64, 64))
        del fused
        gc.collect()
        if i == 10:
            before = resident()
    return {"cycles": count, "grown_mib": (resident() - before) / MIB, "ok": resident() - before < ALLOWED}


def threads(count: int = 16, each: int = 200) -> dict[str, Any]:
    """Python threads on one model at once, each with inputs of its own."""
    fused = repavit_ops.fuse(vit())
    inputs = [torch.randn(1 + i % 3, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    with torch.inference_mode():
        expected = [fused(x) for x in inputs]

    def work(index: int) -> bool:
        with torch.inference_mode():
            return all(torch.equal(fused(inputs[index]), expected[index]) for _ in range(each))

    with ThreadPoolExecutor(count) as pool:
        equal = list(pool.map(work, range(count)))
    return {"threads": count, "forwards": count * each, "ok": all(equal)}


def _answer(x: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    fused = repavit_ops.fuse(vit())
    with torch.inference_mode():
        queue.put(fused(x).tolist())


def _worker(method: str, after_forward: bool, count: int = 3) -> dict[str, Any]:
    """Processes that fuse and run a model; ``after_forward``: the parent ran one before it started them.

    PyTorch's thread pool does not survive a fork: a forked worker takes one thread, as with eager PyTorch.
    """
    context, x = multiprocessing.get_context(method), torch.ones(2, 3, 64, 64)
    fused = repavit_ops.fuse(vit())
    with torch.inference_mode():
        expected = fused(x) if after_forward else None
    queue = context.Queue()
    workers = [context.Process(target=_answer, args=(x, queue)) for _ in range(count)]
    for worker in workers:
        worker.start()
    try:
        answers = [torch.tensor(queue.get(timeout=120)) for _ in workers]
        same = all(torch.allclose(a, answers[0] if expected is None else expected, atol=1e-5) for a in answers)
    except Exception as error:  # an empty queue: the workers hang
        same = False
        print(f"{method}: {error!r}", file=sys.stderr)
    for worker in workers:
        worker.terminate()
        worker.join()
    return {"workers": method, "after_forward": after_forward, "ok": same}


def changing_threads(seconds: float = 20) -> dict[str, Any]:
    """set_num_threads in one thread while others run two models."""
    models = [repavit_ops.fuse(vit()), repavit_ops.fuse(swin())]
    inputs = [torch.randn(2, 3, 64, 64), torch.randn(1, 3, 60, 52)]
    with torch.inference_mode():
        expected = [model(x) for model, x in zip(models, inputs, strict=True)]
    stop, wrong, done = threading.Event(), [], [0, 0]

    def work(index: int) -> None:
        with torch.inference_mode():
            while not stop.is_set():
                y = models[index](inputs[index])
                done[index] += 1
                if not torch.allclose(y, expected[index], rtol=1e-4, atol=1e-5):
                    wrong.append(index)

    running = [threading.Thread(target=work, args=(i,)) for i in (0, 1, 0)]
    for thread in running:
        thread.start()
    end, count = time.monotonic() + seconds, torch.get_num_threads()
    while time.monotonic() < end:
        torch.set_num_threads(random.randint(1, 4))
        time.sleep(0.002)
    stop.set()
    for thread in running:
        thread.join()
    torch.set_num_threads(count)
    return {"two_models_forwards": done, "set_num_threads_meanwhile": True, "ok": not wrong and min(done) > 0}


def interrupts(count: int = 100) -> dict[str, Any]:
    """KeyboardInterrupt at random moments of a forward; the next one is right."""
    fused, x = repavit_ops.fuse(vit()), torch.randn(8, 3, 64, 64)
    chance, caught, equal = random.Random(0), 0, True
    with torch.inference_mode():
        expected = fused(x)
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            for _ in range(count):
                try:
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 0.02))
                    while True:
                        fused(x)
                except KeyboardInterrupt:
                    caught += 1
                equal = equal and torch.equal(fused(x), expected)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    return {"interrupts": caught, "ok": equal and caught == count}


def main() -> None:
    """Run all; exit code 1 if one is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forwards", type=int, default=10_000)
    parser.add_argument("--cycles", type=int, default=200)
    options = parser.parse_args()
    runs = (
        *(lambda: forwards(options.forwards), lambda: cycles(options.cycles), threads, changing_threads, interrupts),
        *(lambda: _worker("spawn", True), lambda: _worker("fork", True)),
    )
    results = []
    for run in runs:
        results.append(run())
        print(json.dumps(results[-1]), flush=True)
    sys.exit(not all(result["ok"] for result in results))


if __name__ == "__main__":
    main()
