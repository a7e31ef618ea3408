"""Models of transformers, torchvision, open_clip and PyTorch, small: what fuses, and that outputs are equal.

The rows are those of docs/coverage.md (bench/coverage_more.py), which ``make coverage`` makes at published sizes.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from coverage import outcome, randomise, run
from coverage_models import FFN, NOTHING, WHOLE
from coverage_more import ROWS
from coverage_towers import TOWERS
from model_helpers import Recorder
from torch import nn

import repavit_ops
from repavit_ops import backends
from repavit_ops.nn.given import cast_real
from repavit_ops.stack import LoopedBlocks

needs_cpp = pytest.mark.skipif(
    backends.why_unavailable("cpp") is not None, reason=f"no C++ kernels: {backends.why_unavailable('cpp')}"
)


# whose own softmax (GIT), RMSNorm or rotation is in float32 always
FLOAT32_INSIDE = ("GIT", "AIMv2", *(name for name in TOWERS if not name.startswith(("V-JEPA", "Phi-4"))))


@pytest.fixture(autouse=True)
def libraries(request, torchvision_stub):
    """The library of a test's row, or a visible skip."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name is not None:
        pytest.importorskip(ROWS[name].library)


@pytest.mark.filterwarnings("ignore:repavit_ops.fuse. nothing fuses")
@pytest.mark.parametrize("name", ROWS)
def test_fused_equals_the_original_and_the_report_names_the_rest(name):
    row = ROWS[name]
    result = outcome(row, published=False)
    assert result.passed, result.errors
    assert (result.fused == 0) == (row.fuses == NOTHING)
    if row.fuses == WHOLE:
        assert not result.skipped, result.reasons
    else:
        assert row.fuses in (FFN, NOTHING)
        assert result.skipped > 0
    assert all(any(word in reason for reason in result.reasons) for word in row.skipped), result.reasons
    assert all(any(word in reason for word in row.skipped) for reason in result.reasons), result.reasons


def built(name, dtype=torch.float64):
    """A row's model and its inputs."""
    model = cast_real(randomise(ROWS[name].build(False)), dtype)
    args, kwargs = ROWS[name].inputs(False)
    return model, args, kwargs


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.fuses != NOTHING])
def test_folds_are_exact_and_fused_models_copy_pickle_and_fuse_again(name):
    model, args, kwargs = built(name)
    expected = run(model, args, kwargs, torch.float64)
    fused = repavit_ops.fuse(model)
    ours = run(fused, args, kwargs, torch.float64)
    for a, b in zip(ours, expected, strict=True):
        close = 2e-6 if name in FLOAT32_INSIDE else 1e-10
        torch.testing.assert_close(a, b, rtol=close, atol=close)
    again = [copy.deepcopy(fused), repavit_ops.fuse(fused)]
    if not any(m._forward_hooks for m in fused.modules()):  # recorders of transformers cannot be pickled
        again.append(pickle.loads(pickle.dumps(fused)))
    for other in again:
        assert type(other) is type(fused)
        for a, b in zip(run(other, args, kwargs, torch.float64), ours, strict=True):
            assert torch.equal(a, b)


@torch.no_grad()
@needs_cpp
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("ViT", ["patch_projection", "fused_blocks"]),
        ("DINOv2", ["patch_projection", "fused_blocks"]),
        ("CLIP vision", ["patch_projection", "fused_blocks"]),
        ("Swin", ["patch_projection", "fused_blocks"] * 2),
        ("BLIP", ["patch_projection", "fused_blocks"]),
        ("torchvision vit", ["patch_projection", "fused_blocks"]),
        ("torchvision swin", ["patch_projection", "fused_blocks"] * 2),
    ],
)
def test_an_encoder_is_one_call(name, calls):
    model, args, kwargs = built(name, torch.float32)
    fused = repavit_ops.fuse(model)
    with Recorder() as recorder:
        ours = run(fused, args, kwargs, torch.float32)
    assert [call.split("::")[1] for call in recorder.calls if call.startswith("repavit_ops::")] == calls
    apart = repavit_ops.fuse(model)
    for module in apart.modules():
        module.register_forward_hook(lambda *_: None)
    for a, b in zip(run(apart, args, kwargs, torch.float32), ours, strict=True):
        assert torch.equal(a, b)


