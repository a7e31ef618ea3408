"""Weights that other processes, ranks and threads write, that die and come back, that have no counters."""

from __future__ import annotations

import copy
import mmap
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from model_helpers import images, relative, tiny_swin, tiny_vit
from torch import nn
from torch.nn.utils import parametrize, prune

import repavit_ops
from repavit_ops import backends, ops

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)


def plain_of(model):
    """Plain PyTorch on the weights as they are now."""
    return repavit_ops.fuse(model, backend="reference")


# ---- Training -------------------------------------------------------------------------------------------------------


def losses(model, steps=12):
    """Of fused AdamW on a batch that stays the same; the last one is that of the trained model."""
    x, target = images(8), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    found = []
    for _ in range(steps + 1):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_twelve_steps_of_fused_adamw_end_where_eager_ends():
    fused = repavit_ops.fuse(tiny_vit())
    eager = plain_of(fused).requires_grad_(True)
    ours, theirs = losses(fused.requires_grad_(True)), losses(eager)
    assert theirs[-1] < 0.5 * theirs[0]
    assert ours == pytest.approx(theirs, abs=1e-6)


# ---- Other processes ------------------------------------------------------------------------------------------------

RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from model_helpers import images, relative, tiny_vit
import repavit_ops
rank = int(sys.argv[2])
store = dist.FileStore(sys.argv[3], 2)
dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
torch.set_num_threads(1)
fused, x = repavit_ops.fuse(tiny_vit(seed=rank)), images()
with torch.no_grad():
    before = fused(x)
    def check():
        plain = repavit_ops.fuse(fused, backend="reference")
        assert relative(fused(x), plain(x)) < 1e-5
        return fused(x)
    for p in fused.parameters():
        dist.broadcast(p, 0)
    received = check()
    assert rank == 0 or relative(before, received) > 1e-2
    for p in fused.parameters():
        dist.all_reduce(p)
    assert relative(check(), received) > 1e-2
    for p in fused.parameters():
        dist.all_gather([torch.empty_like(p), p.data], torch.full_like(p, 0.01 * rank + 0.01))
    check()
def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.arange(len(x))).backward()
        optimizer.step()
    with torch.no_grad():
        return model(x)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
def fresh(**options):
    return repavit_ops.fuse(repavit_ops.fuse(tiny_vit()), **options).requires_grad_(True)
