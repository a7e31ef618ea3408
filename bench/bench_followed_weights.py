"""What it costs that outputs follow the weights: ``pytest bench/bench_followed_weights.py --threads 2``.

- Every call compares fingerprints of the weights with those of the packed copies. A model fused with
  ``keep_unpacked=False`` has nothing to compare and is the same otherwise: the ratio is the time with over without.
- The first call behind a write packs: its time, less that of a call, over the time of packing all modules.

What the change of a commit costs as a whole, two builds in turns, says ``bench/two_builds.py``.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import repavit_ops
from repavit_ops.benchmarking.harness import interleave
from repavit_ops.nn.packed_weights import PackedWeights

MODELS = ("repa_deit_tiny", "vanilla_deit_tiny", "repa_deit_base", "repa_swin_tiny")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def images(batch: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_comparing(report, name, batch, dtype):
    model = repavit_ops.create_model(name).eval()
    with torch.inference_mode(False):
        compares = repavit_ops.fuse(model, dtype=DTYPES[dtype])
        does_not = repavit_ops.fuse(model, dtype=DTYPES[dtype], keep_unpacked=False)
    x = images(batch, DTYPES[dtype])
    assert torch.equal(compares(x), does_not(x))
    times = interleave({"compares": lambda: compares(x), "does not": lambda: does_not(x)}, seconds=20, rounds=40)
    ratio = times["compares"].p20 / times["does not"].p20
    report(
        case=f"{name} batch {batch}",
        dtype=dtype,
        ratio=ratio,
        ratios={"compares over does not": ratio},
        seconds={key: [t.p20, t.p50, t.p80] for key, t in times.items()},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_first_call_behind_a_write(report, name, dtype):
    with torch.inference_mode(False):
        fused = repavit_ops.fuse(repavit_ops.create_model(name).eval(), dtype=DTYPES[dtype])
    packed = [module for module in fused.modules() if isinstance(module, PackedWeights)]
    data, x = [p.data for p in fused.parameters()], images(1, DTYPES[dtype])
    packing, calls, behind = [], [], []
    fused(x)
    for turn in range(30):
        torch._foreach_mul_(data, 1.01 if turn % 2 else 1 / 1.01)  # raises no counter
        start = time.perf_counter()
        y = fused(x)
        behind.append(time.perf_counter() - start)
        start = time.perf_counter()
        again = fused(x)
        calls.append(time.perf_counter() - start)
        assert torch.equal(y, again)
        start = time.perf_counter()
        for module in packed:
            module.pack(*module.sources())
        packing.append(time.perf_counter() - start)
    median = {key: statistics.median(v) for key, v in {"packing": packing, "call": calls, "behind": behind}.items()}
    ratio = (median["behind"] - median["call"]) / median["packing"]
    report(
        case=f"{name} behind a write",
        dtype=dtype,
        ratio=ratio,
        ratios={"packing in a call over packing": ratio},
        seconds={key: [v] for key, v in median.items()},
    )
