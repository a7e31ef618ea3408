"""Vision towers of images of many sizes in one sequence: every class of theirs, every grid; what is refused."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from coverage import randomise, run
from coverage_more import ROWS
from coverage_towers import PACKED_ROWS
from model_helpers import Recorder, relative
from torch import nn

import repavit_ops
from repavit_ops import backends
from repavit_ops.fusing.families.transformers_names import KIMI_LIKE, OMNI_LIKE, PACKED_LIKE, VIDEO_LLAMA_LIKE
from repavit_ops.nn.given import cast_real
from repavit_ops.nn.packed_sequences import begins_of, packing

transformers = pytest.importorskip("transformers")
needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
GROUPS = {**PACKED_LIKE, **OMNI_LIKE, **KIMI_LIKE, **VIDEO_LLAMA_LIKE}
LENGTHS = {
    "equal": [6, 6, 6],
    "one": [18],
    "adjacent": [4, 4, 10],
    "scattered": [4, 9, 4, 1],
    "empty": [0, 12, 0, 6],
    "all_other": [1, 2, 3, 5, 7],
}


@pytest.fixture(autouse=True)
def _stub(torchvision_stub):
    transformers.logging.set_verbosity_error()


def begins(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def turns(tokens, width=8, dtype=torch.float32):
    angles = torch.randn(tokens, width // 2, generator=torch.Generator().manual_seed(5)).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def attention_of(module):
    """A module's attention of packed sequences, alone."""
    path = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config = SimpleNamespace(
        **{"hidden_size": 32, "embed_dim": 32, "num_heads": 4, "num_attention_heads": 4, "attention_bias": True},
        **{"attention_dropout": 0.0, "rms_norm_eps": 1e-5, "_attn_implementation": "sdpa"},
    )
    return randomise(getattr(path, GROUPS[module][1])(config))


