"""Training forms in two processes: a step is that of one process, and what was saved there merges and fuses here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_steps import MODELS, PROCESSES, WAYS, loss_of, optimizer_of, share
from model_helpers import images, relative

import repavit_ops

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo to train over"
)
STEPS = Path(__file__).with_name("distributed_steps.py")


def run_in_processes(folder):
    """What each process returned, and what it said; they meet at a file, not at a port."""
    command = [sys.executable, "-X", "faulthandler", str(STEPS), str(folder), str(folder / "meeting")]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(PROCESSES)}
    ranks = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**shared, "RANK": str(rank)})
        for rank in range(PROCESSES)
    ]
    try:
        said = [each.communicate(timeout=300)[1] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    return [each.returncode for each in ranks], "\n".join(said)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of checkpoints that two processes wrote."""
    codes, said = run_in_processes(folder := tmp_path_factory.mktemp("distributed"))
    if -signal.SIGABRT in codes:  # seen once, behind torchrun, and in none of 130 runs since: shown, and tried again
        warnings.warn(f"PyTorch gave up in a process of its own: {said}", stacklevel=2)
        codes, said = run_in_processes(folder := tmp_path_factory.mktemp("distributed"))
    assert codes == [0] * PROCESSES, said
    return folder


def in_one_process(name):
    """The model after one step on the same batch, gradients averaged over the shares; the statistics of each share."""
    model = MODELS[name]()
    optimizer = optimizer_of(model)
    untouched = {key: value.clone() for key, value in model.named_buffers()}
    statistics = []
    for rank in range(PROCESSES):
        model.load_state_dict(untouched, strict=False)
        (loss_of(model, rank) / PROCESSES).backward()
        statistics.append({key: value.clone() for key, value in model.named_buffers()})
    optimizer.step()
    return model, statistics


def is_close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_two_processes_is_that_of_one_and_what_was_saved_merges_and_fuses(trained, name, way):
    (expected, statistics), model = in_one_process(name), MODELS[name]()
    started = {key: value.clone() for key, value in model.named_parameters()}
    state = {"model": model.state_dict()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, checkpoint_id=trained / f"{way}-{name}")
    model.load_state_dict(state["model"])
    for (key, got), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert is_close(got, wanted), key
        assert not torch.equal(got, started[key]) or not got.requires_grad, key
    for key, got in model.named_buffers():  # a checkpoint holds one of the processes' statistics, no saying whose
        assert any(is_close(got, of_one[key]) for of_one in statistics), key
    for each in (expected, model):
        repavit_ops.recalibrate_bn(each, [share(rank) for rank in range(PROCESSES)])
        each.eval()
    x = images(2).double()
    fused = repavit_ops.fuse(repavit_ops.reparameterize(model))
    with torch.no_grad():
        assert relative(fused(x), expected(x)) < 1e-9
