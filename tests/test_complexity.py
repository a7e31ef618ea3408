"""Parameters and MACs of every model against the tables of the papers, counted without computing anything."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from repavit_ops.benchmarking import papers
from repavit_ops.models import complexity, create_model, list_models
from repavit_ops.models.complexity import Complexity
from repavit_ops.nn import Attention, Block, ChannelIdleFFN, PartialGELUFFN, RepAttention, WindowRepAttention

ROWS = {
    (row.table, row.label, row.form): row
    for rows in papers.TABLES.values()
    for row in rows
    if row.form in (papers.VANILLA, papers.TRAINING, papers.DEPLOYED) and row.mparams is not None
}


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


@functools.lru_cache
def counted(row: papers.PaperRow) -> Complexity:
    form = {"form": "deployed"} if row.form == papers.DEPLOYED else {}
    return complexity(on_meta(row.model, **row.options, **form), attention_products=row.attention_products)


@pytest.mark.parametrize("key", ROWS, ids="-".join)
def test_every_digit_is_the_papers(key: tuple[str, str, str]) -> None:
    row = ROWS[key]
    found = counted(replace(row, table="", label="", speed=None, accuracy=None, gain=None, mparams=None, gmacs=None))
    digits = (round(found.mparams, 1), round(found.gmacs, 1))
    if key not in papers.MISPRINTED:
        assert digits == (row.mparams, row.gmacs)
        return
    assert digits != (row.mparams, row.gmacs)
    assert found.mparams == pytest.approx(row.mparams, abs=0.1)
    assert found.gmacs == pytest.approx(row.gmacs, abs=0.71 if key[:2] == ("2", "RePa-DeiT-Base/0.75") else 0.15)


def test_every_repa_and_vanilla_name_is_checked() -> None:
    named = {name for name in list_models() if not name.startswith("joined_")}
    assert named == {row.model for row in ROWS.values()} | {"vanilla_vit_tiny"}
    assert ROWS.keys() >= papers.MISPRINTED


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
