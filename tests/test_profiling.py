"""repavit_ops.profiling: every product of a model is found, under its part, in every form and library. No times."""

from __future__ import annotations

import io
import json

import pytest
import torch
from model_helpers import images, randomise, tiny_swin, tiny_vit
from torch import nn
from typer.testing import CliRunner

import repavit_ops
from repavit_ops import backends
from repavit_ops.cli import app
from repavit_ops.profiling import Part, Profile, profile, profile_forms, report
from repavit_ops.profiling.parts import PARTS

KERNELS = backends.why_unavailable("cpp") is None
B, T, C, HIDDEN, DEPTH, M = 2, 17, 48, 192, 2, 48
ROWS = B * T * DEPTH
EMBEDDING = 2 * B * 16 * C * 192
ATTENTION = {
    "attention: qkv": 2 * ROWS * C * 3 * C,
    "attention: core": 2 * ROWS * T * 2 * C,
    "attention: proj": 2 * ROWS * C * C,
}
FFN = {"FFN: in": 2 * ROWS * C * HIDDEN, "FFN: out": 2 * ROWS * C * HIDDEN}
MERGED = dict.fromkeys(("FFN: in", "FFN: out", "FFN: merged"), 2 * ROWS * C * M)
HEAD = {"rest": 2 * B * C * 10}
WHOLE = {"patch embedding": EMBEDDING, **ATTENTION}


def found(model, x, **options):
    """Part → floating-point operations, of parts that have any."""
    result = profile(model, x, seconds=0.0, **options)
    assert sum(part.seconds for part in result.parts) == pytest.approx(result.seconds)
    assert all(part.seconds > 0 and part.name in PARTS for part in result.parts)
    return {part.name: part.flops for part in result.parts if part.flops}


def vanilla():
    return tiny_vit(idle_ratio=None, act_channels=None)


def test_a_vanilla_vit():
    result = profile(vanilla(), images(), seconds=0.0)
    assert {part.name: part.flops for part in result.parts if part.flops} == {**WHOLE, **FFN, **HEAD}
    assert {"attention: norm", "FFN: norm", "FFN: activation"} <= {part.name for part in result.parts}
    assert not result.estimated
    assert [part.name for part in result.parts] == [name for name in PARTS if result[name].seconds]


def test_a_channel_idle_vit_in_training_form_and_deployed():
    """m = C at θ = 0.75: three products of one size, told apart by what they are."""
    model = tiny_vit()
    assert found(model, images()) == {**WHOLE, **FFN, **HEAD}
    assert found(repavit_ops.reparameterize(model), images()) == {**WHOLE, **MERGED, **HEAD}