expected = trained(fresh(backend="reference"))
sharded = fresh()
for block in sharded.blocks:
    fully_shard(block, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
assert relative(trained(sharded), expected) < 1e-5
assert relative(trained(FullyShardedDataParallel(fresh(), device_id=torch.device("cpu"))), expected) < 1e-5
assert relative(trained(torch.nn.parallel.DistributedDataParallel(fresh())), expected) < 1e-5
dist.destroy_process_group()
print("done")
"""


def test_ranks_that_receive_and_shard_weights(tmp_path):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", RANK, here]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=240)[0].splitlines() for rank in ranks]  # gloo of torch 2.10 has a line of its own
    assert [lines[-1:] for lines in said] == [["done"], ["done"]]


def _write(parameters):
    with torch.no_grad():
        for p in parameters:
            p.mul_(1.25)


def test_another_process_writes_shared_weights():
    fused, x = repavit_ops.fuse(tiny_vit()).share_memory(), images()
    with torch.no_grad():
        before = fused(x)
        other = torch.multiprocessing.get_context("spawn").Process(target=_write, args=(list(fused.parameters()),))
        other.start()
        other.join()
        assert other.exitcode == 0
        assert relative(fused(x), before) > 1e-2
        assert relative(fused(x), plain_of(fused)(x)) < 1e-5


# ---- Without counters -----------------------------------------------------------------------------------------------


def fused_in_inference_mode(model):
    with pytest.warns(UserWarning, match=r"inference_mode.*never be trained"):
        return repavit_ops.fuse(model)


@pytest.mark.parametrize(("build", "size"), [(tiny_vit, 32), (tiny_swin, 64)], ids=["vit", "swin"])
def test_a_model_built_and_fused_in_inference_mode_follows_loads_and_edits(build, size):
    x = images(height=size)
    with torch.inference_mode():
        fused, other = (fused_in_inference_mode(build(seed)) for seed in (0, 3))
        before, expected = fused(x), other(x)
        fused.load_state_dict(other.state_dict())
        assert torch.equal(fused(x), expected)
        for p in fused.parameters():
            p.mul_(1.25)
        fused.eval()
        assert relative(fused(x), before) > 1e-2
        for name, p in other.named_parameters():
            p.copy_(fused.get_parameter(name))
        assert torch.equal(other(x), fused(x))
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        fused(x).sum().backward()


def test_a_weight_of_inference_mode_is_not_left_untrained_in_silence():
    """nn.Linear trains its bias then, and its weight not, without a word."""
    module = repavit_ops.nn.PartialGELUFFN(8, 8).double()
    with torch.inference_mode():
        module.float()
    with pytest.raises(RuntimeError, match="Inference tensors"):
        module(torch.ones(2, 8)).sum().backward()


# ---- Weights that die -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("one_call", [True, False], ids=["one_call", "apart"])
def test_a_freed_storage_raises_until_it_is_back(one_call):
    fused, x = repavit_ops.fuse(tiny_vit()), images()
    fused.in_one_call = one_call
    expected = fused(x)
    weight = fused.blocks[1].mlp.w_out
    kept, storage = weight.detach().clone(), weight.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=r"w_out.*storage"):
        fused(x)
    storage.resize_(size)
    storage.copy_(kept.untyped_storage())
    assert torch.equal(fused(x), expected)
    weight.data.mul_(2)
    assert relative(fused(x), plain_of(fused)(x)) < 1e-5


@torch.no_grad()
def test_a_model_on_the_meta_device_becomes_real():
    fused, x = repavit_ops.fuse(tiny_vit()), images()
    for load in (
        lambda m: m.to_empty(device="cpu").load_state_dict(fused.state_dict()),
        lambda m: m.load_state_dict(fused.state_dict(), assign=True),
    ):
        meta = copy.deepcopy(fused).to("meta")
        load(meta)
        assert torch.equal(meta(x), fused(x))


@torch.no_grad()
def test_two_models_share_a_weight():
    one, x = repavit_ops.fuse(tiny_vit()), images()
    two = repavit_ops.fuse(tiny_vit(seed=3))
    two.blocks[0].mlp.w_in = one.blocks[0].mlp.w_in
    for write in (lambda w: w.mul_(1.5), lambda w: w.data.mul_(0.5), lambda w: w.numpy().fill(0.1)):
        write(one.blocks[0].mlp.w_in)
        for model in (one, two):
            assert relative(model(x), plain_of(model)(x)) < 1e-5


@torch.no_grad()
def test_a_resized_position_table_follows_its_parameter():
    fused, x = repavit_ops.fuse(tiny_vit()), images(height=48)
    before = fused(x)
    assert fused.why_apart(x) is None
    fused.pos_embed.data.mul_(2)
    assert relative(fused(x), before) > 1e-3
    assert relative(fused(x), plain_of(fused)(x)) < 1e-5
    fused.pos_embed.data = fused.pos_embed.data.flip(1)
    assert relative(fused(x), plain_of(fused)(x)) < 1e-5


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@torch.no_grad()
def test_parametrized_weights():
    fused, x = repavit_ops.fuse(tiny_vit()), images()
    before = fused(x)
    mlp = fused.blocks[0].mlp
    parametrize.register_parametrization(mlp, "w_in", Doubled())
    right = copy.deepcopy(plain_of(repavit_ops.fuse(tiny_vit())))
    right.blocks[0].mlp.w_in.mul_(2)
    for _ in range(2):
        assert relative(fused(x), right(x)) < 1e-5
    mlp.parametrizations.w_in.original.data.mul_(1.5)
    right.blocks[0].mlp.w_in.mul_(1.5)
    assert relative(fused(x), right(x)) < 1e-5
    parametrize.remove_parametrizations(mlp, "w_in")
    assert relative(fused(x), right(x)) < 1e-5
    assert relative(fused(x), before) > 1e-2


@torch.no_grad()
def test_pruned_weights():
    """Masks of PyTorch's own pruning, which a hook multiplies into the weight at every call."""
    fused, x = repavit_ops.fuse(tiny_vit()), images()
    right = plain_of(fused)
    before = fused(x)
    for block, other in zip(fused.blocks, right.blocks, strict=True):
        prune.random_unstructured(block.mlp, "w_in", 0.5)
        other.mlp.w_in.mul_(block.mlp.w_in_mask)
    assert relative(fused(x), right(x)) < 1e-5
    assert relative(fused(x), before) > 1e-2
    for block in fused.blocks:
        prune.remove(block.mlp, "w_in")
    assert relative(fused(x), right(x)) < 1e-5


@torch.no_grad()
def test_single_numbers_are_followed_where_counters_are_raised():
    for build, size in ((tiny_vit, 32), (tiny_swin, 64)):
        fused, x = repavit_ops.fuse(build()), images(height=size)
        fused(x)
        for name, p in fused.named_parameters():
            if name.endswith(("w_in", "w_out", "w_merged", "w_qkv", "w_proj")):
                p[p.shape[0] // 2, p.shape[1] // 3] += 50
                assert relative(fused(x), plain_of(fused)(x)) < 1e-4, name


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_packed_copy_in_memory_that_is_read_only(tmp_path):
    module, x = repavit_ops.nn.PartialGELUFFN(48, 40, norm_eps=1e-6), torch.randn(5, 48)
    (tmp_path / "packed").write_bytes(module.current()[0].numpy().tobytes())
    with open(tmp_path / "packed", "rb") as file:
        packed = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)
    for factor in (1, 2):
        module.w_in.mul_(factor)
        weights = (module.w_in, module.b_in, module.w_out, module.w_merged, module.bias)
        y = ops.partial_gelu_ffn(x, *weights, norm_eps=1e-6, packed=packed)
        assert torch.equal(y, module(x))


# ---- Threads --------------------------------------------------------------------------------------------------------


def test_calls_with_other_weights_share_a_packed_copy():
    """Each answer is that of the call's own weights, while other calls write the copy that it reads."""
    torch.manual_seed(0)
    modules = [repavit_ops.nn.PartialGELUFFN(64, 96, norm_eps=1e-6).requires_grad_(False) for _ in range(2)]
    x = torch.randn(40, 64)
    expected = [module(x) for module in modules]
    shared = modules[0].packed_copy.clone()
    wrong = []

    def work(module, right):
        with torch.inference_mode():
            for _ in range(200):
                y = ops.partial_gelu_ffn(
                    x,
                    module.w_in,
                    module.b_in,
                    module.w_out,
                    module.w_merged,
                    module.bias,
                    norm_eps=1e-6,
                    packed=shared,
                )
                if not torch.equal(y, right):
                    wrong.append(relative(y, right))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(modules * 2, expected * 2, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_module_whose_weights_are_swapped_while_threads_call_it():
    """Each answer is of the one weight or of the other, never of both."""
    torch.manual_seed(0)
    module, other = (repavit_ops.nn.PatchProjection(3, 64, 8).requires_grad_(False) for _ in range(2))
    x = images(4)
    values = [module.weight.data.clone(), other.weight.data.clone()]
    right = []
    for value in values:
        module.weight.data = value
        right.append(module(x))
    stop, wrong = threading.Event(), []

    def work():
        with torch.inference_mode():
            while not stop.is_set():
                y = module(x)
                if not any(torch.equal(y, answer) for answer in right):
                    wrong.append(min(relative(y, answer) for answer in right))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(300):
        module.weight.data = values[turn % 2]
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
