"""Layers whose rotary tables come in a form of their own, or which are causal by themselves: what callers see."""

from __future__ import annotations

import copy

import pytest
import torch
from coverage import randomise, require_varied, run
from coverage_more import ROWS
from coverage_towers import TURNED_ROWS
from model_helpers import Recorder, relative

import repavit_ops
from repavit_ops import backends
from repavit_ops.nn.given import cast_real
from repavit_ops.nn.rotary_layers import tables_of_complex, video_tables

transformers = pytest.importorskip("transformers")
needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)
FUSED = [name for name in TURNED_ROWS if name != "InternVL, QK-norm"]


@pytest.fixture(autouse=True)
def _stub(torchvision_stub):
    transformers.logging.set_verbosity_error()


def pair(name):
    """A row's model, the fused one, and the arguments of both."""
    model = randomise(ROWS[name].build(False))
    args, kwargs = ROWS[name].inputs(False)
    return model, repavit_ops.fuse(model), args, kwargs


def alike(name, model, fused, args, kwargs, close=1e-5):
    for a, b in zip(*(run(m, args, kwargs, torch.float32) for m in (fused, model)), strict=True):
        assert relative(a, b) < close, name


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_hidden_states_and_attentions_are_as_the_unfused_model_answers(name):
    model, fused, args, kwargs = pair(name)
    both = {"output_hidden_states": True, "output_attentions": True}
    for options in ({"output_hidden_states": True}, both):  # Llama 4 fails where attentions alone are asked for
        ours, expected = (m(*args, **kwargs, **options) for m in (fused, model))
        assert type(ours) is type(expected)
        assert list(ours) == list(expected)
        assert ours.get("attentions") == expected.get("attentions")  # SDPA has none
        for a, b in zip(ours.get("hidden_states") or (), expected.get("hidden_states") or (), strict=True):
            assert relative(a, b) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_attention_fuses_alone_where_its_layer_stays(name):
    model, _, args, kwargs = pair(name)
    names = [n for n, _ in model.named_modules() if n.endswith(("layer.0", "layers.0"))]
    for layer in names:
        model.get_submodule(layer).register_forward_hook(lambda *_: None)
    fused = repavit_ops.fuse(model)
    entries = repavit_ops.fusion_report(fused).fused
    attentions = [entry.name for entry in entries if entry.kind == "rep_attention"]
    assert all(any(name.startswith(f"{layer}.") for name in attentions) for layer in names), attentions
    alike(name, model, fused, args, kwargs)


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_eager_attention_stays_and_ffns_fuse(name):
    model, _, args, kwargs = pair(name)
    model.set_attn_implementation("eager")
    fused = repavit_ops.fuse(model)
    report = repavit_ops.fusion_report(fused)
    assert report.fused
    assert any("set_attn_implementation('sdpa')" in entry.note for entry in report.skipped)
    alike(name, model, fused, args, kwargs)


@torch.no_grad()
@needs_cpp
@pytest.mark.parametrize(("name", "calls"), [("V-JEPA 2", 2), ("MLCD", 1), ("Pixtral", 1)])
def test_an_encoder_is_one_call(name, calls):
    _, fused, args, kwargs = pair(name)
    fused(*args, **kwargs)
    with Recorder() as recorder:
        fused(*args, **kwargs)
    names = [call.split("::")[1] for call in recorder.calls if call.startswith("repavit_ops::")]
    assert [call for call in names if call != "patch_projection"] == ["fused_blocks"] * calls


@pytest.mark.parametrize("name", ["V-JEPA 2, masked", "MLCD", "Llama 4 vision", "SAM 3, padded windows"])
def test_gradients_are_those_of_the_original(name):
    model, fused, (x, *_), kwargs = pair(name)
    gradients = []
    for m in (model, fused):
        leaf = x.clone().requires_grad_(True)
        out = m(leaf, **kwargs)
        sum(t.square().mean() for t in run(lambda _out=out: _out, (), {}, torch.float32)).backward()
        gradients.append(leaf.grad)
    assert relative(*gradients) < 1e-4


def test_the_class_tokens_place_learns_on():
    """MLCD turns its class token by a parameter, which stays one: the operator differentiates its tables."""
    model, fused, args, kwargs = pair("MLCD")
    for m in (model, fused):
        m.class_pos_emb.requires_grad_(True)
        m(*args, **kwargs).last_hidden_state.square().mean().backward()
    assert model.class_pos_emb.grad.abs().max() > 1e-6
    assert relative(fused.class_pos_emb.grad, model.class_pos_emb.grad) < 1e-3