class Holder(nn.Module):
    """Something that calls an attention, with the arguments that towers pass."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x, **kwargs):
        return self.attn(x, max_seqlen=None, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("module", GROUPS)
def test_every_attention_attends_within_its_sequences(module, lengths):
    attention = Holder(attention_of(module)).eval()
    x = torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(1))
    given = {"cu_seqlens": begins(lengths), "position_embeddings": turns(sum(lengths))}
    fused = repavit_ops.fuse(attention)
    assert len(repavit_ops.fusion_report(fused).fused) == 1
    ours = fused(x, **given)
    expected = attention(x, **{**given, "cu_seqlens": begins(filter(None, lengths))})  # it fails at empty sequences
    assert type(ours) is type(expected)
    ours, expected = (y[0] if isinstance(y, tuple) else y for y in (ours, expected))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def tower(name, dtype=torch.float32):
    args, kwargs = ROWS[name].inputs(False)
    return randomise(ROWS[name].build(False)), args, kwargs


GRIDS = {
    "one": [[1, 4, 4]],
    "one_block": [[1, 2, 2]],
    "windows_overhang": [[1, 6, 10]],
    "two_sizes": [[1, 4, 4], [1, 6, 2]],
    "sizes_by_turns": [[1, 4, 4], [1, 2, 6], [1, 4, 4], [1, 2, 6]],
    "video": [[3, 4, 4]],
    "video_and_image": [[2, 4, 6], [1, 8, 8]],
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "GLM-OCR"])
def test_towers_at_every_grid(name, grid, dtype):
    """max|ours - fp64| <= 2 max|eager - fp64| + 1e-6, for each tensor that is returned."""
    model, (patches, _), _ = tower(name)
    grid = torch.tensor(grid)
    x = torch.randn(int(grid.prod(-1).sum()), patches.shape[1], generator=torch.Generator().manual_seed(2))
    args = (x.to(dtype), grid)
    exact = run(copy.deepcopy(model).double(), args, {}, torch.float64)
    eager = run(cast_real(copy.deepcopy(model), dtype), args, {}, dtype)
    ours = run(repavit_ops.fuse(model, dtype=dtype), args, {}, dtype)
    for a, b, t in zip(ours, eager, exact, strict=True):
        assert (a.double() - t).abs().max() <= 2 * (b.double() - t).abs().max() + 1e-6


@torch.no_grad()
@needs_cpp
@pytest.mark.parametrize(("grid", "calls"), [("one", 1), ("video", 1), ("two_sizes", 2), ("sizes_by_turns", 2)])
def test_a_tower_is_one_call_for_each_length(grid, calls):
    model, (patches, _), _ = tower("Qwen2-VL")
    grid = torch.tensor(GRIDS[grid])
    args = (torch.randn(int(grid.prod(-1).sum()), patches.shape[1]), grid)
    fused = repavit_ops.fuse(model)
    fused(*args)
    with Recorder() as recorder:
        together = fused(*args)
    names = [call.split("::")[1] for call in recorder.calls if call.startswith("repavit_ops::")]
    assert names == ["fused_blocks"] * calls
    for module in fused.blocks:
        module.register_forward_hook(lambda *_: None)
    for a, b in zip(run(fused, args, {}, torch.float32), run(lambda *_: together, (), {}, torch.float32), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
@needs_cpp
def test_windows_are_a_call_for_each_length_and_no_mask():
    model, (patches, _), _ = tower("Qwen2.5-VL")
    grid = torch.tensor([[1, 10, 10]])  # windows of 16 tokens, 8 at two edges, 4 in the corner
    fused = repavit_ops.fuse(model)
    with Recorder() as recorder:
        fused(torch.randn(100, patches.shape[1]), grid)
    names = [call.split("::")[1] for call in recorder.calls if call.startswith("repavit_ops::")]
    assert names == [*["rep_attention"] * 3, "gated_ffn", "rep_attention", "gated_ffn"]  # the second sees the image


def test_gradients_are_those_of_the_original():
    for name in ("Qwen2.5-VL", "GLM-OCR"):
        model, (x, grid), _ = tower(name)
        gradients = []
        for m in (model.double(), repavit_ops.fuse(model)):
            leaf = x.double().requires_grad_(True)
            m(leaf, grid).pooler_output.square().sum().backward()
            gradients.append(leaf.grad)
        assert relative(*gradients) < 1e-5, name


@torch.no_grad()
@pytest.mark.parametrize("name", PACKED_ROWS)
def test_hidden_states_are_as_the_unfused_model_answers(name):
    model, args, kwargs = tower(name)
    fused = repavit_ops.fuse(model)
    ours, expected = (m(*args, **kwargs, output_hidden_states=True) for m in (fused, model))
    assert type(ours) is type(expected)
    assert list(ours) == list(expected)
    assert len(ours.get("hidden_states") or ()) == len(expected.get("hidden_states") or ())
    for a, b in zip(ours.get("hidden_states") or (), expected.get("hidden_states") or (), strict=True):
        assert relative(a, b) < 1e-5


@torch.no_grad()
def test_what_the_tower_gives_as_attentions_is_refused():
    """Unfused, its "attentions" are outputs of the attention, [T, C]: SDPA has no maps, and it returns no tuple."""
    model, args, _ = tower("Qwen2-VL")
    assert [tuple(t.shape) for t in model(*args, output_attentions=True).attentions] == [(args[0].shape[0], 64)] * 2
    fused = repavit_ops.fuse(model)
    with pytest.raises(RuntimeError, match="has no attention maps; ask the model for them before fusing"):
        fused(*args, output_attentions=True)
    fused(*args)


@torch.no_grad()
def test_eager_attention_stays_and_ffns_fuse():
    model, args, _ = tower("Qwen2-VL")
    eager = randomise(type(model)._from_config(model.config, attn_implementation="eager"))
    fused = repavit_ops.fuse(eager)
    report = repavit_ops.fusion_report(fused)
    assert len(report.fused) == 2
    assert all("set_attn_implementation('sdpa')" in entry.note for entry in report.skipped)
    for a, b in zip(*(run(m, args, {}, torch.float32) for m in (fused, eager)), strict=True):
        assert relative(a, b) < 1e-5


@torch.no_grad()
def test_a_block_whose_ffn_stays_still_attends_within():
    model, args, _ = tower("Qwen2-VL")
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    fused = repavit_ops.fuse(model)
    assert len(repavit_ops.fusion_report(fused).fused) == 3
    for a, b in zip(*(run(m, args, {}, torch.float32) for m in (fused, model)), strict=True):
        assert relative(a, b) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 5])}, r"cu_seqlens: got \[0, 4, 5\] for 6 tokens, wanted where each"),
        ({"cu_seqlens": torch.tensor([2, 6])}, "cu_seqlens: got"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 6])}, "cu_seqlens: got"),
        ({"cu_seqlens": torch.tensor([6])}, "cu_seqlens: got"),
        ({"position_embeddings": None}, r"position_embeddings: got None, wanted \(cos, sin\)"),
    ],
    ids=["short", "late", "backwards", "no_sequence", "no_tables"],
)
def test_bad_arguments_are_named(change, message):
    fused = repavit_ops.fuse(tower("Qwen2-VL")[0])
    given = {"cu_seqlens": torch.tensor([0, 4, 6]), "position_embeddings": turns(6, 16)}
    fused.blocks[0](torch.randn(6, 64), **given)
    with pytest.raises(ValueError, match=message):
        fused.blocks[0](torch.randn(6, 64), **{**given, **change})


def test_packing_takes_apart_and_restores():
    x = torch.arange(18.0)[:, None]
    for lengths in LENGTHS.values():
        packed = packing(x[: sum(lengths)], begins(lengths))
        parts = packed.arranged(x[: sum(lengths)])
        assert sorted({n for n in lengths if n}) == sorted(part.shape[1] for part in parts)
        for part in parts:
            assert all(torch.equal(row[:, 0], torch.arange(row[0, 0], row[0, 0] + len(row))) for row in part)
        assert torch.equal(packed.restored(parts), x[: sum(lengths)])


# --- masks that part a sequence ---------------------------------------------------------------------------------------


def test_masks_of_blocks_are_read_and_others_are_not():
    image = torch.tensor([0, 0, 0, 1, 1, 2])
    attends = image[:, None] == image
    lowest = torch.finfo(torch.bfloat16).min
    for mask in (attends, torch.zeros(6, 6, dtype=torch.bfloat16).masked_fill(~attends, lowest)):
        assert begins_of(mask[None, None]).tolist() == [0, 3, 5, 6]
    assert begins_of(torch.zeros(1, 1, 4, 4)).tolist() == [0, 4]
    assert begins_of(attends.expand(2, 1, 6, 6)) is None  # one for each of two images
    assert begins_of(torch.zeros(6, 6).masked_fill(~attends, -100.0)) is None  # lets a little through
    assert begins_of(torch.ones(6, 6, dtype=torch.bool).tril()) is None
    again = torch.tensor([0, 1, 0, 1, 1, 2])  # not one after the other
    assert begins_of(again[:, None] == again) is None
    assert begins_of(attends & (torch.arange(6) != 5)) is None  # a token that sees none


@torch.no_grad()
@needs_cpp
def test_pixtrals_images_are_a_call_each():
    model, args, kwargs = tower("Pixtral, two sizes")
    fused = repavit_ops.fuse(model)
    for sizes, calls in (([[32, 24], [24, 32]], 1), ([[32, 32], [24, 16]], 2)):  # 12 and 12 patches; 16 and 6
        kwargs = {"image_sizes": torch.tensor(sizes)}
        fused(*args, **kwargs)
        with Recorder() as recorder:
            ours = fused(*args, **kwargs)[0]
        assert [c for c in recorder.calls if "fused_blocks" in c] == ["repavit_ops::fused_blocks"] * calls
        assert relative(ours, model(*args, **kwargs)[0]) < 1e-5


@torch.no_grad()
def test_pixtrals_layers_take_other_masks():
    model, _, _ = tower("Pixtral")
    fused = repavit_ops.fuse(model)
    x = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(3))
    causal = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    for mask in (None, causal, causal.isinf().logical_not(), torch.randn(1, 1, 6, 6)):
        given = {"attention_mask": mask, "position_embeddings": turns(6, 12)}
        ours, expected = (m.transformer(x, **given).last_hidden_state for m in (fused, model))
        assert relative(ours, expected) < 1e-5