@pytest.mark.skipif(not KERNELS, reason="no C++ kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fused_vits(dtype):
    """The head, outside the blocks, is a product of PyTorch's."""
    x = images().to(dtype)
    assert found(repavit_ops.fuse(tiny_vit(), dtype=dtype), x) == {**WHOLE, **MERGED, **HEAD}
    result = profile(repavit_ops.fuse(vanilla(), dtype=dtype), x, seconds=0.0)
    assert {part.name: part.flops for part in result.parts if part.flops} == {**WHOLE, **FFN, **HEAD}
    assert result.estimated


def test_a_joined_vit():
    model = randomise(
        repavit_ops.models.JoinedVisionTransformer(
            img_size=32, patch_size=8, embed_dim=C, depth=DEPTH, branches=2, num_heads=3, num_classes=10
        )
    )
    repavit_ops.set_join(model, 1.0)
    merged = found(repavit_ops.reparameterize(model), images())
    assert merged["FFN: in"] == FFN["FFN: in"]
    assert merged["attention: proj"] >= ATTENTION["attention: proj"]


def test_a_swin():
    """Windows of 4 x 4 on maps of 16 and 8 tokens a side; merging is "rest" in every form."""
    model = tiny_swin(idle_ratio=None, act_channels=None)
    x = images(1, 64)
    stages = [(16 * 16, 24), (8 * 8, 48)]
    wanted = {
        "attention: qkv": sum(2 * 2 * t * c * 3 * c for t, c in stages),
        "attention: core": sum(2 * 2 * t * 16 * 2 * c for t, c in stages),
        "attention: proj": sum(2 * 2 * t * c * c for t, c in stages),
        "FFN: in": sum(2 * 2 * t * c * 4 * c for t, c in stages),
        "FFN: out": sum(2 * 2 * t * c * 4 * c for t, c in stages),
        "patch embedding": 2 * 16 * 16 * 24 * 48,
        "rest": 2 * 8 * 8 * 96 * 48 + 2 * 48 * 10,
    }
    assert found(model, x) == wanted
    if KERNELS:
        assert found(repavit_ops.fuse(model), x) == wanted


def test_models_of_timm(timm):
    small = {"depth": DEPTH, "embed_dim": C, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 10}
    for name in ("vit_tiny_patch16_224", "deit3_small_patch16_224"):
        model = randomise(timm.create_model(name, **small))
        assert found(model, images()) == {**WHOLE, **FFN, **HEAD}, name
        if KERNELS:
            assert found(repavit_ops.fuse(model), images()) == {**WHOLE, **FFN, **HEAD}, name


def test_a_gated_model_of_timm(timm):
    """EVA02: q, k and v apart, rotation between them and the scores, SwiGLU with two projections in."""
    model = timm.create_model(
        "eva02_tiny_patch14_224", depth=DEPTH, embed_dim=C, num_heads=3, img_size=28, patch_size=7, num_classes=10
    ).eval()
    parts = found(model, images(B, 28))
    hidden = model.blocks[0].mlp.fc2.in_features
    assert parts["FFN: in"] == 2 * ROWS * C * 2 * hidden
    assert parts["FFN: out"] == 2 * ROWS * C * hidden
    assert {name: parts[name] for name in ATTENTION} == ATTENTION
    if KERNELS:
        fused = found(repavit_ops.fuse(model), images(B, 28))
        assert {k: v for k, v in fused.items() if k != "patch embedding"} == {
            k: v for k, v in parts.items() if k != "patch embedding"
        }


def test_an_activation_inside_attention_is_no_ffn(timm):
    """SwinV2 makes its position bias by a small FFN, and a sigmoid stands between the scores and softmax."""
    model = timm.create_model(
        "swinv2_tiny_window8_256", img_size=32, window_size=8, depths=(1,), embed_dim=24, num_heads=(2,), num_classes=0
    )
    parts = found(model.eval(), images(1))
    assert parts["FFN: in"] == parts["FFN: out"] == 2 * 64 * 24 * 96
    assert parts["attention: proj"] == 2 * 64 * 24 * 24
    assert parts["attention: core"] == 2 * 64 * 64 * 2 * 24
    assert parts["attention: qkv"] >= 3 * parts["attention: proj"]


def test_a_model_of_transformers(torchvision_stub):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=C,
        num_hidden_layers=DEPTH,
        num_attention_heads=3,
        intermediate_size=HIDDEN,
        image_size=32,
        patch_size=8,
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    assert found(model, images()) == {**WHOLE, **FFN}


def test_attention_that_pytorch_runs_in_one_function():
    layer = nn.TransformerEncoderLayer(C, 3, HIDDEN, activation="gelu", norm_first=True, batch_first=True)
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(0))
    attention = sum(ATTENTION.values()) // DEPTH
    ffn = {name: flops // DEPTH for name, flops in FFN.items()}
    assert found(nn.Sequential(layer).eval(), x) == {"attention: in one call": attention, **ffn}


def test_an_activation_outside_blocks_is_no_ffn():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    assert found(Model().eval(), torch.ones(1, 4)) == {"rest": 64}


def test_forms_side_by_side_change_nothing():
    model, twin = tiny_vit(), vanilla()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forms = profile_forms(model, images(), vanilla=twin, seconds=0.0)
    assert list(forms) == ["vanilla", "deployed", "fused"]
    assert forms["deployed"]["FFN: merged"].flops == MERGED["FFN: merged"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert list(profile_forms(twin, images(), seconds=0.0)) == ["vanilla", "fused"]


def test_what_cannot_be_profiled_is_named():
    with pytest.raises(RuntimeError, match=r"model: in training mode; call model\.eval\(\)"):
        profile(vanilla().train(), images())
    with pytest.raises(ValueError, match="got them on cpu, meta, wanted a CPU"):
        profile(vanilla(), images().to("meta"))


# --- reports ----------------------------------------------------------------------------------------------------------


def by_hand():
    slow = Profile(2.0, (Part("FFN: in", 1.5, 3_000_000_000), Part("rest", 0.5, 0)), False)
    return {"vanilla": slow, "fused": Profile(1.0, (Part("FFN: in", 1.0, 3_000_000_000),), True)}


def text_of(profiles, peak):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.tables(profiles, peak))
    return console.export_text()


def test_a_table_and_bars():
    text = text_of(by_hand(), 10e9)
    (row,) = (line for line in text.splitlines() if "FFN: in" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == [
        "1500.00 ( 75%)",
        "2.0 ( 20%)",
        "1000.00 (100%)",
        "3.0 ( 30%)",
    ]
    assert f"vanilla {'I' * 45}{'.' * 15} 2000.00 ms" in text
    assert f"fused   {'I' * 30} 1000.00 ms" in text
    assert "of peak" not in text_of(by_hand(), None)


@pytest.mark.parametrize("picture", [False, True])
def test_the_command(tmp_path, monkeypatch, picture):
    monkeypatch.setenv("COLUMNS", "200")
    if picture:
        pytest.importorskip("matplotlib")
    torch.save({"model": tiny_vit().state_dict()}, tmp_path / "trained.pth")
    arguments = [str(tmp_path / "trained.pth"), "--idle-ratio", "0.75", "--num-heads", "3", "--seconds", "0"]
    extra = ["--plot", str(tmp_path / "bars.svg")] if picture else []
    result = CliRunner().invoke(app, ["profile", *arguments, "--json", str(tmp_path / "out.json"), *extra])
    assert result.exit_code == 0, result.output
    assert "fused: ms" in result.stdout
    data = json.loads((tmp_path / "out.json").read_text())
    assert list(data["forms"]) == ["deployed", "fused"]
    assert data["size"] == [32, 32]
    parts = {part["name"]: part["flops"] for part in data["forms"]["deployed"]["parts"]}
    assert parts["FFN: merged"] == MERGED["FFN: merged"] // B
    assert not picture or "<svg" in (tmp_path / "bars.svg").read_text()


def test_a_mistake_is_one_line():
    result = CliRunner().invoke(app, ["profile", "no_such_model"])
    assert result.exit_code == 2
    assert "MODEL: got 'no_such_model'" in result.stderr
    result = CliRunner().invoke(app, ["profile", "vanilla_deit_tiny", "--dtype", "int8"])
    assert "--dtype: got 'int8', wanted one of float32" in result.stderr
