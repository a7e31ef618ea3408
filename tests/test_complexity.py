"""Parameters and MACs of every model against the tables of the papers, counted without computing anything."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from repavit_ops.models import complexity, create_model, list_models
from repavit_ops.nn import Attention, Block, ChannelIdleFFN, PartialGELUFFN, RepAttention, WindowRepAttention

# model, (MParam, GMACs) of the vanilla twin, of the training form, and of each deployed form by idle ratio.
# RePaViT, Tables 1, 4, 8 and 9; None where the paper has no number, "default" for LV-ViT's m = C (its "0.75").
TABLES = {
    "deit_tiny": ((5.7, 1.1), (5.7, 1.1), {1.0: (2.6, 0.5), 0.75: (3.5, 0.6), 0.5: (4.4, 0.8), 0.25: (5.3, 1.0)}),
    "deit_small": ((22.1, 4.3), (22.1, 4.3), {1.0: (9.6, 1.8), 0.75: (13.2, 2.5), 0.5: (16.7, 3.2), 0.25: (20.3, 3.9)}),
    "deit_base": (
        (86.6, 16.9),
        (86.6, 16.9),
        {1.0: (37.0, 7.1), 0.75: (51.1, 9.9), 0.5: (65.3, 12.7), 0.25: (79.5, 15.5)},
    ),
    "vit_large": ((304.3, 59.7), (304.5, 59.8), {0.75: (178.4, 34.9)}),
    "vit_huge": ((632.2, 124.3), (632.5, 124.4), {0.75: (369.9, 72.6)}),
    "swin_tiny": ((28.3, 4.4), (28.3, 4.4), {1.0: (13.2, 1.9), 0.75: (17.5, 2.6), 0.5: (21.8, 3.3), 0.25: (26.1, 4.0)}),
    "swin_small": (
        (49.6, 8.6),
        (49.7, 8.6),
        {1.0: (22.1, 3.7), 0.75: (29.9, 5.1), 0.5: (37.8, 6.5), 0.25: (45.7, 7.9)},
    ),
    "swin_base": (
        (87.8, 15.2),
        (87.9, 15.2),
        {1.0: (38.8, 6.5), 0.75: (52.8, 9.0), 0.5: (66.8, 11.5), 0.25: (80.8, 14.0)},
    ),
    "lvvit_s": ((26.2, 6.1), (26.2, 6.1), {"default": (19.1, 4.7)}),
    "lvvit_m": ((55.8, 11.9), (55.9, 11.9), {"default": (40.1, 8.8)}),
    "dino_vit_s": ((21.7, 4.3), None, {0.75: (12.8, 2.5)}),
    "dino_vit_b": ((85.8, 16.9), None, {0.75: (50.4, 9.9)}),
    "clip_vit_b32": ((87.9, 4.4), None, {0.5: (66.6, 3.4), 0.75: (52.4, 2.6)}),
    "clip_vit_b16": ((86.2, 17.6), None, {0.5: (64.9, 13.4), 0.75: (50.8, 10.6)}),
}

ROWS = [
    pytest.param(name, options, row, id=f"{name}{suffix}")
    for stem, (vanilla, training, deployed) in TABLES.items()
    for name, options, row, suffix in [
        (f"vanilla_{stem}", {}, vanilla, ""),
        (f"repa_{stem}", {}, training, "-training"),
        *(
            (
                f"repa_{stem}",
                {"form": "deployed"} | ({} if theta == "default" else {"idle_ratio": theta}),
                row,
                f"-{theta}",
            )
            for theta, row in deployed.items()
        ),
    ]
    if row is not None
]


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.mark.parametrize(("name", "options", "row"), ROWS)
def test_matches_the_paper(name: str, options: dict, row: tuple[float, float]) -> None:
    mparams, gmacs = row
    counted = complexity(on_meta(name, **options), attention_products="clip" in name)
    assert abs(counted.mparams - mparams) < 0.1
    assert abs(counted.gmacs - gmacs) < max(0.15, 0.002 * gmacs)


def test_every_repa_and_vanilla_name_is_checked() -> None:
    named = {name.split("_", 1)[1] for name in list_models() if not name.startswith("joined_")}
    assert named == {*TABLES, "vit_tiny"}


@pytest.mark.parametrize("depth", [6, 4, 3])
def test_joined_branches_keep_the_size_of_twelve_blocks(depth: int) -> None:
    twelve = complexity(on_meta("vanilla_vit_tiny"))
    joined = complexity(on_meta(f"joined_vit_tiny_{depth}"))
    assert joined.params == pytest.approx(twelve.params, rel=1e-3)
    assert joined.macs == pytest.approx(twelve.macs, rel=5e-3)


def test_one_linear_layer_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.LayerNorm(4), nn.Linear(4, 5, bias=False))
    counted = complexity(model, img_size=8)
    assert counted.params == 8 * 3 * 16 + 8 + 8 + 20
    assert counted.macs == 8 * 4 * (3 * 16 + 1) + 5 * 8 * 4 + 8 * 4 * 5


def test_attention_products_by_hand() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention(12, 2, d_qk=3, d_v=5, norm=None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x.flatten(2))

    model = Tokens()
    # an image of 3 x 12: one row of pixels per channel makes 3 tokens of 12 channels
    with_products = complexity(model, img_size=(3, 4), attention_products=True)
    assert with_products.macs - complexity(model, img_size=(3, 4)).macs == 2 * 3 * 3 * (3 + 5)


def test_fused_operators_count_what_their_definition_counts() -> None:
    def tokens(attn: nn.Module, mlp: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.Flatten(2), nn.Linear(4, 16), Block(attn, mlp))

    mlp = {"dim": 16, "act_channels": 24}
    plain = tokens(Attention(16, 2), PartialGELUFFN(**mlp, backend="reference"))
    fused = tokens(RepAttention(16, 2, norm_eps=1e-5, residual=True), PartialGELUFFN(**mlp))
    for products in (False, True):
        assert complexity(fused, 8, products).macs == complexity(plain, 8, products).macs


def test_window_operator_counts_its_products() -> None:
    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = WindowRepAttention(3, 1, window=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x.permute(0, 2, 3, 1))

    linear = 16 * (9 * (3 + 1) + 3 * (3 + 1))
    assert complexity(Map(), 4).macs == linear
    assert complexity(Map(), 4, attention_products=True).macs == linear + 4 * 2 * 4 * 4 * 3


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), ChannelIdleFFN(4, 8, idle_ratio=0.5).eval())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    complexity(model, img_size=8)
    assert model.training
    assert not model[2].training
    assert all(
        value.device.type == "cpu" and torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )
