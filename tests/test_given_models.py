"""Models as people hand them over: wrapped, sharded, quantised, without values, with another's state dict."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
from idling_helpers import idle
from model_helpers import images, randomise, tiny_vit
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import repavit_ops
from repavit_ops import models
from repavit_ops.idling.fidelity import fidelity
from repavit_ops.models import VisionTransformer
from repavit_ops.nn import given

SEEN = images(3, 32)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """A process group of this process alone."""
    if dist.is_initialized():
        yield
        return
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "compile": compiled,
    "two": lambda model: compiled(DistributedDataParallel(model)),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def vanilla() -> nn.Module:
    return tiny_vit(act_channels=None)


def mesh():
    return init_device_mesh("cpu", (1,))


# --- wrappers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_wrapper
def test_verbs_take_the_model_out_of_its_wrapper(wrap, tmp_path):
    model = tiny_vit()
    wrapped, expected = wrap(model).eval(), model(SEEN)
    for verb in (repavit_ops.reparameterize, repavit_ops.fuse):
        changed = verb(wrapped)
        assert type(changed) is VisionTransformer
        torch.testing.assert_close(changed(SEEN), expected, rtol=1e-4, atol=1e-5)
    assert len(repavit_ops.fusion_report(repavit_ops.fuse(wrapped)).fused) == 4
    repavit_ops.save_checkpoint(wrapped, tmp_path / "file.safetensors")
    torch.testing.assert_close(repavit_ops.load_checkpoint(tmp_path / "file.safetensors")(SEEN), expected)


@torch.no_grad()
@every_wrapper
def test_verify_compares_what_is_wrapped(wrap):
    model = tiny_vit(act_channels=None, depth=1)
    for reference, candidate in (
        (wrap(model).eval(), repavit_ops.fuse(model)),
        (model, wrap(repavit_ops.fuse(model)).eval()),
        (wrap(model).eval(), wrap(model).eval()),
    ):
        report = repavit_ops.verify(reference, candidate, SEEN)
        assert report
        assert report.output.max_abs < 1e-4
    wrong = copy.deepcopy(model)
    wrong.norm.weight.mul_(2)
    assert not repavit_ops.verify(wrap(model).eval(), wrap(wrong).eval(), SEEN)


@torch.no_grad()
def test_a_compiled_block_inside_a_model_is_fused():
    model = vanilla()
    expected = model(SEEN)
    model.blocks[0] = compiled(model.blocks[0])
    fused = repavit_ops.fuse(model, inplace=True)
    assert len(repavit_ops.fusion_report(fused).fused) == 4
    assert not any("_orig_mod" in name for name, _ in fused.named_modules())
    torch.testing.assert_close(fused(SEEN), expected, rtol=1e-4, atol=1e-5)


@every_wrapper
def test_small_verbs_look_into_wrappers(wrap):
    model = vanilla()
    for module in (model.blocks[0].mlp, model.blocks[0], nn.Linear(2, 2)):
        assert repavit_ops.can_fuse(wrap(module)) == repavit_ops.can_fuse(module)
    assert repavit_ops.can_fuse(model.blocks[0].mlp) is None
    assert models.complexity(wrap(model), 32) == models.complexity(model, 32)
    batches = [torch.randn(5, 6, 8) + 3, torch.randn(5, 6, 8)]
    plain, joined = joined_ffn(), joined_ffn()
    wrapped = wrap(joined)
    inner = given.unwrapped(wrapped)
    assert repavit_ops.set_join(wrapped, 0.5) == 1
    assert repavit_ops.JoinSchedule(wrapped, 10).step(9) == inner.join == 1.0
    assert repavit_ops.recalibrate_bn(wrapped, batches) == repavit_ops.recalibrate_bn(plain, batches) == 1
    assert torch.equal(inner.norm.running_mean, plain.norm.running_mean)
    with pytest.raises(ValueError, match="model: got Linear without joined branches"):
        repavit_ops.set_join(wrap(nn.Linear(2, 2)), 1.0)


@pytest.mark.parametrize(
    "given_as", ["deit_small", {"head.weight": torch.ones(1)}, SEEN], ids=["name", "state", "images"]
)
def test_what_is_no_module_is_refused_by_its_type(given_as):
    words = rf"model: got {type(given_as).__name__}, wanted a torch\.nn\.Module"
    verbs = (repavit_ops.fuse, repavit_ops.reparameterize, repavit_ops.fusion_report, repavit_ops.can_fuse)
    for verb in (*verbs, lambda model: repavit_ops.save_checkpoint(model, "file.safetensors")):
        with pytest.raises(TypeError, match=words):
            verb(given_as)
    with pytest.raises(TypeError, match=words.replace("model", "candidate", 1)):
        repavit_ops.verify(vanilla(), given_as, SEEN)


def joined_ffn() -> nn.Module:
    return randomise(repavit_ops.nn.JoinedBranchFFN(8, 12, 2, norm="batchnorm"))


@pytest.fixture(scope="module")
def idled():
    """A student of one block, and the model that it was made from."""
    teacher = tiny_vit(act_channels=None, depth=1)
    return idle(teacher, steps=0), teacher


@every_wrapper
def test_idling_takes_models_out_of_their_wrappers(wrap, idled):
    student, teacher = idled
    wrapped, plain = wrap(copy.deepcopy(student)), copy.deepcopy(student)
    expected = fidelity(teacher, student, [SEEN])
    assert fidelity(wrap(teacher), wrapped, [SEEN]) == expected
    trained = [
        (repavit_ops.distill_blocks(s, t, [SEEN], steps=2, progress=False),
         repavit_ops.distill(s, t, [SEEN], steps=1, progress=False))
        for s, t in ((plain, teacher), (wrapped, wrap(teacher)))
    ]  # fmt: skip
    assert trained[0] == trained[1]
    for p, other in zip(plain.parameters(), given.unwrapped(wrapped).parameters(), strict=True):
        assert torch.equal(p, other)


def test_a_student_of_several_processes_is_refused(idled, monkeypatch):
    """Their gradients would not be averaged; no second process is here, so the count plays one."""
    student, teacher = copy.deepcopy(idled[0]), idled[1]
    wrapped = compiled(DistributedDataParallel(student))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match=r"student: got DistributedDataParallel over 2 processes.*student\.module"):
        repavit_ops.distill(wrapped, teacher, [SEEN], steps=1, progress=False)


def verbs(model):
    yield lambda: repavit_ops.fuse(model)
    yield lambda: repavit_ops.reparameterize(model)
    yield lambda: repavit_ops.verify(model, vanilla(), SEEN)
    yield lambda: repavit_ops.cuda_graph(model)
    yield lambda: repavit_ops.save_checkpoint(model, "never_written.safetensors")
    yield lambda: repavit_ops.idle_pretrained(model, [SEEN], progress=False)
    yield lambda: repavit_ops.distill(model, vanilla(), [SEEN], steps=1, progress=False)
    yield lambda: repavit_ops.distill(vanilla(), model, [SEEN], steps=1, progress=False)
    yield lambda: repavit_ops.distill_blocks(vanilla(), model, [SEEN], progress=False)
    yield lambda: fidelity(model, vanilla(), [SEEN])


def sharded():
    yield "FullyShardedDataParallel", FullyShardedDataParallel(vanilla(), device_id=torch.device("cpu")).eval()
    yield "fully_shard at its root", fully_shard(vanilla(), mesh=mesh())
    part = vanilla()
    fully_shard(part.blocks[1], mesh=mesh())
    yield r"fully_shard at blocks\.1", part


def test_sharded_models_are_refused_with_how_to_gather_them():
    for place, model in sharded():
        message = rf"{place}.*get_model_state_dict"
        for verb in (*verbs(model), lambda m=model: models.complexity(m, 32)):
            with pytest.raises(ValueError, match=message):
                verb()
        assert re.search(message, repavit_ops.can_fuse(model))
        if place[0] == "F":
            with pytest.raises(ValueError, match=message):
                repavit_ops.fusion_report(model)


@pytest.mark.parametrize("shard", [FullyShardedDataParallel, fully_shard], ids=["flat", "each"])
def test_sharded_models_are_joined_and_recalibrated(shard):
    plain, batch = joined_ffn(), torch.randn(5, 6, 8) + 3
    options = {"mesh": mesh()} if shard is fully_shard else {"device_id": torch.device("cpu")}
    model = shard(joined_ffn(), **options)
    assert repavit_ops.set_join(model, 1.0) == repavit_ops.set_join(plain, 1.0) == 1
    assert repavit_ops.recalibrate_bn(model, [batch]) == repavit_ops.recalibrate_bn(plain, [batch]) == 1
    means = [b for name, b in model.named_buffers() if name.endswith("running_mean")]
    torch.testing.assert_close(means, [plain.norm.running_mean])
    torch.testing.assert_close(model(batch), plain(batch))


# --- weights that cannot be folded ------------------------------------------------------------------------------------


class Scaled(Tensor):
    """A quantised weight as libraries make them: a tensor class of its own, unpacked where it is used."""

    @staticmethod
    def __new__(cls, data: Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data: Tensor) -> None:
        self.stored = data.half()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].stored.float())
        unpacked = torch.utils._pytree.tree_map_only(cls, lambda t: t.stored.float(), (args, kwargs or {}))
        return function(*unpacked[0], **unpacked[1])


KINDS = {
    "quantised": lambda w: Scaled(w),
    "sharded": lambda w: distribute_tensor(w, mesh(), [Shard(0)]),
    "replicated": lambda w: distribute_tensor(w, mesh(), [Replicate()]),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_weights_of_another_class_are_skipped_with_the_reason(kind):
    model = vanilla()
    for block in model.blocks:
        block.mlp.fc1.weight = nn.Parameter(kind(block.mlp.fc1.weight.detach()), requires_grad=False)
    fused = repavit_ops.fuse(model, inplace=True)
    report = repavit_ops.fusion_report(fused)
    assert [entry.kind for entry in report.fused] == ["rep_attention"] * 2
    assert len(report.skipped) == 2
    for entry in report.skipped:
        assert "fc1.weight is a " in entry.note
        assert "fuse before weights are quantised" in entry.note
    assert "MiB" in str(report)


def test_training_forms_with_such_weights_stay_too():
    model = tiny_vit()
    model.blocks[0].mlp.fc1.weight = nn.Parameter(Scaled(model.blocks[0].mlp.fc1.weight.detach()), requires_grad=False)
    fused = repavit_ops.fuse(model, inplace=True)
    assert type(fused.blocks[0].mlp) is repavit_ops.nn.ChannelIdleFFN
    assert type(fused.blocks[1].mlp) is repavit_ops.nn.PartialGELUFFN


@torch.no_grad()
def test_torchao(timm):
    quantization = pytest.importorskip("torchao.quantization")
    model = randomise(timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=64, num_heads=2, img_size=32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    fused = repavit_ops.fuse(model)
    torch.testing.assert_close(fused(SEEN), model(SEEN), rtol=1e-4, atol=1e-5)
    assert all("torchao" in entry.note for entry in repavit_ops.fusion_report(fused).skipped)


def test_a_linear_that_is_not_pytorchs_is_told_from_it(timm):
    """Dynamic quantisation puts classes in place that are called Linear as well."""

    class Linear(nn.Linear):
        pass

    model = randomise(timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=64, num_heads=2, img_size=32))
    model.blocks[0].mlp.fc1.__class__ = Linear
    notes = [entry.note for entry in repavit_ops.fusion_report(repavit_ops.fuse(model)).skipped]
    assert any(f"{Linear.__module__}.Linear, wanted nn.Linear" in note for note in notes)


def test_what_cannot_be_copied_says_what_to_do():
    model = vanilla()
    prune.l1_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)
    with torch.enable_grad():
        model(SEEN)
    with pytest.raises(ValueError, match=r"cannot be copied.*prune\.remove.*inplace=True"):
        repavit_ops.fuse(model)
    prune.remove(model.blocks[0].mlp.fc1, "weight")
    repavit_ops.fuse(model)


@torch.no_grad()
def test_parametrised_weights_stay():
    model = vanilla()
    parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    fused = repavit_ops.fuse(model)
    torch.testing.assert_close(fused(SEEN), model(SEEN), rtol=1e-4, atol=1e-5)
    assert len(repavit_ops.fusion_report(fused).skipped) == 1


# --- devices ----------------------------------------------------------------------------------------------------------


def test_models_without_values_are_refused():
    whole = vanilla().to("meta")
    part = vanilla()
    part.blocks[1].to("meta")
    for model in (whole, part):
        for verb in (v for v in verbs(model) if "cuda_graph" not in v.__code__.co_names):
            with pytest.raises(ValueError, match=r"on the meta device.*load_state_dict\(state, assign=True\)"):
                verb()
    assert len(repavit_ops.fusion_report(whole).skipped) == 4


@torch.no_grad()
def test_folds_leave_devices_that_may_lack_float64(monkeypatch):
    """No such device is here, so the CPU plays one: the model must go to one that is exact and come back."""
    moves = []
    to = nn.Module.to
    monkeypatch.setattr(given, "EXACT_DEVICES", ("cuda",))
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kw: moves.append(args) or to(self, *args, **kw))
    model = tiny_vit()
    for verb in (repavit_ops.fuse, repavit_ops.reparameterize):
        moves.clear()
        torch.testing.assert_close(verb(model)(SEEN), model(SEEN), rtol=1e-4, atol=1e-5)
        assert [str(device) for (device,) in moves] == ["cpu", "cpu"]
    moves.clear()
    assert repavit_ops.verify(model, repavit_ops.fuse(model), SEEN)
    assert moves.count(("cpu",)) == 2


# --- what PyTorch does to modules -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("keep_unpacked", [True, False])
def test_parameters_may_be_swapped(swapping, keep_unpacked):
    """torch.__future__.set_swap_module_params_on_conversion swaps only what nobody else holds."""
    fused, other = (repavit_ops.fuse(tiny_vit(seed), keep_unpacked=keep_unpacked) for seed in (0, 1))
    expected = fused(SEEN)
    torch.testing.assert_close(fused.double()(SEEN.double()).float(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.float()(SEEN), expected, rtol=1e-4, atol=1e-5)
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(SEEN), other(SEEN))


@pytest.mark.parametrize("verb", [repavit_ops.fuse, repavit_ops.reparameterize])
def test_the_state_dict_of_an_unfused_model_is_refused_in_a_sentence(verb):
    model = tiny_vit()
    changed = verb(model)
    with pytest.raises(RuntimeError, match=r"of a model that is neither; load it into the model before") as caught:
        changed.load_state_dict(model.state_dict())
    assert len(str(caught.value)) < 350
    found = changed.load_state_dict(model.state_dict(), strict=False)
    assert found.missing_keys == [given.UNFUSED]
    assert not found.unexpected_keys
    changed.load_state_dict(changed.state_dict())
    changed.load_state_dict({"head.bias": torch.zeros(10)}, strict=False)
    for half in (changed.blocks[0].mlp, model.blocks[0].mlp):
        half.load_state_dict(half.state_dict())
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="merged or fused"):
        changed.blocks[0].mlp.load_state_dict(model.blocks[0].mlp.state_dict())


def test_synchronised_batchnorm_is_refused_by_name():
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    with pytest.raises(TypeError, match=r"norm1: got nn\.SyncBatchNorm in place of TokenBatchNorm.*recalibrate_bn"):
        convert(tiny_vit())
    attention = repavit_ops.nn.Attention(8, 2, norm=repavit_ops.nn.RepBN)
    with pytest.raises(TypeError, match=r"in place of RepBN, which has its channels last and adds alpha x"):
        convert(attention)
    joined = repavit_ops.create_model(
        "joined_vit_tiny_4", img_size=32, num_classes=3, norm="batchnorm", embed_dim=48, depth=1
    )
    with pytest.raises(TypeError, match=r"in place of TokenBatchNorm"):
        convert(joined)
    assert isinstance(convert(nn.Sequential(nn.BatchNorm2d(3)))[0], nn.SyncBatchNorm)
