"""``repavit-ops tune --cpu``: what it measures of a model, what it writes, and what it says of mistakes."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings

import pytest
import torch
from cpu_tuning_helpers import (
    NO_KERNELS,
    USAGE,
    empty_table,
    ours_in,
    preferring,
    quick_command,
)
from model_helpers import images, randomise, tiny_swin, tiny_vit
from torch import nn

import repavit_ops
from repavit_ops import backends, cpu_tuning
from repavit_ops.benchmarking import cpu_tuner
from repavit_ops.benchmarking.harness import Timing
from repavit_ops.nn import PartialGELUFFN

pytestmark = pytest.mark.skipif(NO_KERNELS is not None, reason=f"no C++ kernels: {NO_KERNELS}")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    yield from empty_table(tmp_path, monkeypatch)


@pytest.fixture
def call(monkeypatch):
    return quick_command(monkeypatch)


@torch.no_grad()
def test_every_operation_of_a_model_is_found_once_with_all_its_blocks():
    fused = repavit_ops.fuse(tiny_swin(), backend="cpp")
    places = cpu_tuner.places_of(fused, images(2, 64))
    found = {(place.operation.operator, tuple(place.x.shape)): len(place.parts) for place in places}
    assert found == {
        ("patch_projection", (2, 3, 64, 64)): 1,
        ("window_rep_attention", (2, 16, 16, 24)): 1,  # the shifted one has the same shape
        ("partial_gelu_ffn", (2, 16, 16, 24)): 2,
        ("patch_projection", (2, 16, 16, 24)): 1,
        ("window_rep_attention", (2, 8, 8, 48)): 1,
        ("partial_gelu_ffn", (2, 8, 8, 48)): 2,
        ("token_embedding", (2, 3, 64, 64)): 1,
        ("pooled_head", (2, 8, 8, 48)): 1,
    }
    assert len(places) == len(found) + 2
    assert all(not module._forward_pre_hooks for module in fused.modules())


@torch.no_grad()
def test_both_forms_of_every_operation_are_what_would_run():
    fused, x = repavit_ops.fuse(tiny_vit(), backend="cpp"), images(2)
    for place in cpu_tuner.places_of(fused, x):
        ours, y = ours_in(place.turns("cpp"))
        assert len(ours) == 1
        theirs, z = ours_in(place.turns("pytorch"))
        assert theirs == []
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocks_of_one_kind_take_turns():
    (place,) = [
        place
        for place in cpu_tuner.places_of(repavit_ops.fuse(tiny_vit(), backend="cpp"), images(2))
        if place.operation.operator == "rep_attention"
    ]
    turn = place.turns("pytorch")
    first, second, third = turn(), turn(), turn()
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_what_the_table_has_is_not_measured_again_unless_asked(folder):
    places = cpu_tuner.places_of(repavit_ops.fuse(tiny_vit(), backend="cpp"), images(2))
    file = cpu_tuning.path()
    run = lambda choice, **options: len(list(cpu_tuner.tune(places, file, timer=preferring(choice), **options)))  # noqa: E731
    assert run("pytorch") == len(places)
    assert run("cpp") == 0
    assert {measured.choice for measured in cpu_tuning.read(file)} == {"pytorch"}
    assert run("cpp", again=True) == len(places)
    assert {measured.choice for measured in cpu_tuning.read(file)} == {"cpp"}


def test_a_kernel_that_is_wrong_here_is_left_to_pytorch_with_a_warning(monkeypatch):
    (place,) = cpu_tuner.places_of(randomise(PartialGELUFFN(16, 8, backend="cpp")), torch.randn(2, 5, 16))
    good = place.call

    def call(part, backend):
        made = good(part, backend)
        return (lambda: made() + 1) if backend == "cpp" else made

    place.call = call
    with pytest.warns(UserWarning, match=r"partial_gelu_ffn on \[2, 5, 16\]: max error .*left to PyTorch"):
        measured = cpu_tuner.measure(place, preferring("cpp"))
    assert (measured.us, measured.choice) == (math.inf, "pytorch")
    assert cpu_tuner.measure(dataclasses.replace(place), preferring("cpp")).choice == "cpp"


@pytest.mark.parametrize(("p80", "busy"), [(1.4, False), (1.6, True)])
def test_medians_are_told_and_a_busy_machine_too(p80, busy, monkeypatch):
    monkeypatch.setattr(cpu_tuner, "interleave", lambda calls, seconds: {"cpp": Timing(1e-6, 1.2e-6, p80 * 1e-6)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cpu_tuner.microseconds(0.0)({})["cpp"] == pytest.approx(1.2)
    assert ["the machine is busy" in str(warning.message) for warning in caught] == [True] * busy


def test_the_command_measures_a_checkpoint_and_a_model_then_follows_it(call, tmp_path):
    repavit_ops.save_checkpoint(repavit_ops.reparameterize(tiny_vit()), tmp_path / "tiny.safetensors")
    arguments = ("tune", "--cpu", tmp_path / "tiny.safetensors", "--batch", "1", "--dtype", "float32")
    status, out, err = call(*arguments)
    assert status == 0, err
    file = cpu_tuning.path()
    entries = cpu_tuning.read(file)
    assert {entry.operation.operator for entry in entries} == {
        *("partial_gelu_ffn", "rep_attention", "patch_projection", "token_embedding", "pooled_head"),
    }
    (line,) = [line for line in out.splitlines() if line.startswith("rep_attention")]
    assert line.split() == ["rep_attention", "1x17x48", "float32", "2.0", "1.0", "0.50", "PyTorch"]
    assert out.splitlines()[0].split() == [
        "operator",
        "shape",
        "dtype",
        "ours",
        "µs",
        "PyTorch",
        "µs",
        "ratio",
        "choice",
    ]
    assert f"wrote {file}" in out
    fused = repavit_ops.fuse(tiny_vit())
    with torch.no_grad():
        assert ours_in(lambda: fused(images(1)))[0] == []
    assert f"{file} has all of it" in call(*arguments)[1]
    assert len(call(*arguments, "--again")[1].splitlines()) == len(out.splitlines())


def test_the_command_writes_where_it_is_told(call, tmp_path):
    repavit_ops.save_checkpoint(repavit_ops.reparameterize(tiny_vit()), tmp_path / "tiny.safetensors")
    arguments = ("tune", "--cpu", tmp_path / "tiny.safetensors", "--batch", "1", "--dtype", "float32")
    assert call(*arguments, "--out", tmp_path / "elsewhere")[0] == 0
    assert cpu_tuning.path(tmp_path / "elsewhere").exists()
    assert not cpu_tuning.path().exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cpu", "no_such_model"), "MODEL: got 'no_such_model'"),
        (("--cpu", "repa_deit_tiny", "--dtype", "int8"), "--dtype: got 'int8'"),
        (("--cpu", "repa_deit_tiny", "--device", "cuda:1"), "--device: got 'cuda:1' beside --cpu"),
        (("repa_deit_tiny", "--threads", "2"), "--threads: is of the CPU"),
    ],
)
def test_mistakes_are_one_line(call, torchvision_stub, arguments, message):
    status, _, err = call("tune", *arguments)
    assert status == USAGE
    assert message in err


def test_a_model_of_which_nothing_fuses_is_refused(call, monkeypatch):
    monkeypatch.setattr(
        sys.modules["repavit_ops.cli.tune"], "model_of", lambda source: nn.Sequential(nn.Conv2d(3, 3, 3)).eval()
    )
    with pytest.warns(UserWarning, match="nothing"):
        status, _, err = call("tune", "--cpu", "some.pth", "--batch", "1")
    assert status == USAGE
    assert "MODEL: nothing of 'some.pth' fuses" in err


def test_the_command_says_why_there_is_nothing_to_tune(call, monkeypatch):
    monkeypatch.setattr(backends, "_cpp_failure", "not built")
    status, _, err = call("tune", "--cpu", "repa_deit_tiny")
    assert status == USAGE
    assert "nothing to tune: not built" in err
