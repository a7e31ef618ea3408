"""Training form of joined branches against a loop over the branches: ``pytest bench/bench_joined_branches.py``.

Forward and backward of one sub-block of ViT-Tiny at 0 < α < 1, where both do the same products, and at α = 1, where the
branches run at the width of one. One thread, in CPU time of the process: other programs hardly change the ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repavit_ops.benchmarking.harness import check, interleave
from repavit_ops.nn import JoinedBranchAttention, JoinedBranchFFN, set_join

C, HEADS, HIDDEN, TOKENS, ALPHA = 192, 3, 768, 197, 0.5

MODULES: dict[str, Callable[[int], nn.Module]] = {
    "ffn": lambda branches: JoinedBranchFFN(C, HIDDEN, branches),
    "attention, join a": lambda branches: JoinedBranchAttention(C, HEADS, branches, join="a"),
    "attention, join b": lambda branches: JoinedBranchAttention(C, HEADS, branches, join="b"),
}


def mixed(ts: list[Tensor], kappa: float) -> list[Tensor]:
    total = sum(ts)
    return [(1 - ALPHA) * t + (ALPHA * kappa) * total for t in ts]


def normed(m: nn.Module, x: Tensor) -> list[Tensor]:
    return [F.layer_norm(x, (C,), w, b, m.norm.eps) for w, b in zip(m.norm_weight, m.norm_bias, strict=True)]


def ffn_loop(m: nn.Module, x: Tensor) -> Tensor:
    """Branch by branch, as one would write the formula."""
    h = [F.linear(z, w, b) for z, w, b in zip(normed(m, x), m.fc1_weight, m.fc1_bias, strict=True)]
    y = x
    for t, w, b in zip(mixed(h, m.kappa), m.fc2_weight, m.fc2_bias, strict=True):
        y = y + F.linear(F.gelu(t), w, b)
    return y


def attention_loop(m: nn.Module, x: Tensor) -> Tensor:
    """Branch by branch; join A with PyTorch's fused attention, join B, which needs the scores, without."""
    qkv = [F.linear(z, w, b) for z, w, b in zip(normed(m, x), m.qkv_weight, m.qkv_bias, strict=True)]
    if not m.joins_scores:
        qkv = mixed(qkv, m.kappa)
    heads = [t.unflatten(-1, (3, HEADS, C // HEADS)).permute(2, 0, 3, 1, 4) for t in qkv]
    if m.joins_scores:
        scores = mixed([(m.scale * q) @ k.mT for q, k, _ in heads], m.kappa)
        o = [s.softmax(-1) @ v for s, (_, _, v) in zip(scores, heads, strict=True)]
    else:
        o = [F.scaled_dot_product_attention(q, k, v) for q, k, v in heads]
    y = x
    for t, w, b in zip(o, m.proj_weight, m.proj_bias, strict=True):
        y = y + F.linear(t.transpose(1, 2).flatten(2), w, b)
    return y


def results(forward: Callable[[nn.Module, Tensor], Tensor], m: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y = forward(m, x)
    return [y.detach(), *torch.autograd.grad(y, [x, *m.parameters()], grad)]


@pytest.mark.parametrize("batch", [8, 32], ids=lambda batch: f"batch{batch}")
@pytest.mark.parametrize("branches", [2, 3, 4], ids=lambda branches: f"branches{branches}")
@pytest.mark.parametrize("kind", MODULES)
def test_joined_branches(report, kind, branches, batch):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    m, double = MODULES[kind](branches).train(), MODULES[kind](branches).double()
    double.load_state_dict(m.state_dict())
    loop = ffn_loop if kind == "ffn" else attention_loop
    x, grad = torch.randn(batch, TOKENS, C), torch.randn(batch, TOKENS, C)
    set_join(m, ALPHA)
    set_join(double, ALPHA)
    few = slice(2)  # images of the check
    truth = results(loop, double, x[few].double(), grad[few].double())
    ours, loops = (results(f, m, x[few], grad[few]) for f in (nn.Module.__call__, loop))
    for t, o, e in zip(truth, ours, loops, strict=True):
        scale = t.abs().max()
        check(kind, o / scale, e / scale, t / scale)

    def ours_at(alpha: float) -> Callable[[], object]:
        def call() -> object:
            set_join(m, alpha)
            return results(nn.Module.__call__, m, x, grad)

        return call

    calls = {"repavit_ops": ours_at(ALPHA), "loop": lambda: results(loop, m, x, grad), "alpha 1": ours_at(1.0)}
    times = interleave(calls, rounds=9, seconds=1.0, clock=time.process_time)
    base = times["repavit_ops"].p50
    products = 8 if kind == "ffn" else 4  # of C x C, per token and branch: fc1 and fc2; q, k, v and proj
    flop = 3 * 2 * batch * TOKENS * C * C * branches * products
    report(
        case=f"{kind}, {branches} branches, batch {batch}",
        dtype="float32",
        ratio=times["loop"].p50 / base,
        ratios={"loop": times["loop"].p50 / base},
        speedup_at_one=base / times["alpha 1"].p50,  # of α = 1 over α = 1/2
        gflops=flop / base / 1e9,
        seconds={name: [t.p20, t.p50, t.p80] for name, t in times.items()},
    )
    print(f"{kind}, {branches} branches, batch {batch}: α = 1 takes {times['alpha 1'].p50 / base:.2f} of α = {ALPHA}")
