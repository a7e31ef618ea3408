"""What tests of ``repavit-ops tune --cpu`` share: an empty table, entries for it, a timer that takes no time."""

from __future__ import annotations

import torch
from cli_helpers import run_command
from model_helpers import Recorder, tiny_swin, tiny_vit
from torch import nn

import repavit_ops
from repavit_ops import backends, cpu_tuning
from repavit_ops.benchmarking import cpu_tuner
from repavit_ops.cpu_tuning import Measured
from repavit_ops.nn import GatedFFN, PartialGELUFFN, PatchConv2d, PatchProjection, RepAttention, WindowRepAttention

NO_KERNELS = backends.why_unavailable("cpp")
BF16, FP32 = torch.bfloat16, torch.float32
USAGE = 2
MODULES = {  # and the shape of what one is called with
    "partial_gelu_ffn": (lambda: PartialGELUFFN(16, 8), (2, 5, 16)),
    "gated_ffn": (lambda: GatedFFN(16, 8, activation="gelu"), (2, 5, 16)),
    "rep_attention": (lambda: RepAttention(16, 2, norm_eps=1e-6, residual=True), (2, 5, 16)),
    "window_rep_attention": (lambda: WindowRepAttention(16, 2, window=2, shift=1), (2, 4, 4, 16)),
    "patch_projection": (lambda: PatchProjection(16, 8, 2, channels_last=True, norm_eps=1e-6), (2, 4, 4, 16)),
    "patch_convolution": (lambda: PatchConv2d.replacing(nn.Conv2d(3, 8, 4, stride=4)), (2, 3, 8, 8)),
}
MODELS = {"vit": (tiny_vit, 32), "swin": (tiny_swin, 64)}


def empty_table(tmp_path, monkeypatch):
    """Of a fixture: an empty folder for the table, and no trace left behind."""
    monkeypatch.setenv("REPAVIT_TUNED", str(tmp_path))
    cpu_tuning.forget()
    yield tmp_path
    monkeypatch.undo()
    cpu_tuning.forget()


def quick_command(monkeypatch):
    """What runs the command with a timer that takes no time: (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cpu_tuner, "microseconds", lambda seconds: preferring("pytorch"))
    return run_command


def preferring(choice):
    """A timer by which one choice takes half of what the other does; it calls each once."""

    def timer(calls):
        for provider in calls.values():
            provider()
        return {name: 1.0 if name == choice else 2.0 for name in calls}

    return timer


def remember(operation, size, batch, choice):
    us, pytorch_us = (2.0, 1.0) if choice == "pytorch" else (1.0, 2.0)
    cpu_tuning.add(Measured.of(operation, size, batch, us, pytorch_us), cpu_tuning.path())
    cpu_tuning.forget()


def tuned(model, x, choice=lambda operation: "pytorch"):
    """Fill the table for a model, with a choice for each operation."""
    for place in cpu_tuner.places_of(repavit_ops.fuse(model, backend="cpp", dtype=x.dtype), x):
        remember(place.operation, place.x.shape[1:], place.x.shape[0], choice(place.operation.operator))


def ours_in(call):
    """Operators of this library that a call runs, and its result."""
    with Recorder() as recorder:
        y = call()
    return [name for name in recorder.calls if name.startswith("repavit_ops::")], y


def ours_compiled(module, x, **options):
    """Operators of this library in the graph that torch.compile makes of a call, and the call's result."""
    found = []

    def keep(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if "repavit_ops" in str(node.target))
        return graph.forward

    torch.compiler.reset()
    y = torch.compile(module, backend=keep, fullgraph=True, **options)(x)
    return found, y