@torch.no_grad()
def test_mlcd_takes_other_image_sizes():
    model, fused, _, kwargs = pair("MLCD")
    x = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    alike("MLCD", model, fused, (x,), kwargs)


# --- V-JEPA 2 ---------------------------------------------------------------------------------------------------------


def test_video_tables_are_the_models():
    model = randomise(ROWS["V-JEPA 2"].build(False)).double()
    attention = model.encoder.layer[0].attention
    q = torch.randn(2, 3, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    places = torch.stack((torch.arange(9) * 3, torch.arange(9).flip(0)))
    for mask in (None, places):
        x = torch.zeros(2, 9, 48, dtype=torch.float64)
        expected = attention.apply_rotary_embeddings(q, attention.get_position_ids(x, mask))
        cos, sin = video_tables(x, mask, attention.grid_size, attention.d_dim)
        turned = repavit_ops.reference.rotate(q, cos, sin, "interleaved")
        torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(cos[..., 0], cos[..., 1])  # the two of a pair turn by different angles


@torch.no_grad()
def test_videos_longer_and_shorter_than_configured():
    model, fused, _, kwargs = pair("V-JEPA 2")
    for frames in (1, 2, 8):
        x = torch.randn(1, frames, 3, 32, 32, generator=torch.Generator().manual_seed(frames))
        alike("V-JEPA 2", model, fused, (x,), kwargs)


# --- Llama 4 ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_llama_4_cast_by_pytorch_has_lost_its_sines_and_the_fused_one_does_as_it():
    """``model.to(dtype)`` casts complex buffers to their real part: what turned then scales. fuse(dtype=…) does not."""
    model, _, args, kwargs = pair("Llama 4 vision")
    right = run(model, args, kwargs, torch.float32)
    with pytest.warns(UserWarning, match="discards the imaginary part"):
        lost = copy.deepcopy(model).to(torch.float32)
    wrong = run(lost, args, kwargs, torch.float32)
    assert relative(wrong[0], right[0]) > 1e-2
    assert relative(run(repavit_ops.fuse(lost), args, kwargs, torch.float32)[0], wrong[0]) < 1e-5
    narrow = repavit_ops.fuse(model, dtype=torch.bfloat16)
    assert narrow.rotary_embedding.freqs_ci.is_complex()
    kept = run(narrow, args, kwargs, torch.bfloat16)
    assert relative(kept[0].float(), right[0]) < 0.1
    eager = run(cast_real(copy.deepcopy(model), torch.bfloat16), args, kwargs, torch.bfloat16)
    assert relative(eager[0].float(), right[0]) < 0.1


def test_complex_turns_are_cosines_and_sines_of_pairs():
    angles = torch.randn(5, 4)
    cos, sin = tables_of_complex(torch.polar(torch.ones(5, 1, 4), angles[:, None]))
    torch.testing.assert_close(cos, angles.cos().repeat_interleave(2, -1))
    torch.testing.assert_close(sin, angles.sin().repeat_interleave(2, -1))


# --- Phi-4 ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_phi_4_is_causal_in_batches_without_padding_alone():
    """transformers gives no mask where none is padded, and its attention says is_causal: so does the fused one."""
    model, fused, (x, *_), _ = pair("Phi-4 vision")
    later = x.clone()
    later[:, :, -8:, -8:] += 1  # the last patch
    for m in (model, fused):
        first, second = m(x).last_hidden_state, m(later).last_hidden_state
        assert torch.equal(first[:, 0], second[:, 0])
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = False
    for m in (model, fused):
        first, second = (m(y, patch_attention_mask=mask).last_hidden_state for y in (x, later))
        assert not torch.equal(first[:, 1], second[:, 1])
    alike("Phi-4", model, fused, (x,), {"patch_attention_mask": mask})


@torch.no_grad()
def test_phi_4_is_as_the_original_under_compile_where_that_is_not_causal():
    """Under torch.compile transformers makes the mask that it leaves out otherwise, and outputs differ."""
    model, fused, args, kwargs = pair("Phi-4 vision")
    compiled = run(torch.compile(model, backend="eager"), args, kwargs, torch.float32)
    assert relative(compiled[0], run(model, args, kwargs, torch.float32)[0]) > 0.1
    assert relative(run(torch.compile(fused, backend="eager"), args, kwargs, torch.float32)[0], compiled[0]) < 1e-5


# --- what checks must not take ----------------------------------------------------------------------------------------


def test_outputs_of_one_number_are_no_check():
    require_varied([torch.arange(3.0), torch.tensor(1.0)])
    with pytest.raises(ValueError, match="outputs: got tensor 1 of 2 is 0 everywhere, wanted floating tensors"):
        require_varied([torch.arange(3.0), torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="outputs: got none"):
        require_varied([])
