"""Joined branches as the paper writes them, branch by branch, and modules with random weights for every option."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reparam_helpers import relative_error as error_of
from torch import nn

from repavit_ops.nn import JoinedBranchAttention, JoinedBranchFFN, JoinSchedule

C, HIDDEN, HEADS, N, T = 24, 60, 3, 2, 7
ALPHAS = [0.0, 0.3, 1.0]
SCALED = {"layer_scale": 0.5, "skip_lam": 2.0}

SHARED_OPTIONS = {
    "default": {},
    "sum": {"kappa": "sum"},
    "batchnorm": {"norm": "batchnorm"},
    "no_norm": {"norm": None},
    "large_eps": {"norm_eps": 0.1},
    "bypass": {"bypass": True},
    "bypass_batchnorm": {"bypass": True, "norm": "batchnorm", **SCALED},
    "bypass_no_norm": {"bypass": True, "norm": None},
    "no_residual": {"residual": False, "bypass": True, "norm": "batchnorm"},
    "scaled": SCALED,
    "one_branch": {"branches": 1},
    "four_branches": {"branches": 4, "kappa": "sum"},
}
FFN_OPTIONS = {
    **SHARED_OPTIONS,
    "tanh": {"approximate": "tanh"},
    "idle": {"idle_ratio": 0.75},
    "idle_batchnorm": {"idle_ratio": 0.75, "norm": "batchnorm", **SCALED},
    "idle_bypass": {"act_channels": 17, "bypass": True, **SCALED},
    "all_idle": {"act_channels": 0, "kappa": "sum"},
}
ATTENTION_OPTIONS = {
    f"{join}_{name}": {"join": join, **options}
    for join in "ab"
    for name, options in {
        **SHARED_OPTIONS,
        "no_qkv_bias": {"qkv_bias": False},
        "no_bias_at_all": {"qkv_bias": False, "norm": None},
    }.items()
}


def relative_error(got, wanted):
    return error_of(got.detach(), wanted.detach())


# --- The formulas, branch by branch -----------------------------------------------------------------------------------


def normed(m, x):
    """What each branch reads, and n(x) itself."""
    if isinstance(m.norm, nn.BatchNorm1d):
        z = F.batch_norm(
            x.flatten(0, -2), m.norm.running_mean.clone(), m.norm.running_var.clone(), None, None, m.training, 0.1,
            m.norm.eps,
        ).view_as(x)  # fmt: skip
    elif isinstance(m.norm, nn.LayerNorm):
        z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + m.norm.eps).sqrt()
    else:
        return [x] * m.branches, x
    return [z * m.norm_weight[b] + m.norm_bias[b] for b in range(m.branches)], z


def join(ts, alpha, kappa):
    return [(1 - alpha) * t + alpha * kappa * sum(ts) for t in ts]


def close(m, x, y, z, scaled):
    if m.bypass is not None:
        y = y + m.bypass(z)
    if scaled:
        y = m.ls * y / m.skip_lam
    return x + y if m.residual else y


def naive_ffn(m, x, alpha, options):
    inputs, z = normed(m, x)
    h = [u @ w.T + b for u, w, b in zip(inputs, m.fc1_weight, m.fc1_bias, strict=True)]
    kappa = 1.0 if options.get("kappa") == "sum" else 1 / m.branches
    y = 0
    for own, joined, w, b in zip(h, join(h, alpha, kappa), m.fc2_weight, m.fc2_bias, strict=True):
        active = F.gelu(joined[..., : m.act_channels], approximate=options.get("approximate", "none"))
        y = y + torch.cat((active, own[..., m.act_channels :]), -1) @ w.T + b
    return close(m, x, y, z, "layer_scale" in options)


def naive_attention(m, x, alpha, options, attn_bias=None):
    inputs, z = normed(m, x)
    biases = [torch.zeros(3 * C)] * m.branches if m.qkv_bias is None else m.qkv_bias
    kappa = 1.0 if options.get("kappa") == "sum" else 1 / m.branches
    qkv = [
        (u @ w.T + b).view(*x.shape[:2], 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        for u, w, b in zip(inputs, m.qkv_weight, biases, strict=True)
    ]
    if options["join"] == "a":
        qkv = join(qkv, alpha, kappa)
    scores = [q @ k.mT / (C // HEADS) ** 0.5 for q, k, _ in qkv]
    if options["join"] == "b":
        scores = join(scores, alpha, kappa)
    y = 0
    for s, (_, _, v), w, b in zip(scores, qkv, m.proj_weight, m.proj_bias, strict=True):
        p = (s if attn_bias is None else s + attn_bias).softmax(-1).nan_to_num()  # a masked row gives 0
        y = y + (p @ v).transpose(1, 2).flatten(2) @ w.T + b
    return close(m, x, y, z, "layer_scale" in options)


def randomised(m):
    """Random parameters and statistics, in float64."""
    m = m.double().eval()
    with torch.no_grad():
        for name, p in m.named_parameters():
            p.normal_(std=1.0 if p.dim() < 3 else p.shape[-1] ** -0.5)
            if name in ("norm_weight", "ls"):
                p.add_(1.0)
        if isinstance(m.norm, nn.BatchNorm1d):
            m.norm.running_mean.normal_()
            m.norm.running_var.uniform_(0.3, 2.0)
    return m


def trained(m, steps=8):
    """A module after optimiser steps on random targets, α rising to 1, from random weights and statistics."""
    schedule, optimizer = JoinSchedule(m, steps, hold=0.3), torch.optim.AdamW(m.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (m.train()(tokens()) - tokens()).square().mean().backward()
        optimizer.step()
        schedule.step()
    return m.eval()


def make_ffn(name, **more):
    torch.manual_seed(sorted(FFN_OPTIONS).index(name))
    options = {"branches": 3, **FFN_OPTIONS[name], **more}
    return randomised(JoinedBranchFFN(C, HIDDEN, **options)), options


def make_attention(name, **more):
    torch.manual_seed(sorted(ATTENTION_OPTIONS).index(name))
    options = {"branches": 3, **ATTENTION_OPTIONS[name], **more}
    return randomised(JoinedBranchAttention(C, HEADS, **options)), options


def tokens(*shape):
    return torch.randn(*(shape or (N, T, C)), dtype=torch.float64) * 2 + 0.5


CASES = [
    *[pytest.param(make_ffn, naive_ffn, name, id=f"ffn-{name}") for name in FFN_OPTIONS],
    *[pytest.param(make_attention, naive_attention, name, id=f"attention-{name}") for name in ATTENTION_OPTIONS],
]