def test_lists_of_layers_stay_lists_outside_their_encoders_forward():
    model, _, _ = built("torch.nn.TransformerEncoder", torch.float32)
    fused = repavit_ops.fuse(model)
    assert isinstance(fused.layers, LoopedBlocks)
    assert isinstance(fused.layers, nn.ModuleList)
    assert [type(layer) for layer in fused.layers] == [type(fused.layers[0])] * 2
    assert all(isinstance(layer, nn.TransformerEncoderLayer) for layer in fused.layers)
    assert len(fused.layers[:1]) == 1
    assert isinstance(fused, nn.TransformerEncoder)


@torch.no_grad()
def test_a_hook_that_joins_later_is_called():
    model, args, _ = built("torch.nn.TransformerEncoder", torch.float32)
    fused = repavit_ops.fuse(model)
    before = fused(*args)
    seen = []
    fused.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(fused(*args), before)
    assert seen == [1]


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_encoders_compile_without_graph_breaks(backend):
    model, args, _ = built("torch.nn.TransformerEncoder", torch.float32)
    fused = repavit_ops.fuse(model)
    with torch.no_grad():
        expected = fused(*args)
        compiled = torch.compile(fused, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(*args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@torch.no_grad()
def test_masks_of_pytorchs_encoder_layer(kind, batch_first):
    options = {"activation": "gelu", "norm_first": True, "batch_first": batch_first}
    layer = randomise(nn.TransformerEncoderLayer(24, 3, 48, **options)).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = 5 if batch_first else 2
    mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    if kind == "float":
        mask = torch.randn(2 * 3 if batch_first else 5 * 3, tokens, tokens, dtype=torch.float64)
    expected = layer(x, src_mask=mask, is_causal=kind == "causal")
    fused = repavit_ops.fuse(layer)
    torch.testing.assert_close(fused(x, src_mask=mask, is_causal=kind == "causal"), expected)
    assert not torch.allclose(fused(x), expected)
    one = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(fused(one), layer(one))


def test_what_an_encoder_layer_must_be():
    for options, word in (
        ({"norm_first": False}, "norms stand behind the shortcuts"),
        ({"activation": "relu"}, "ReLU"),
        ({"activation": torch.tanh}, "function"),
    ):
        layer = nn.TransformerEncoderLayer(8, 2, 16, **{"norm_first": True, "activation": "gelu", **options}).eval()
        assert word in repavit_ops.can_fuse(layer)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", norm_first=True).eval()
    layer.self_attn.bias_k = nn.Parameter(torch.zeros(1, 1, 8))
    assert "add_bias_kv" in repavit_ops.can_fuse(layer)


def test_a_model_of_which_nothing_fuses_is_told_why():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

    model = nn.Sequential(Tower(), nn.TransformerDecoderLayer(8, 2, 16)).eval()
    with pytest.warns(UserWarning, match="nothing fuses; looked at .*TransformerDecoderLayer"):
        fused = repavit_ops.fuse(model)
    report = repavit_ops.fusion_report(fused)
    assert not report.fused
    assert "TransformerEncoderLayer" in report.nothing
    assert report.nothing in str(report)


def test_another_version_is_named(monkeypatch):
    transformers = pytest.importorskip("transformers")
    model, _, _ = built("ViT", torch.float32)
    monkeypatch.setattr(transformers, "__version__", "4.57.0")
    from repavit_ops.fusing.families.transformers import TRANSFORMERS

    TRANSFORMERS._rules.clear()
    try:
        assert f"transformers 4.57.0 is installed; its blocks are known from {TRANSFORMERS.oldest}" in (
            repavit_ops.can_fuse(model.layers[0]) or ""
        )
    finally:
        TRANSFORMERS._rules.clear()
