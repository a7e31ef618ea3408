"""What a model would launch on a GPU is counted right without one, and predictions and results meet in one table."""

from __future__ import annotations

from pathlib import Path

import gpu_predictions
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from gpu_cases import addmm_ffn, meta_ffn
from gpu_ledger import Launch, compiled, products_of, record
from gpu_models import TINY, on_meta
from gpu_predictions import CEILINGS, Prediction

from repavit_ops.kernels.chips import KNOWN
from repavit_ops.kernels.partial_gelu_ffn import partial_gelu_ffn

CHIP = KNOWN["sm_90"]


def meta(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def ffn(rows, c):
    return partial_gelu_ffn(meta(rows, c), meta(c, c), meta(c), meta(c, c), meta(c, c), meta(c))


def test_an_ffn_is_two_launches_of_the_least_bytes():
    ledger = record(lambda: ffn(25216, 384), CHIP)
    assert [launch.name for launch in ledger.launches] == ["linear_kernel", "two_source_kernel"]
    x, w, b = 25216 * 384 * 2, 384 * 384 * 2, 384 * 2
    assert [launch.bytes for launch in ledger.launches] == [2 * x + w + b, 3 * x + 2 * w + b]
    assert sum(launch.flop for launch in ledger.launches) == 6 * 25216 * 384**2


def test_the_ffn_on_chip_is_one_product_on_tiles_of_whole_rows():
    (launch,) = record(lambda: ffn(25216, 192), CHIP).launches
    assert launch.product == (25216, 1)
    assert launch.flop == 6 * 25216 * 192**2


def test_pytorchs_kernels_are_counted_and_views_are_not():
    x, w, b = meta(8, 32), meta(16, 32), meta(16)
    ledger = record(lambda: F.gelu(F.linear(x, w, b)).view(4, 2, 16).transpose(0, 1), CHIP)
    assert [launch.name for launch in ledger.launches] == ["addmm", "gelu"]
    assert ledger.launches[0].flop == 2 * 8 * 16 * 32
    assert ledger.launches[1].bytes == 2 * 8 * 16 * 2


def test_the_hand_made_ffn_is_three_products():
    ledger = record(lambda: addmm_ffn(*meta_ffn(384, 1)), CHIP)
    assert len(ledger.launches) == 3
    assert sum(launch.flop for launch in ledger.launches) == 6 * 197 * 384**2


def test_attention_of_pytorch_is_one_launch():
    q = meta(2, 3, 197, 64)
    (launch,) = record(lambda: F.scaled_dot_product_attention(q, q, q), CHIP).launches
    assert launch.flop == 4 * 2 * 3 * 197**2 * 64


def test_a_compiler_joins_what_stands_between_products():
    x, w = meta(8, 32), meta(32, 32)

    def call():
        h = F.layer_norm(F.gelu(F.linear(x, w)) + x, (32,))
        return F.linear(h, w)

    ledger = record(call, CHIP)
    joined = compiled(ledger)
    assert len(ledger.launches) == 5
    assert [bool(launch.flop) for launch in joined.launches] == [True, False, True]
    size = 8 * 32 * 2
    assert joined.launches[1].bytes == 3 * size  # the product and x are read, h is written


def test_fused_model_does_the_arithmetic_of_the_merged_one_in_fewer_launches():
    ledgers = {}
    for form in ("fused", "merged"):
        model, images = on_meta("deit_tiny", form, 2, **TINY)
        ledgers[form] = record(lambda model=model, images=images: model(images), CHIP)
    fused, merged = (ledgers[form].launches for form in ("fused", "merged"))
    assert len(fused) < len(merged)
    assert sum(launch.flop for launch in fused) == pytest.approx(sum(launch.flop for launch in merged), rel=0.01)


def test_products_that_a_call_looks_up():
    assert {p.kind for p in products_of(lambda: ffn(25216, 384), CHIP)} == {"on_chip", "linear_gelu", "two_source"}


def test_time_is_the_larger_of_arithmetic_and_bytes_and_a_node():
    ceiling = CEILINGS["H100"]
    copy = Launch("gelu", 0.0, {1: 3_000_000}, {2: 3_000_000})
    assert gpu_predictions.seconds(copy, ceiling, CHIP) == pytest.approx(ceiling.node + 2e-6)
    product = Launch("addmm", 798e12 * 0.75 * 1e-3, {1: 1}, {2: 1}, (128 * 132, 128))
    assert gpu_predictions.seconds(product, ceiling, CHIP) == pytest.approx(ceiling.node + 1e-3)
    one_tile = Launch("addmm", product.flop, {1: 1}, {2: 1}, (64, 64))
    assert gpu_predictions.seconds(one_tile, ceiling, CHIP) == pytest.approx(ceiling.node + 132e-3)


def test_the_measured_column_is_filled_and_what_is_far_off_is_open(monkeypatch):
    predicted = [
        Prediction("deit_small batch 128", provider, 1, 1e9, 1e6, microseconds)
        for provider, microseconds in (("repavit_ops", 100.0), ("merged_eager", 150.0), ("vanilla_eager", 300.0))
    ]
    monkeypatch.setattr(gpu_predictions, "predictions", lambda ceiling: predicted)
    rows = [
        {
            "part": "models",
            "case": "deit_small batch 128",
            "seconds": {"repavit_ops": [0, 110e-6, 0], "merged_eager": [0, 220e-6, 0]},
        }
    ]
    lines = gpu_predictions.table(CEILINGS["H100"], gpu_predictions.measured(rows)).splitlines()[2:]
    assert lines[0].endswith("| 100 | 1.00 | 110 | 1.00 | 1.10 |")
    assert lines[1].endswith("| 150 | 1.50 | 220 | 2.00 | 1.47 **open** |")
    assert lines[2].endswith("| 300 | 3.00 |  |  |  |")


def test_a_page_gets_its_table_anew():
    page = "before\n<!-- predictions: H100 -->\nold\n<!-- end of predictions -->\nafter\n"
    assert gpu_predictions.renewed(page, "H100", "new") == page.replace("old\n", "\nnew\n\n")
    with pytest.raises(ValueError, match="H200"):
        gpu_predictions.renewed(page, "H200", "new")


@pytest.mark.parametrize("gpu", CEILINGS)
def test_predictions_in_docs_gpu(gpu, monkeypatch):
    """Those of DeiT-S and of FFNs: other models take a minute. Once measured, the times are those of other ceilings."""
    monkeypatch.setattr(gpu_predictions, "HEADLINE", ("deit_small",))
    text = (Path(__file__).resolve().parent.parent / "docs/gpu.md").read_text()
    text = text[text.index(gpu_predictions.BEGIN.format(gpu)) :].split(gpu_predictions.END, 1)[0]
    shown = {tuple(cells[1:3]): cells for cells in (line.split("|") for line in text.splitlines()) if len(cells) > 10}
    predicted = [line.split("|") for line in gpu_predictions.table(CEILINGS[gpu], {}).splitlines()[2:]]
    assert len(predicted) > 20
    for cells in predicted:
        found = shown[tuple(cells[1:3])]
        kept = 8 if not found[8].strip() else 6
        assert found[:kept] == cells[:kept]
